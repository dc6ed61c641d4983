"""Where an endpoint may listen, and its certificate: only whole pairs are used, and new ones are taken up."""

import asyncio
from pathlib import Path

import pytest

from excimer.base.address import parse_address
from excimer.compute import server_certificate
from excimer.compute.server_certificate import (
    CertificateError,
    CertificateFiles,
    ListenRefusedError,
    check_listen,
    choose_certificate,
    follow_files,
    install_pair,
    read_pair,
)
from tests.kit.builds import build_with
from tests.kit.certificates import write_certificate


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    made = CertificateFiles(tmp_path / "given.crt", tmp_path / "given.key")
    write_certificate(*made, "first")
    return made


@pytest.mark.parametrize("listen", ["0.0.0.0:5432", "10.0.0.1:5432", "[::]:5432", "db.example:5432"])
def test_beyond_loopback_only_with_tls(listen: str, files: CertificateFiles) -> None:
    check_listen(parse_address(listen), build_with(tls=True), files)
    with pytest.raises(ListenRefusedError, match="without TLS: give it a certificate"):
        check_listen(parse_address(listen), build_with(tls=True), None)
    for given in (files, None):
        with pytest.raises(ListenRefusedError, match=r"built without TLS, so passwords .* proxy"):
            check_listen(parse_address(listen), build_with(tls=False), given)


def test_loopback_needs_nothing_but_a_certificate_must_be_usable(files: CertificateFiles) -> None:
    for tls in (True, False):
        check_listen(parse_address("127.0.0.1:5432"), build_with(tls=tls), None)
    check_listen(parse_address("127.0.0.1:5432"), build_with(tls=True), files)
    with pytest.raises(ListenRefusedError, match="cannot use a certificate"):
        check_listen(parse_address("127.0.0.1:5432"), build_with(tls=False), files)


def test_its_own_certificate_or_else_the_installations_if_the_build_can(files: CertificateFiles) -> None:
    default = CertificateFiles(Path("default.crt"), Path("default.key"))
    for tls in (True, False):
        build = build_with(tls=tls)
        assert choose_certificate(build, own=files, default=default) == files
        assert choose_certificate(build, own=None, default=default) == (default if tls else None)
        assert choose_certificate(build, own=None, default=None) is None


def test_what_is_no_pair_is_refused_with_the_reason(files: CertificateFiles, tmp_path: Path) -> None:
    other = CertificateFiles(tmp_path / "other.crt", tmp_path / "other.key")
    write_certificate(*other, "other")
    with pytest.raises(CertificateError, match=r"are no certificate and its key: .*mismatch"):
        read_pair(CertificateFiles(files.certificate, other.key))
    with pytest.raises(CertificateError, match=r"cannot read .*missing.*: No such file"):
        read_pair(CertificateFiles(tmp_path / "missing", other.key))
    other.certificate.write_text("not a certificate")
    with pytest.raises(CertificateError, match="are no certificate and its key"):
        read_pair(other)


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(files: CertificateFiles) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(CertificateError, match="passphrase"):
        read_pair(files)


def test_a_renewed_certificate_is_installed_and_a_wrong_one_is_not(
    files: CertificateFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_certificate, "POLL_INTERVAL_S", 0.01)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    reloads = asyncio.Queue[bytes]()

    def reload() -> None:
        reloads.put_nowait((run_dir / "server.crt").read_bytes())

    async def story() -> None:
        first = read_pair(files)
        install_pair(first, run_dir)
        following = asyncio.ensure_future(follow_files(files, first, run_dir, reload))
        files.certificate.write_text("half of a certificate")
        await asyncio.sleep(0.1)
        assert reloads.empty()
        assert (run_dir / "server.crt").read_bytes() == first.certificate
        write_certificate(*files, "second")
        async with asyncio.timeout(10):
            assert await reloads.get() == files.certificate.read_bytes() != first.certificate
        assert (run_dir / "server.key").read_bytes() == files.key.read_bytes()
        following.cancel()

    asyncio.run(story())
    assert {path.name: path.stat().st_mode & 0o777 for path in run_dir.iterdir()} == {
        "server.crt": 0o600,
        "server.key": 0o600,
    }
