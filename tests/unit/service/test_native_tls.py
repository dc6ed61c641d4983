"""OpenSSL called natively: it believes and refuses what Python's own `ssl` does, and speaks with it."""

import asyncio
import contextlib
import itertools
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from excimer._native.channel import Channel, TlsChannel
from excimer._native.openssl import TlsConnection, TlsContext
from excimer.service.settings import TlsSettings
from excimer.service.tls import Tls
from excimer.service.tls_protocol import connect_tls
from tests.kit.openssl_peer import KEY_UPDATE_NOT_REQUESTED, KEY_UPDATE_REQUESTED, OpenSslClient
from tests.kit.tls import let_expire, new_tls

LIMIT_S = 60.0


def _good(directory: Path) -> TlsSettings:
    return new_tls(directory)


def _of_a_name(directory: Path) -> TlsSettings:
    return new_tls(directory, "localhost")


def _for_another_host(directory: Path) -> TlsSettings:
    return new_tls(directory, "elsewhere.example", "127.0.0.2")


def _of_a_foreign_ca(directory: Path) -> TlsSettings:
    foreign = new_tls(directory / "foreign")
    return TlsSettings(certificate=foreign.certificate, key=foreign.key, ca=new_tls(directory).ca)


def _expired(directory: Path) -> TlsSettings:
    settings = new_tls(directory)
    let_expire(settings)
    return settings


CASES: tuple[tuple[Callable[[Path], TlsSettings], str, str | None], ...] = (
    (_good, "127.0.0.1", None),
    (_good, "localhost", None),
    (_of_a_name, "localhost", None),
    (_of_a_name, "127.0.0.1", "IP address mismatch"),
    (_for_another_host, "localhost", "[Hh]ostname mismatch"),
    (_for_another_host, "127.0.0.1", "IP address mismatch"),
    (_of_a_foreign_ca, "127.0.0.1", "unable to get local issuer certificate"),
    (_expired, "127.0.0.1", "certificate has expired"),
)


@contextlib.contextmanager
def served(
    context: ssl.SSLContext | TlsContext, answers: Callable[[Channel | ssl.SSLSocket], None]
) -> Iterator[int]:
    """One connection after another is given to `answers`, in a thread; a failed handshake is passed over."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                accepted, _ = listening.accept()
                with accepted, contextlib.suppress(OSError):
                    accepted.settimeout(None)
                    if not isinstance(context, TlsContext):
                        with context.wrap_socket(accepted, server_side=True) as secure:
                            answers(secure)
                        continue
                    channel = TlsChannel(accepted.fileno(), TlsConnection(context))
                    try:
                        channel.handshake()
                        answers(channel)
                    finally:
                        channel.close()
                if is_over.is_set():
                    return

        is_over = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            is_over.set()
            socket.create_connection(listening.getsockname()).close()
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def _say_hello(peer: Channel | ssl.SSLSocket) -> None:
    if isinstance(peer, Channel):
        peer.send_all(b"hello")
    else:
        peer.sendall(b"hello")
    buffer = bytearray(10)
    _ = peer.receive_into(buffer) if isinstance(peer, Channel) else peer.recv_into(buffer)


class _Hello(asyncio.Protocol):
    def __init__(self) -> None:
        self.said = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.said.set_result(data)


async def _hear_natively(context: TlsContext, host: str, port: int) -> bytes:
    hello = await connect_tls(_Hello, host, port, context)
    heard: bytes = await hello.said
    hello.transport.close()
    return heard


async def _hear(context: ssl.SSLContext, host: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    heard = await reader.readexactly(5)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return heard


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(("make", "host", "problem"), CASES)
def test_the_native_client_believes_whom_python_does(
    tmp_path: Path, is_native: bool, make: Callable[[Path], TlsSettings], host: str, problem: str | None
) -> None:
    """The same table for either: what the one refuses, the other does, for the same reason."""
    contexts = Tls(make(tmp_path))
    with served(contexts.server(), _say_hello) as port:
        heard = (
            _hear_natively(contexts.native_client(), host, port)
            if is_native
            else _hear(contexts.client(), host, port)
        )
        if problem is None:
            assert asyncio.run(asyncio.wait_for(heard, LIMIT_S)) == b"hello"
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match=problem):
                asyncio.run(asyncio.wait_for(heard, LIMIT_S))


@pytest.mark.parametrize("name", ["", ".localhost", "local\0host"])
def test_a_server_without_a_name_is_not_called(tmp_path: Path, name: str) -> None:
    """An empty name would switch OpenSSL's check off."""
    with pytest.raises(ValueError, match="no server can be named"):
        TlsConnection(Tls(new_tls(tmp_path)).native_client(), name)
    with pytest.raises(ValueError, match="give a CA"):
        TlsContext(is_server=False)


def test_the_native_server_speaks_tls_1_3_and_the_protocols_that_are_asked_for(tmp_path: Path) -> None:
    settings = new_tls(tmp_path)
    with served(Tls(settings).native_server(), _say_hello) as port:
        for offered, chosen in (
            (["postgresql"], "postgresql"),
            (["h2", "http/1.1"], "http/1.1"),
            (["h2"], None),
        ):
            context = ssl.create_default_context(cafile=settings.ca)
            context.set_alpn_protocols(offered)
            with context.wrap_socket(
                socket.create_connection(("127.0.0.1", port)), server_hostname="localhost"
            ) as secure:
                assert secure.recv(5) == b"hello"
                assert secure.version() == "TLSv1.3"
                assert secure.selected_alpn_protocol() == chosen
        old = ssl.create_default_context(cafile=settings.ca)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            pytest.raises(ssl.SSLError, match="protocol version"),
        ):
            old.wrap_socket(plain, server_hostname="localhost")


