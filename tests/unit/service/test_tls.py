"""TLS on every kind of port and client: who is believed, what is refused, how certificates are replaced."""

import asyncio
import contextlib
import datetime
import os
import random
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from excimer._native.channel import TlsChannel
from excimer._native.openssl import TlsConnection
from excimer.base.address import Address
from excimer.broker.nats_config import nats_config
from excimer.broker.settings import BrokerSettings
from excimer.cli.certificates import certificate_files, end_of_certificate, make_certificates
from excimer.cli.commands.doctor import check_certificate
from excimer.service import tls
from excimer.service.accept import accept_connections, open_streams
from excimer.service.blocking_http import http_connection
from excimer.service.connections import Admission, ConnectionGate, ConnectionLimits
from excimer.service.health import Health
from excimer.service.http import create_app, serving_http
from excimer.service.http_client import HttpClient, UnreachableError
from excimer.service.light_http import serving_light_http
from excimer.service.listen import ListenError, bind_listen, bound_address
from excimer.service.postgres_tls import SSL_REQUEST, open_postgres_streams
from excimer.service.settings import TlsSettings, load_settings, save_settings
from excimer.service.tasks import TaskScope, running
from excimer.service.tls import TlsFilesError, client_tls, configure_tls
from excimer.service.tls_protocol import connect_tls
from tests.kit.tls import let_expire, new_tls, using_tls


@contextlib.asynccontextmanager
async def health_server(is_light: bool, limits: ConnectionLimits | None = None) -> AsyncIterator[Address]:
    health = Health("test", ready=True)
    limits = limits or ConnectionLimits()
    if is_light:
        async with serving_light_http("127.0.0.1:0", health, lambda: b"", limits) as address:
            yield address
    else:
        app = create_app("test", "1", health, CollectorRegistry(), verifier=None)
        async with serving_http(app, "127.0.0.1:0", "test", limits) as address:
            yield address


async def status(address: Address) -> str:
    return str((await HttpClient("x", str(address), timeout_s=20).get("/healthz"))["status"])


@pytest.mark.parametrize("is_light", [True, False])
@pytest.mark.parametrize("asks_clients", [True, False])
def test_http_over_tls(tmp_path: Path, is_light: bool, asks_clients: bool) -> None:
    async def main() -> None:
        with using_tls(new_tls(tmp_path, asks_clients=asks_clients)):
            async with health_server(is_light) as address:
                assert await status(address) == "ok"
                assert await asyncio.to_thread(_blocking_status, address) == 200
                reader, writer = await asyncio.open_connection(*address)  # in clear
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                with contextlib.suppress(ConnectionError):
                    answer = await asyncio.wait_for(reader.read(), 30)
                assert b"HTTP" not in answer
                writer.close()

    asyncio.run(main())


def _blocking_status(address: Address) -> int:
    with contextlib.closing(http_connection(str(address), 20)) as connection:
        connection.request("GET", "/healthz")
        return int(connection.getresponse().status)


def test_a_server_of_another_ca_or_for_another_host_is_not_believed(tmp_path: Path) -> None:
    ours = new_tls(tmp_path / "ours")
    other = new_tls(tmp_path / "other")
    named = new_tls(tmp_path / "named", "elsewhere.example")

    async def main() -> None:
        for wrong, problem in (
            (
                TlsSettings(certificate=other.certificate, key=other.key, ca=ours.ca),
                "unable to get local issuer",
            ),
            (named, "IP address mismatch"),
        ):
            with using_tls(wrong):
                async with health_server(is_light=True) as address:
                    with pytest.raises(UnreachableError, match=problem):
                        await status(address)

    asyncio.run(main())


