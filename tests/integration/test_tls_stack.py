"""A whole installation whose services speak TLS: everything works, nothing is said in clear."""

import io
import json
import socket
import ssl
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from excimer.base.address import Address, parse_address
from excimer.base.ids import TenantId, TimelineId
from excimer.io.processes import program_environment
from excimer.service.postgres_tls import SSL_REQUEST
from excimer.wire.replication import format_options
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.stack import Stack, running_stack

pytestmark = pytest.mark.timeout(240)

TLS_VERSION = 14
"""A version whose usual build has TLS."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=3, options=["--tls"]) as stack:
        stack.create_main()
        yield stack


def listens(stack: Stack) -> dict[str, Address]:
    """Every port of every service and manager, as their settings say; PostgreSQL's own is not one of them."""
    found = {}
    for path in (stack.directory / "run").glob("*.toml"):
        for name, value in tomllib.loads(path.read_text()).items():
            if name.endswith("listen") and name != "postgres_listen":
                found[f"{path.stem}.{name}"] = parse_address(value)
    return found


def test_reads_writes_branches_and_restarts(stack: Stack) -> None:
    stack.query("create table t as select generate_series(1, 200000) i")
    stack.branch("other")
    assert stack.query("select count(*), sum(i) from t", "other") == [(200000, 20000100000)]
    stack.stop_and_forget()
    stack.text("endpoint", "start", "main")
    stack.query("insert into t values (0)")
    assert stack.query("select count(*) from t") == [(200001,)]
    status = stack.json("status")
    assert status["well"]
    assert status["tls"]["ca"] == str(stack.directory / "tls" / "ca.pem")
    assert "TLS between services" in stack.text("status")
    assert (stack.directory / "run" / "pageserver.toml").read_text().count("[tls]") <= 1


