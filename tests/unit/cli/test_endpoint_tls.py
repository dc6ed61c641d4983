"""Which certificate an endpoint shows that names none of its own, and what its URL says of that."""

from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from excimer import postgres
from excimer.cli.commands.endpoint_access import check_listen_here
from excimer.cli.credentials import has_tls, planned_certificate, url_of
from excimer.cli.installation import TLS_NAME, Installation, create_installation, new_config, own_tls
from excimer.compute.local_access import LocalAccess, write_local_access
from excimer.compute.places import LOCAL_ACCESS_NAME
from excimer.compute.server_certificate import CertificateError, ListenRefusedError
from excimer.compute_node.manager_settings import manager_settings
from excimer.compute_node.settings import ComputeNodeSettings
from excimer.postgres import PostgresMissingError
from excimer.service.settings import TlsSettings
from tests.kit.builds import build_with
from tests.kit.compute_orders import start_order
from tests.kit.tls import new_tls

PLAIN: dict[str, Any] = {
    "name": "main",
    "listen_host": "127.0.0.1",
    "postgres_port": 5432,
    "http_port": 5433,
    "pg_version": 18,
    "tls_certificate_path": None,
    "tls_key_path": None,
}


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def made_with(tmp_path: Path, tls: TlsSettings | None) -> Installation:
    return create_installation(tmp_path / "state", new_config(18, 1, tls=tls))


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    """As `init --tls` makes it."""
    return made_with(tmp_path, own_tls(tmp_path / "state" / TLS_NAME))


def build_has_tls(monkeypatch: pytest.MonkeyPatch, *, tls: bool) -> None:
    monkeypatch.setattr(postgres, "find_build", lambda _: build_with(tls=tls))


def test_a_key_that_sql_can_read_is_not_the_services_and_not_of_their_ca(installation: Installation) -> None:
    services, shown = installation.config.tls, installation.endpoint_tls
    assert services is not None
    assert shown is not None
    assert services.key.read_bytes() != shown.key.read_bytes()
    certificate(shown.certificate).verify_directly_issued_by(certificate(shown.ca))
    with pytest.raises(InvalidSignature):
        certificate(shown.certificate).verify_directly_issued_by(certificate(services.ca))
    assert {path.stat().st_mode & 0o777 for path in shown.certificate.parent.iterdir()} == {0o600}


def test_a_certificate_that_an_operator_gave_is_shown_by_endpoints_too(tmp_path: Path) -> None:
    given = new_tls(tmp_path / "given")
    installation = made_with(tmp_path, given)
    assert installation.endpoint_tls == given
    assert made_with(tmp_path / "plain", None).endpoint_tls is None


def test_managers_are_told_of_it_beside_the_endpoints_own(installation: Installation) -> None:
    node = installation.compute_node().settings
    assert isinstance(node, ComputeNodeSettings)
    order = start_order("main", tls_certificate_path="/own.crt", tls_key_path="/own.key")
    settings = manager_settings(order, node)
    assert (settings.tls_certificate_path, settings.tls_key_path) == (Path("/own.crt"), Path("/own.key"))
    shown = installation.endpoint_tls
    assert shown is not None
    assert settings.default_tls_certificate_path == shown.certificate
    assert settings.default_tls_key_path == shown.key


def test_the_url_asks_for_tls_where_the_build_has_it(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tls, mode in ((True, "require"), (False, "disable")):
        build_has_tls(monkeypatch, tls=tls)
        assert url_of(installation, PLAIN).endswith(f"?sslmode={mode}")

    def no_build(_: int) -> None:
        raise PostgresMissingError("none here")

    monkeypatch.setattr(postgres, "find_build", no_build)
    assert not has_tls(installation, PLAIN), "a list of endpoints does not fail for it"
    own = PLAIN | {"tls_certificate_path": "/own.crt", "tls_key_path": "/own.key"}
    assert url_of(installation, own).endswith("?sslmode=require")


def test_the_url_of_an_endpoint_that_runs_says_what_it_does_now(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = installation.endpoint_dir("main") / LOCAL_ACCESS_NAME
    path.parent.mkdir()
    for tls in (True, False):
        build_has_tls(monkeypatch, tls=not tls)
        write_local_access(path, LocalAccess(socket_dir="/", port=1, superuser="postgres", has_tls=tls))
        assert has_tls(installation, PLAIN) is tls
        write_local_access(path, LocalAccess(socket_dir="/", port=1, superuser="postgres"))
        assert has_tls(installation, PLAIN) is not tls, "an older manager has not said it"


def test_beyond_loopback_without_a_certificate_of_its_own(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = PLAIN | {"listen_host": "0.0.0.0"}
    build_has_tls(monkeypatch, tls=True)
    check_listen_here(installation, wide)
    with pytest.raises(ListenRefusedError, match="without TLS: give it a certificate"):
        check_listen_here(made_with(tmp_path / "plain", None), wide)
    shown = planned_certificate(installation, wide)
    assert shown is not None
    shown.key.unlink()
    with pytest.raises(CertificateError, match=r"cannot read .*/tls/endpoints/server.key"):
        check_listen_here(installation, wide)
    build_has_tls(monkeypatch, tls=False)
    with pytest.raises(ListenRefusedError, match="was built without TLS"):
        check_listen_here(installation, wide)
    check_listen_here(installation, PLAIN)
