"""TLS on a blocking socket that one thread reads and others write to.

Python's own SSL sockets are not made for that: OpenSSL's state must not be used by two threads, and a read
that waits would keep the writers out. Here the bytes go through memory: the lock is held while OpenSSL works
on them, never while the socket is waited for.

Not here: the deadline of the handshake (`connections`).
"""

import socket
import ssl
import threading
from typing import cast

from excimer.service.tls import server_tls

_RECEIVE_SIZE_BYTES = 64 << 10


class TlsSocket:
    """The server's side. `receive_into` is one thread's; `send_all` may be anybody's."""

    def __init__(self, accepted: socket.socket, context: ssl.SSLContext) -> None:
        self._socket = accepted
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()
        self._raw = bytearray(_RECEIVE_SIZE_BYTES)
        self._raw_view = memoryview(self._raw)

    def handshake(self) -> None:
        """Blocks. Raises OSError, of which SSLError is one."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fill():
                    raise ConnectionResetError("the peer closed the connection in the handshake") from None
                continue
            except ssl.SSLError:
                self._flush()  # the alert says why
                raise
            self._flush()
            return

    def receive_into(self, buffer: memoryview) -> int:
        """How many bytes came, at least one; 0: the peer has closed. Blocks. Raises OSError."""
        with self._lock:
            is_empty = not self._incoming.pending and not self._tls.pending()
        if is_empty and not self._fill():
            return 0
        while True:
            with self._lock:
                try:
                    return cast(int, self._tls.read(len(buffer), buffer))  # its size, as there is a buffer
                except ssl.SSLWantReadError:
                    self._flush()
                except ssl.SSLZeroReturnError:
                    return 0
            if not self._fill():
                return 0

    def send_all(self, data: bytes | memoryview) -> None:
        """Raises OSError."""
        with self._lock:
            self._tls.write(data)
            self._flush()

    def _fill(self) -> bool:
        size = self._socket.recv_into(self._raw)
        if size:
            with self._lock:
                self._incoming.write(self._raw_view[:size])
        return size > 0

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())


def accept_tls(accepted: socket.socket) -> TlsSocket | None:
    """For a blocking socket, before its handshake; None: this process has no TLS."""
    context = server_tls()
    return None if context is None else TlsSocket(accepted, context)
