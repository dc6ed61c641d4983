"""TLS on a port of PostgreSQL's protocol: stock clients first ask for it in clear, ours begin with it.

::

    SSLRequest  -> 'S', then TLS     libpq with sslmode=require and stronger
    TLS at once                      libpq with sslnegotiation=direct; our own readers
    anything else                    an error in clear

Not here: everything after the handshake.
"""

import asyncio
import contextlib
import socket
import struct
from typing import Final

from excimer.service.accept import open_streams
from excimer.service.connections import Admission
from excimer.service.tls import has_tls
from excimer.wire import pg_messages as pg

SSL_REQUEST: Final = struct.pack("!II", 8, 80877103)
_TLS_HANDSHAKE: Final = 0x16
_STARTUP_SIZE_BYTES_MAX: Final = 1 << 16
_POLL_S: Final = 0.01
_REFUSAL: Final = "this port speaks TLS only: connect with sslmode=verify-full"


async def open_postgres_streams(
    admission: Admission,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """`open_streams` after what comes before TLS; None: the client has not asked for TLS, and was told so.

    Raises OSError.
    """
    if not has_tls():
        return await open_streams(admission)
    begin = await _peek(admission.socket)
    if begin[:1] == bytes([_TLS_HANDSHAKE]):
        return await open_streams(admission)
    if begin == SSL_REQUEST:
        admission.socket.recv(len(SSL_REQUEST))
        admission.socket.send(b"S")
        return await open_streams(admission)
    if begin:
        with contextlib.suppress(OSError):
            admission.socket.recv(_STARTUP_SIZE_BYTES_MAX)  # unread bytes would make the end a reset
            admission.socket.send(pg.encode_error(_REFUSAL, "28000", severity="FATAL"))
    return None


async def _peek(connection: socket.socket) -> bytes:
    """The first 8 bytes, left where they are; fewer if TLS begins, or the peer closes.

    The admission's deadline ends it.
    """
    loop = asyncio.get_running_loop()
    while True:
        readable = asyncio.Event()
        loop.add_reader(connection, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(connection)
        begin = connection.recv(len(SSL_REQUEST), socket.MSG_PEEK)
        if len(begin) in (0, len(SSL_REQUEST)) or begin[0] == _TLS_HANDSHAKE:
            return begin
        await asyncio.sleep(_POLL_S)
