"""TLS for a connection whose every message somebody waits for: between an `asyncio.Protocol` and its socket.

asyncio's own TLS passes a message through some twenty calls, with an exception at the end of each read; this
one through two, of which one is OpenSSL's (`_native/openssl.pyx`). A commit waits for three messages out and
two in, in an interpreter whose caches are cold.

Not here: waiting for the peer's end of TLS. The connection ends with its socket: messages say where they end.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any, TypeVar, cast

from excimer._native.openssl import TlsConnection, TlsContext

_Inner = TypeVar("_Inner", bound=asyncio.Protocol)


class TlsTransport(asyncio.Transport):
    """What the inner protocol writes to. Native code may use `tls` and the socket in its place, between
    calls: then `write_sealed` sends what the socket did not take, and `read_on` has the protocol look again.
    """

    def __init__(self, tls: TlsConnection, socket_transport: asyncio.Transport) -> None:
        super().__init__()
        self.tls = tls
        self._encrypt = tls.encrypt
        self._send = self.write_sealed = socket_transport.write
        self._socket_transport = socket_transport
        self.abort = socket_transport.abort  # type: ignore[method-assign]
        self.is_closing = socket_transport.is_closing  # type: ignore[method-assign]
        self.pause_reading = socket_transport.pause_reading  # type: ignore[method-assign]
        self.resume_reading = socket_transport.resume_reading  # type: ignore[method-assign]
        self.get_write_buffer_size = socket_transport.get_write_buffer_size  # type: ignore[method-assign]

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._send(self._encrypt(data if type(data) is bytes else bytes(data)))

    def close(self) -> None:
        """Tells the peer, so that it knows that nothing was cut off; does not wait for its answer."""
        if not self.is_closing():
            self._send(self.tls.shutdown())
            self._socket_transport.close()

    def read_on(self) -> None:
        """What native code has fed to TLS is dealt with as if it had just come."""
        cast(TlsProtocol, self._socket_transport.get_protocol()).data_received(b"")

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket_transport.get_extra_info(name, default)


class TlsProtocol(asyncio.Protocol):
    """Either side. The inner protocol is told of the connection after the handshake."""

    def __init__(self, inner: asyncio.Protocol, tls: TlsConnection) -> None:
        self._inner = inner
        self._tls = tls
        self._transport: asyncio.Transport | None = None
        self._is_connected = False
        self.ready: asyncio.Future[asyncio.Transport] = asyncio.get_running_loop().create_future()
        """Has the inner protocol's transport; an OSError, of which SSLError is one, if it came to nothing."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._shake_hands(b"")

    def data_received(self, data: bytes) -> None:
        self._shake_hands(data)
        if self._is_connected:
            self.data_received = self._receive  # type: ignore[method-assign]
            self._receive(b"")  # of the application, perhaps: it is in the connection

    def _receive(self, data: bytes) -> None:
        try:
            plain = self._tls.decrypt(data)
        except ssl.SSLZeroReturnError:
            if not self._inner.eof_received() and self._transport is not None:
                self._transport.close()
            return
        except ssl.SSLError:
            self._flush()
            self._abort()
            return
        if plain:
            self._inner.data_received(plain)
        else:
            self._flush()  # a record that is not whole yet, or one of TLS's own

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._is_connected else None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_connected:
            self._inner.connection_lost(exc)
        elif not self.ready.done():  # nor cancelled
            self.ready.set_exception(exc or ConnectionResetError("the peer closed the connection"))

    def pause_writing(self) -> None:
        if self._is_connected:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._is_connected:
            self._inner.resume_writing()

    def _shake_hands(self, data: bytes) -> None:
        assert self._transport is not None
        if self.ready.done():
            return  # refused or given up
        try:
            is_done = self._tls.handshake(data)
        except ssl.SSLError as error:  # the certificate is not one that we believe, for example
            self._flush()
            self.ready.set_exception(error)
            self._abort()
            return
        self._flush()
        if is_done:
            inner_transport = TlsTransport(self._tls, self._transport)
            self._is_connected = True
            self._inner.connection_made(inner_transport)
            self.ready.set_result(inner_transport)

    def _flush(self) -> None:
        output = self._tls.take_output()
        if output and self._transport is not None:
            self._transport.write(output)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect_tls(make: Callable[[], _Inner], host: str, port: int, context: TlsContext) -> _Inner:
    """Connects a protocol, and returns it after the handshake. Raises OSError. Cancelled, it leaves nothing
    open.
    """
    loop = asyncio.get_running_loop()
    inner = make()
    tls = TlsConnection(context, host)
    transport, protocol = await loop.create_connection(lambda: TlsProtocol(inner, tls), host, port)
    await _wait_ready(transport, protocol)
    return inner


async def accept_tls(
    protocol: asyncio.Protocol, accepted: socket.socket, context: TlsContext
) -> asyncio.Transport:
    """Serves a protocol on an accepted, non-blocking socket; as `connect_tls`."""
    loop = asyncio.get_running_loop()
    transport, tls_protocol = await loop.connect_accepted_socket(
        lambda: TlsProtocol(protocol, TlsConnection(context)), accepted
    )
    return await _wait_ready(transport, tls_protocol)


async def _wait_ready(transport: asyncio.Transport, protocol: TlsProtocol) -> asyncio.Transport:
    is_ready = False
    try:
        inner_transport = await protocol.ready
        is_ready = True
    finally:
        if not is_ready:
            transport.abort()
    return inner_transport
