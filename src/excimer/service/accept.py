"""Accepting connections, in one way for all ports of all services.

A loop that is given nothing but connections still has its turns: a few are accepted at a time. When the
process, or the machine, is out of descriptors or memory, the connection that has waited longest for its
authentication goes, and accepting pauses for a moment; nothing ends, nothing spins.

Not here: who may stay (`connections`).
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Final, Never

from excimer.service.connections import Admission, ConnectionGate
from excimer.service.logs import get_logger
from excimer.service.tls import native_server_tls, server_tls
from excimer.service.tls_protocol import accept_tls

ACCEPTED_AT_ONCE_MAX: Final = 16
PAUSE_S: Final = 0.1
"""How long nothing is accepted when descriptors have run out."""
KEEPALIVE_IDLE_S: Final = 60
KEEPALIVE_INTERVAL_S: Final = 15
KEEPALIVE_COUNT: Final = 4
_NOTHING_TO_ACCEPT: Final = (BlockingIOError, InterruptedError)
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = get_logger(__name__)


async def accept_connections(
    listening: socket.socket, gate: ConnectionGate, accepted: Callable[[Admission], None]
) -> Never:
    """Calls `accepted` on the event loop with each new connection, until cancelled.

    The admission's socket is non-blocking, sends without delay, and notices a dead peer within two minutes.
    Whoever gets it releases the admission and closes the socket. Returns only by cancellation.
    """
    acceptor = _Acceptor(listening, gate, accepted)
    acceptor.listen()
    try:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets this event")
    finally:
        acceptor.stop()


class _Acceptor:
    def __init__(
        self, listening: socket.socket, gate: ConnectionGate, accepted: Callable[[Admission], None]
    ) -> None:
        self._listening = listening
        self._gate = gate
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listening, self._accept_some)

    def stop(self) -> None:
        self._gate.close()
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(ValueError, OSError):  # the socket may have been closed already
            self._loop.remove_reader(self._listening)

    def _accept_some(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE_MAX):
            try:
                connection, _ = self._listening.accept()
            except _NOTHING_TO_ACCEPT:
                return
            except ConnectionError:
                continue  # it has gone while it waited
            except OSError as error:
                self._pause(error)
                return
            self._prepare(connection)
            self._accepted(self._gate.admit(connection))

    def _pause(self, error: OSError) -> None:
        if error.errno in _EXHAUSTED:
            self._gate.evict_oldest()
        log.error("connections cannot be accepted", port=self._gate.what, error=error, wait_s=PAUSE_S)
        self._loop.remove_reader(self._listening)
        self._timer = self._loop.call_later(PAUSE_S, self.listen)

    def _prepare(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # it may have gone already; then reading says so
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


async def serve_protocol(admission: Admission, protocol: asyncio.BaseProtocol) -> None:
    """Gives an accepted connection, after its TLS handshake, to `protocol`, which releases the admission when
    it has lost it. What ends earlier is released here.
    """
    loop = asyncio.get_running_loop()
    is_connected = False
    try:
        await loop.connect_accepted_socket(lambda: protocol, admission.socket, ssl=server_tls())
        is_connected = True
    except OSError as error:
        log.info("connection lost before it was served", port=admission.port, error=error)
    finally:
        if not is_connected:
            admission.release()
            admission.socket.close()


async def open_streams(
    admission: Admission, buffer_size_bytes: int = 1 << 16
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """asyncio's streams over an accepted socket. Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(buffer_size_bytes, loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    context = native_server_tls()
    if context is None:
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, admission.socket)
    else:
        transport = await accept_tls(protocol, admission.socket, context)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
