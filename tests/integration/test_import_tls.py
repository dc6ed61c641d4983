"""An import from a server that lets nobody in without TLS: the URL decides what is checked, as for libpq."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.cli.import_server import ServerSource
from excimer.cli.import_server_needs import server_needs
from excimer.cli.import_source import SourceRefusedError
from excimer.compute.server_certificate import CertificateFiles, install_pair, read_pair
from excimer.postgres import run_initdb
from excimer.wire.import_stream import encode_end
from tests.kit.builds import build_of
from tests.kit.directories import reachable_directory
from tests.kit.stock_server import StockServer, stock_server
from tests.kit.tls import new_tls

TLS_VERSION = 14
"""A version whose usual build has TLS."""

HBA = "local all all trust\nhostssl all all all trust\nhostssl replication all all trust\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockServer]:
    """Its certificate is for 127.0.0.1 alone; the CA is in `ca.pem` beside its data directory."""
    build = build_of(TLS_VERSION)
    made = new_tls(tmp_path_factory.mktemp("tls"), "127.0.0.1")
    with reachable_directory() as root:
        run_initdb(build, root / "data")
        install_pair(read_pair(CertificateFiles(made.certificate, made.key)), root / "data")
        (root / "ca.pem").write_bytes(made.ca.read_bytes())
        (root / "data" / "pg_hba.conf").write_text(HBA)
        settings = {"listen_addresses": "127.0.0.1", "ssl": "on"}
        with stock_server(build, root / "data", settings) as running:
            yield running


def url(server: StockServer, sslmode: str, host: str = "127.0.0.1", ca: Path | None = None) -> str:
    ca = ca or server.data_dir.with_name("ca.pem")
    return f"postgres://postgres@{host}:{server.port}/postgres?sslmode={sslmode}&sslrootcert={ca}"


@pytest.mark.parametrize(
    ("sslmode", "host"), [("require", "127.0.0.1"), ("verify-ca", "localhost"), ("verify-full", "127.0.0.1")]
)
def test_a_whole_cluster_comes_over_tls(server: StockServer, sslmode: str, host: str) -> None:
    source = ServerSource(url(server, sslmode, host), None)
    try:
        *frames, last = source.frames()
        usage = "select count(*) from pg_stat_ssl join pg_stat_replication using (pid) where ssl"
        assert server.sql(usage) == [["2"]], "both of its connections"
    finally:
        source.close()
    assert last == encode_end()
    assert sum(map(len, frames)) > source.total_size_bytes > 10 << 20
    assert server_needs(url(server, sslmode, host)).unseen == (), "databases are asked the same way"


def test_what_the_url_does_not_allow_is_refused_with_the_reason(server: StockServer, tmp_path: Path) -> None:
    other = new_tls(tmp_path).ca
    for refused, reason in (
        (url(server, "disable"), "no encryption"),
        (url(server, "verify-full", ca=other), "certificate verify failed"),
        (url(server, "verify-ca", ca=other), "certificate verify failed"),
        (url(server, "verify-full", "localhost"), 'does not match host name "localhost"'),
        (url(server, "verify-full", ca=tmp_path / "missing"), "missing"),
    ):
        with pytest.raises(SourceRefusedError, match=reason) as error:
            ServerSource(refused, None)
        assert "\n" not in str(error.value), "one line"