def test_an_expired_certificate_is_refused_and_named(tmp_path: Path) -> None:
    """By who calls, in one line; and `doctor` says so, and weeks before."""
    settings = new_tls(tmp_path)
    now = datetime.datetime.now(datetime.UTC)
    assert check_certificate(settings.certificate, now).verdict == "ok"
    let_expire(settings, -datetime.timedelta(days=20, minutes=1))
    soon = check_certificate(settings.certificate, now)
    assert soon.verdict == "warning"
    assert "in 20 days" in soon.detail
    let_expire(settings)

    async def main() -> None:
        with using_tls(settings):
            async with health_server(is_light=True) as address:
                with pytest.raises(UnreachableError, match="certificate has expired") as refused:
                    await status(address)
                assert "\n" not in str(refused.value)
                assert str(address) in str(refused.value)

    asyncio.run(main())
    late = check_certificate(settings.certificate, now)
    assert late.verdict == "problem"
    other = check_certificate(settings.certificate, now, name="another", harm="clients go away")
    assert (other.check, other.detail.partition(": ")[2]) == ("another", "clients go away")
    assert str(settings.certificate) in late.detail
    settings.certificate.write_text("junk")
    assert check_certificate(settings.certificate, now).verdict == "problem"


def test_a_client_without_a_certificate_is_refused_where_one_is_asked_for(tmp_path: Path) -> None:
    ours = new_tls(tmp_path / "ours", asks_clients=True)
    stranger = new_tls(tmp_path / "other")

    async def main() -> None:
        with using_tls(ours):
            async with health_server(is_light=True) as address:
                for with_certificate in (False, True):
                    context = ssl.create_default_context(cafile=ours.ca)
                    if with_certificate:
                        context.load_cert_chain(stranger.certificate, stranger.key)
                    with contextlib.suppress(OSError):
                        reader, writer = await asyncio.open_connection(*address, ssl=context)
                        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                        assert b"HTTP" not in await asyncio.wait_for(reader.read(), 30)
                        writer.close()
                assert await status(address) == "ok"

    asyncio.run(main())


def test_certificates_are_loaded_while_running_and_bad_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tls, "LOOK_INTERVAL_S", 0.0)
    settings = new_tls(tmp_path / "used")
    replacement = new_tls(tmp_path / "other")

    async def certificate_of(address: Address, ca: Path) -> bytes:
        context = ssl.create_default_context(cafile=ca)
        _, writer = await asyncio.open_connection(*address, ssl=context)
        found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return found

    async def main() -> None:
        with using_tls(settings):
            async with health_server(is_light=True) as address:
                first = await certificate_of(address, settings.ca)
                settings.certificate.write_text("no certificate")
                assert await certificate_of(address, settings.ca) == first
                assert await certificate_of(address, settings.ca) == first
                assert capsys.readouterr().err.count("is of no use, the old one stays") == 1
                shutil.copy(replacement.certificate, settings.certificate)
                assert await certificate_of(address, settings.ca) == first, "half of a pair"
                shutil.copy(replacement.key, settings.key)
                shutil.copy(replacement.ca, settings.ca)
                assert await certificate_of(address, replacement.ca) != first
                assert await status(address) == "ok"

    asyncio.run(main())


def test_files_are_looked_at_once_a_second_at_most(tmp_path: Path) -> None:
    now = 100.0
    found = tls.Tls(new_tls(tmp_path), clock=lambda: now)
    before = found.server()
    make_certificates(tmp_path, ("127.0.0.1", "other.example"))
    assert found.server() is before
    now = 101.0
    assert found.server() is not before


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = new_tls(tmp_path / "good")
    other = new_tls(tmp_path / "other")
    (tmp_path / "junk").write_text("junk")
    for wrong, named in (
        (TlsSettings(certificate=tmp_path / "none", key=good.key, ca=good.ca), "cannot read .*none"),
        (TlsSettings(certificate=good.certificate, key=other.key, ca=good.ca), "cannot be used for TLS"),
        (TlsSettings(certificate=good.certificate, key=good.key, ca=tmp_path / "junk"), "junk"),
    ):
        with pytest.raises(TlsFilesError, match=named):
            configure_tls(wrong)


def test_settings_have_one_block(tmp_path: Path) -> None:
    settings = BrokerSettings(
        data_dir=tmp_path,
        listen="127.0.0.1:1",
        http_listen="127.0.0.1:2",
        user="u",
        password="p",
        tls=new_tls(tmp_path / "tls", asks_clients=True),
    )
    save_settings(tmp_path / "s.toml", settings)
    assert load_settings(tmp_path / "s.toml", BrokerSettings) == settings
    written = nats_config(settings, 5)
    assert 'min_version: "1.3"' in written
    assert "verify: true" in written