def test_the_native_server_asks_for_a_certificate_where_one_is_wanted(tmp_path: Path) -> None:
    ours = new_tls(tmp_path / "ours", asks_clients=True)
    stranger = new_tls(tmp_path / "stranger")
    tls = Tls(ours)
    with served(tls.native_server(), _say_hello) as port:
        for shown, is_let_in in ((None, False), (stranger, False), (ours, True)):
            context = ssl.create_default_context(cafile=ours.ca)
            if shown is not None:
                context.load_cert_chain(shown.certificate, shown.key)
            said = b""
            with (
                contextlib.suppress(ssl.SSLError),
                socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as secure,
            ):
                said = secure.recv(5)
            assert (said == b"hello") == is_let_in
        heard = _hear_natively(tls.native_client(), "127.0.0.1", port)
        assert asyncio.run(asyncio.wait_for(heard, LIMIT_S)) == b"hello", "the native client shows its own"


@pytest.mark.parametrize("is_secure", [True, False])
def test_a_channel_ends_as_its_peer_does_and_sends_nothing_once_closed(
    tmp_path: Path, is_secure: bool
) -> None:
    settings = new_tls(tmp_path)
    contexts = Tls(settings)
    ours, theirs = socket.socketpair()
    received: list[int] = []
    has_come = threading.Event()
    with ours, theirs:
        channel = (
            TlsChannel(ours.fileno(), TlsConnection(contexts.native_server()))
            if is_secure
            else Channel(ours.fileno())
        )

        def serve() -> None:
            if isinstance(channel, TlsChannel):
                channel.handshake()
            buffer = bytearray(100)
            while size := channel.receive_into(buffer):
                received.append(size)
                has_come.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        peer = contexts.client().wrap_socket(theirs, server_hostname="localhost") if is_secure else theirs
        peer.sendall(b"x" * 250)
        assert has_come.wait(LIMIT_S), "nothing came, or the handshake failed"
        assert channel.send_all(b"seen")
        assert peer.recv(10) == b"seen"
        if isinstance(peer, ssl.SSLSocket):
            peer.setblocking(False)
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.unwrap()  # says that it has ended TLS; the answer is not waited for
        else:
            peer.close()
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        peer.close()
        assert sum(received) == 250
        assert max(received) <= 100
        channel.close()
        other, end = socket.socketpair()
        with other, end:
            assert not channel.send_all(b"lost"), "its descriptor may be another's by now"


def test_a_channel_follows_new_keys_and_tells_what_is_wrong(tmp_path: Path) -> None:
    """Its buffer is smaller than a record, so one that is not whole waits in between."""
    settings = new_tls(tmp_path)
    context = TlsContext(
        is_server=True, certificate=settings.certificate, key=settings.key, records_per_key=2
    )
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.closing(OpenSslClient(settings.ca)) as client:
        channel = TlsChannel(ours.fileno(), TlsConnection(context))
        thread = threading.Thread(target=channel.handshake, daemon=True)
        thread.start()
        is_done = client.handshake()
        while not is_done:
            theirs.sendall(client.take_output())
            is_done = client.handshake(theirs.recv(1 << 16))
        theirs.sendall(client.take_output())
        thread.join(LIMIT_S)
        buffer = bytearray(100)
        for number in range(7):
            sent = bytes([number]) * 250
            client.update_key(KEY_UPDATE_REQUESTED if number % 2 else KEY_UPDATE_NOT_REQUESTED)
            theirs.sendall(client.encrypt(sent))
            received = b""
            while len(received) < len(sent):
                received += buffer[: channel.receive_into(buffer)]
            assert received == sent
            assert channel.send_all(sent)
            heard = b""
            while len(heard) < len(sent):
                heard += client.decrypt(theirs.recv(1 << 16))
            assert heard == sent
        record = bytearray(client.encrypt(b"pay 1"))
        record[-1] ^= 1
        theirs.sendall(record)
        with pytest.raises(ssl.SSLError, match="bad record mac"):
            channel.receive_into(buffer)
        assert len(theirs.recv(1 << 16)) == 5 + 2 + 1 + 16, "an alert"
        assert not channel.send_all(b"paid")
        assert theirs.recv(1) == b"", "and the end"


def _connected(contexts: Tls) -> tuple[TlsConnection, TlsConnection]:
    """Server and client after their handshake, without a socket between them."""
    server = TlsConnection(contexts.native_server())
    client = TlsConnection(contexts.native_client(), "localhost")
    is_done = client.handshake()
    while not is_done:
        server.handshake(client.take_output())
        is_done = client.handshake(server.take_output())
    assert server.handshake(client.take_output())
    return server, client


@pytest.mark.parametrize("size", [1, 4096, 16_384, 16_385, 100_000])
def test_nothing_that_has_come_waits_for_what_comes_later(tmp_path: Path, size: int) -> None:
    """Wherever the network cuts a record: when its last byte is here, all of it is given out."""
    server, client = _connected(Tls(new_tls(tmp_path)))
    chance = random.Random(size)
    for _ in range(30):
        sent = chance.randbytes(size)
        wire = client.encrypt(sent)
        cuts = sorted(chance.randrange(len(wire) + 1) for _ in range(chance.randrange(4)))
        pieces = [wire[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(wire)])]
        assert b"".join(server.decrypt(piece) for piece in pieces) == sent


def test_a_damaged_record_ends_the_connection(tmp_path: Path) -> None:
    server, client = _connected(Tls(new_tls(tmp_path)))
    record = bytearray(client.encrypt(b"pay 1"))
    record[-20] ^= 1
    with pytest.raises(ssl.SSLError, match="bad record mac"):
        server.decrypt(bytes(record))
    for _ in range(2):
        with pytest.raises(ssl.SSLError):
            server.decrypt(client.encrypt(b"pay 2"))
