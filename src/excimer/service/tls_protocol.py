"""TLS for a connection whose every message somebody waits for: between an `asyncio.Protocol` and its socket.

asyncio's own TLS passes a message through some twenty calls, with an exception at the end of each read; this
one through five. A commit waits for three messages out and two in, in an interpreter whose caches are cold.

Not here: the shutdown of TLS. The connection ends with its socket, as frames say where they end.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

_READ_SIZE_BYTES = 256 << 10


class _TlsTransport(asyncio.Transport):
    """What the inner protocol writes to."""

    def __init__(self, owner: "TlsProtocol", socket_transport: asyncio.Transport) -> None:
        super().__init__()
        self._owner = owner
        self._socket_transport = socket_transport
        self.close = socket_transport.close  # type: ignore[method-assign]
        self.abort = socket_transport.abort  # type: ignore[method-assign]
        self.is_closing = socket_transport.is_closing  # type: ignore[method-assign]
        self.pause_reading = socket_transport.pause_reading  # type: ignore[method-assign]
        self.resume_reading = socket_transport.resume_reading  # type: ignore[method-assign]

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._owner.encrypt(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket_transport.get_extra_info(name, default)


class TlsProtocol(asyncio.Protocol):
    """The client's side. The inner protocol is told of the connection after the handshake."""

    def __init__(self, inner: asyncio.Protocol, context: ssl.SSLContext, server_hostname: str) -> None:
        self._inner = inner
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._transport: asyncio.Transport | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the inner protocol has its connection; an OSError, of which SSLError is one, if not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._shake_hands()

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        if not self.ready.done():
            self._shake_hands()
            if not self.ready.done():
                return
        try:
            while self._incoming.pending or self._tls.pending():
                self._inner.data_received(self._tls.read(_READ_SIZE_BYTES))
        except ssl.SSLWantReadError:
            self._flush()  # a record that is not whole yet, or one of TLS's own
        except ssl.SSLError:
            self._abort()

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self.ready.done() else None

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(exc or ConnectionResetError("the peer closed the connection"))
        elif self.ready.exception() is None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def encrypt(self, data: bytes | bytearray | memoryview) -> None:
        self._tls.write(data)
        self._flush()

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:  # the certificate is not one that we believe, for example
            self._flush()
            self.ready.set_exception(error)
            self._abort()
            return
        self._flush()
        assert self._transport is not None
        self._inner.connection_made(_TlsTransport(self, self._transport))
        self.ready.set_result(None)

    def _flush(self) -> None:
        if self._outgoing.pending and self._transport is not None:
            self._transport.write(self._outgoing.read())

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect_tls(
    make: Callable[[], asyncio.Protocol], host: str, port: int, context: ssl.SSLContext
) -> None:
    """Connects a protocol; returns after the handshake. Raises OSError. Cancelled, it leaves nothing open."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(lambda: TlsProtocol(make(), context, host), host, port)
    is_ready = False
    try:
        await protocol.ready
        is_ready = True
    finally:
        if not is_ready:
            transport.abort()