def test_other_than_loopback_needs_tls(tmp_path: Path) -> None:
    for listen in ("0.0.0.0:0", "[::]:0"):
        with pytest.raises(ListenError, match=r"http_listen: .* is not a loopback address.* block `tls`"):
            bind_listen(listen, "http_listen")
    bind_listen("127.0.0.1:0", "http_listen").close()
    with using_tls(new_tls(tmp_path)):
        bind_listen("0.0.0.0:0", "http_listen").close()


@pytest.mark.parametrize("is_light", [True, False])
def test_a_handshake_is_within_the_deadline(tmp_path: Path, is_light: bool) -> None:
    async def main() -> None:
        with using_tls(new_tls(tmp_path)):
            async with health_server(is_light, ConnectionLimits(handshake_s=0.3)) as address:
                reader, writer = await asyncio.open_connection(*address)
                started = time.monotonic()
                for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200):
                    if reader.at_eof() or writer.is_closing():
                        break
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.05)
                assert time.monotonic() - started < 8
                writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_before_the_handshake(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        with using_tls(new_tls(tmp_path)):
            async with health_server(is_light=bool(seed % 2)) as address:
                for _ in range(30):
                    reader, writer = await asyncio.open_connection(*address)
                    begin = b"\x16\x03\x01" if chance.random() < 0.5 else b""
                    writer.write(begin + chance.randbytes(chance.randrange(300)))
                    writer.write_eof()
                    with contextlib.suppress(ConnectionError):
                        await asyncio.wait_for(reader.read(), 30)
                    writer.close()
                assert await status(address) == "ok"

    asyncio.run(main())


class _Collector(asyncio.Protocol):
    """What a peer of a safekeeper is, to `connect_tls`."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()
        self.arrived = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.arrived.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


def test_a_blocking_socket_that_several_threads_write_to(tmp_path: Path) -> None:
    """Against the protocol of the other side, in all sizes; nothing is lost or mixed up."""
    settings = new_tls(tmp_path)
    sizes = [1, 100, 16_383, 16_384, 16_385, 300_000, 1]
    contexts = tls.Tls(settings)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        echoed = threading.Event()

        def serve() -> None:
            accepted, _ = listening.accept()
            with accepted:
                channel = TlsChannel(accepted.fileno(), TlsConnection(contexts.native_server()))
                channel.handshake()
                writers = [
                    threading.Thread(target=channel.send_all, args=(bytes([65 + number]) * 50_000,))
                    for number in range(4)
                ]
                for writer in writers:
                    writer.start()
                buffer = memoryview(bytearray(70_000))
                left = sum(sizes)
                while left:
                    size = channel.receive_into(buffer)
                    assert size
                    channel.send_all(bytes(buffer[:size]))
                    left -= size
                for writer in writers:
                    writer.join()
                echoed.set()
                assert channel.receive_into(buffer) == 0

        thread = threading.Thread(target=serve)
        thread.start()

        async def main() -> None:
            collector = _Collector()
            host, port = listening.getsockname()
            await connect_tls(lambda: collector, host, port, contexts.native_client())
            assert collector.transport is not None
            sent = b"".join(bytes([number]) * size for number, size in enumerate(sizes))
            position = 0
            for size in sizes:
                collector.transport.write(sent[position : position + size])
                position += size
            async with asyncio.timeout(60):
                while len(collector.received) < len(sent) + 200_000:
                    collector.arrived.clear()
                    await collector.arrived.wait()
            assert bytes(byte for byte in collector.received if byte < 65) == sent
            for number in range(4):
                assert collector.received.count(65 + number) == 50_000
            collector.transport.close()
            await asyncio.wait_for(collector.lost.wait(), 30)

        asyncio.run(main())
        thread.join(30)
        assert echoed.is_set()


def test_a_peer_does_not_believe_everybody(tmp_path: Path) -> None:
    stranger, ours = new_tls(tmp_path / "stranger"), new_tls(tmp_path / "ours")

    async def main() -> None:
        with using_tls(stranger):
            async with health_server(is_light=True) as address:
                with pytest.raises(ssl.SSLCertVerificationError):
                    await connect_tls(_Collector, *address, tls.Tls(ours).native_client())
        silent = bind_listen("127.0.0.1:0", "silent")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await connect_tls(_Collector, *bound_address(silent), tls.Tls(ours).native_client())
        silent.close()

    asyncio.run(main())


@contextlib.asynccontextmanager
async def postgres_port() -> AsyncIterator[Address]:
    """Echoes one line."""
    gate = ConnectionGate("test", ConnectionLimits(handshake_s=5))
    with bind_listen("127.0.0.1:0", "test") as bound:
        async with TaskScope() as scope:

            async def serve(admission: Admission) -> None:
                streams = await open_postgres_streams(admission)
                if streams is not None:
                    streams[1].write(await streams[0].readline())
                    streams[1].close()
                else:
                    admission.socket.close()
                admission.release()

            def accepted(admission: Admission) -> None:
                scope.contain("connection", serve(admission))

            async with running("accept", accept_connections(bound, gate, accepted)):
                yield bound_address(bound)


@pytest.mark.parametrize("is_asked", [True, False])
def test_postgres_clients_may_ask_for_tls_first(tmp_path: Path, is_asked: bool) -> None:
    async def main() -> None:
        with using_tls(new_tls(tmp_path)):
            async with postgres_port() as address:
                context = client_tls()
                assert context is not None
                if is_asked:
                    reader, writer = await asyncio.open_connection(*address)
                    for byte in SSL_REQUEST:
                        writer.write(bytes([byte]))
                        await asyncio.sleep(0.005)
                    assert await reader.readexactly(1) == b"S"
                    await writer.start_tls(context, server_hostname=address.host)
                else:
                    reader, writer = await asyncio.open_connection(*address, ssl=context)
                writer.write(b"hello\n")
                assert await asyncio.wait_for(reader.readline(), 30) == b"hello\n"
                writer.close()
                reader, writer = await asyncio.open_connection(*address)
                writer.write(b"\x00\x00\x00\x29\x00\x03\x00\x00user\x00")
                assert b"TLS only" in await asyncio.wait_for(reader.read(), 30)
                writer.close()

    asyncio.run(main())


def test_plain_streams_without_tls() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(b"hello\n")
        gate = ConnectionGate("test", ConnectionLimits())
        ours.setblocking(False)
        reader, writer = await open_streams(gate.admit(ours))
        assert await reader.readline() == b"hello\n"
        writer.close()
        gate.close()
        theirs.close()

    asyncio.run(main())


def test_an_installation_s_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_certificates(tmp_path)
    before = [path.read_bytes() for path in files]
    assert files == certificate_files(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert [path.read_bytes() for path in make_certificates(tmp_path)] == before, "what is good stays"
    end = end_of_certificate(files.certificate)
    assert end is not None
    import excimer.cli.certificates as certificates

    monkeypatch.setattr(certificates, "RENEW_BEFORE", certificates.LIFE)
    renewed = make_certificates(tmp_path)
    assert [path.read_bytes() for path in renewed][:2] == before[:2], "the CA stays"
    assert renewed.certificate.read_bytes() != before[2]
    os.truncate(files.certificate, 100)
    assert end_of_certificate(files.certificate) is None
    make_certificates(tmp_path)
    assert end_of_certificate(files.certificate) is not None


def test_no_connection_to_a_service_forgets_tls() -> None:
    """What connects without it is named here, with its reason."""
    plain = {
        "service/tls_protocol.py": "is the TLS",
        "service/blocking_http.py": "chooses",
        "compute/safekeeper_peer.py": "chooses",
        "service/replication_client.py": "chooses",
    }
    source = Path(tls.__file__).parent.parent
    calls = re.compile(
        r"\b(open_connection|create_connection|HTTPConnection)\(([^()]|\(([^()]|\([^()]*\))*\))*\)"
    )
    forgetful = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        for call in calls.finditer(path.read_text())
        if "ssl=" not in call[0]
    }
    assert forgetful == set(plain)