def test_export_and_import_go_over_tls(stack: Stack, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    stack.text("export", "main", str(target))
    assert (target / "PG_VERSION").read_text().strip() == str(NEWEST_VERSION)


def test_every_port_speaks_tls_and_nothing_else(stack: Stack) -> None:
    found = listens(stack)
    assert len(found) >= 2 + 3 * 3 + 2 + 1 + 1
    context = ssl.create_default_context(cafile=stack.directory / "tls" / "ca.pem")
    for name, address in found.items():
        with socket.create_connection(address, timeout=20) as plain:
            if name == "broker.listen":  # NATS says hello in clear, and then wants TLS
                hello = plain.recv(4096)
                assert json.loads(hello.split(b" ", 1)[1])["tls_required"]
                with context.wrap_socket(plain, server_hostname=address.host) as secure:
                    assert secure.version() == "TLSv1.3"
                continue
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP" not in _all_of(plain), name
        with (
            socket.create_connection(address, timeout=20) as opened,
            context.wrap_socket(opened, server_hostname=address.host) as secure,
        ):
            assert secure.version() == "TLSv1.3", name


def _all_of(connection: socket.socket) -> bytes:
    received = b""
    try:
        while data := connection.recv(4096):
            received += data
    except OSError:
        return received
    return received


def test_stock_readers_ask_for_tls_their_own_way(stack: Stack) -> None:
    """libpq checks certificate and host itself; it is let in, or refused for its token, behind TLS only."""
    address = listens(stack)["safekeeper-1.replication_listen"]
    options = format_options(TenantId("aa" * 16), TimelineId("bb" * 16))  # the token comes first
    ca = stack.directory / "tls" / "ca.pem"
    for mode, said in (("verify-full", "the token is not one of this installation"), ("disable", "TLS only")):
        with pytest.raises(psycopg.OperationalError, match=said):
            psycopg.connect(
                host=address.host,
                port=address.port,
                user="reader",
                password="wrong",
                options=options,
                replication="true",
                sslmode=mode,
                sslrootcert=str(ca),
            )


def shown_by_postgres(address: Address, ca: Path) -> bytes:
    """The certificate with which an endpoint answers who asks for TLS as libpq does."""
    context = ssl.create_default_context(cafile=ca)
    with socket.create_connection(address, timeout=20) as opened:
        opened.sendall(SSL_REQUEST)
        assert opened.recv(1) == b"S"
        with context.wrap_socket(opened, server_hostname=address.host) as secure:
            return secure.getpeercert(binary_form=True) or b""


def take_backup(url: str) -> bytes:
    """By pg_basebackup, as a tar."""
    build = build_of(TLS_VERSION)
    command = [
        str(build.program("pg_basebackup")),
        "-d",
        url,
        "-c",
        "fast",
        "-X",
        "none",
        "-F",
        "tar",
        "-D",
        "-",
    ]
    environment = program_environment(build.environment())
    taken = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert taken.returncode == 0, taken.stderr
    return taken.stdout


def test_endpoints_show_a_certificate_of_the_installation_where_their_build_can(stack: Stack) -> None:
    """Another than the services', whose key SQL must not read; and a new one without a restart."""
    build_of(TLS_VERSION)
    stack.text("tenant", "create", "old", "--pg-version", str(TLS_VERSION))
    wide = stack.json("endpoint", "create", "wide", "--tenant", "old", "--listen", "0.0.0.0")
    assert wide["url"].endswith("?sslmode=require"), "it may listen there; it is not started here"
    stack.text("endpoint", "create", "secure", "--tenant", "old")
    url = stack.json("endpoint", "start", "secure")["url"]
    assert url.endswith("?sslmode=require")
    files = stack.directory / "tls" / "endpoints"
    verified = url.replace("require", "verify-full") + "&sslrootcert="
    with psycopg.connect(verified + str(files / "ca.pem"), autocommit=True) as connection:
        assert connection.pgconn.ssl_in_use
        row = connection.execute("select pg_read_file(current_setting('ssl_key_file'))").fetchone()
        assert row is not None
        assert row[0] == (files / "server.key").read_text() != (files.parent / "server.key").read_text()
        with pytest.raises(psycopg.errors.UndefinedFile):
            connection.execute("select pg_read_file('server.key')")
    with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
        psycopg.connect(verified + str(files.parent / "ca.pem"))
    # 14's libpq does not look for addresses in a certificate.
    backup = take_backup(url.replace("require", "verify-ca") + f"&sslrootcert={files / 'ca.pem'}")
    with tarfile.open(fileobj=io.BytesIO(backup)) as content:
        names = set(content.getnames())
    assert "backup_label" in names
    assert names.isdisjoint({"server.key", "server.crt", "excimer_admission"})
    assert b"PRIVATE KEY" not in backup
    assert (stack.data_dir("secure").parent / "server.key").stat().st_mode & 0o777 == 0o600
    main = "require" if build_of(NEWEST_VERSION).features.tls else "disable"
    assert stack.json("endpoint", "url", "main")["url"].endswith(f"?sslmode={main}")
    found = {row["check"]: row for row in json.loads(stack.run("--json", "doctor").stdout)["findings"]}
    assert found["certificate"]["verdict"] == found["endpoints' certificate"]["verdict"] == "ok"
    (files / "server.pem").unlink()
    stack.text("start")
    new = ssl.PEM_cert_to_DER_cert((files / "server.pem").read_text())
    address = Address("127.0.0.1", stack.endpoint("secure")["port"])
    stack.wait_until(
        lambda: shown_by_postgres(address, files / "ca.pem") == new, "the new certificate at PostgreSQL"
    )
    in_use = stack.data_dir("secure").parent
    (in_use / "pgdata" / "server.key").write_text("of an older Excimer")
    stack.text("endpoint", "stop", "secure")
    assert not (in_use / "server.key").exists(), "a stopped endpoint needs none"
    stack.text("endpoint", "start", "secure")
    assert stack.json("endpoint", "show", "secure")["start"] == "warm"
    assert not (in_use / "pgdata" / "server.key").exists()
    address = Address("127.0.0.1", stack.endpoint("secure")["port"])
    assert shown_by_postgres(address, files / "ca.pem") == new
    for name in ("wide", "secure"):
        stack.text("endpoint", "stop", name, "--destroy", "--immediate")
    assert not (in_use / "server.key").exists()


def test_a_lost_certificate_is_made_anew_and_loaded_while_all_runs(stack: Stack) -> None:
    certificate = stack.directory / "tls" / "server.pem"
    before = certificate.read_bytes()
    pids = {part: stack.pid(part) for part in ("pageserver", "controller", "safekeeper-1", "broker")}
    certificate.unlink()
    stack.text("start")
    after = certificate.read_bytes()
    assert after != before
    context = ssl.create_default_context(cafile=stack.directory / "tls" / "ca.pem")

    def shown(address: Address) -> bytes:
        with (
            socket.create_connection(address, timeout=20) as opened,
            context.wrap_socket(opened, server_hostname=address.host) as secure,
        ):
            return secure.getpeercert(binary_form=True) or b""

    new = ssl.PEM_cert_to_DER_cert(after.decode())
    for name in ("pageserver.http_listen", "controller.http_listen", "safekeeper-1.proposer_listen"):
        is_new = partial(lambda address: bool(shown(address) == new), listens(stack)[name])
        stack.wait_until(is_new, f"the new certificate at {name}", 15)
    assert {part: stack.pid(part) for part in pids} == pids
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "start", "main")
    assert stack.query("select 1") == [(1,)]
