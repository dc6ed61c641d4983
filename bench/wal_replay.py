"""WAL that PostgreSQL wrote earlier, sent again over its replication protocol, up to a point of our choice.

It stands for a safekeeper that always has everything at hand, so that what is measured is the receiver:
the bytes are in memory, go out in messages of 128 KiB as a walsender's do, and stop where `release` says,
exactly.

Not here: what a receiver asks besides START_REPLICATION, and its reports, which are read and dropped.
"""

import contextlib
import re
import socket
import struct
import threading
from types import TracebackType

from bench.pgbench import BenchFailedError
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.wire.pg_messages import encode_copy_data
from excimer.wire.replication import wal_data_head

MESSAGE_BYTES = 128 << 10
_AUTHENTICATED_AND_READY = b"R\0\0\0\x08\0\0\0\0" + b"Z\0\0\0\x05I"
_COPY_BOTH = b"W\0\0\0\x07\0\0\0"
_START = re.compile(rb"START_REPLICATION .*?([0-9A-Fa-f]+/[0-9A-Fa-f]+)")


class WalReplay:
    """A server on a port of its own; every connection may begin anywhere in the WAL. End it with `with`."""

    def __init__(self, wal: bytes, start_lsn: Lsn) -> None:
        self._wal = memoryview(wal)
        self._start_lsn = start_lsn
        self._released_lsn = start_lsn
        self._changed = threading.Condition()
        self._closed = False
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="wal replay", daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> "WalReplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for each in (self._listening, *self._sockets):
            _shut(each)
        for thread in self._threads:
            thread.join()

    def hold(self) -> None:
        """Back to the beginning: new connections get nothing yet."""
        with self._changed:
            self._released_lsn = self._start_lsn

    def release(self, lsn: Lsn) -> None:
        """Everything below `lsn` may be sent."""
        if lsn > self._start_lsn + len(self._wal):
            raise BenchFailedError(f"there is no WAL up to {format_lsn(lsn)}")
        with self._changed:
            self._released_lsn = lsn
            self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return  # closed
            self._sockets.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), name="wal sender", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                (size,) = struct.unpack(">I", _receive(connection, 4))
                _receive(connection, size - 4)
                connection.sendall(_AUTHENTICATED_AND_READY)
                kind, size = struct.unpack(">cI", _receive(connection, 5))
                started = _START.match(_receive(connection, size - 4))
                if kind != b"Q" or started is None:
                    raise BenchFailedError("the receiver asks for something else than WAL")
                connection.sendall(_COPY_BOTH)
                self._send_from(connection, parse_lsn(started[1].decode()))
            except OSError:
                return  # the receiver has gone

    def _send_from(self, connection: socket.socket, lsn: Lsn) -> None:
        reports = threading.Thread(target=_drop, args=(connection,), name="wal reports", daemon=True)
        self._threads.append(reports)
        reports.start()
        end_lsn = self._start_lsn + len(self._wal)
        while (released := self._wait_released(lsn)) is not None:
            while lsn < released:
                step = Lsn(min(lsn + MESSAGE_BYTES, released))
                data = self._wal[lsn - self._start_lsn : step - self._start_lsn]
                connection.sendall(encode_copy_data(wal_data_head(lsn, end_lsn, 0) + data))
                lsn = step

    def _wait_released(self, lsn: Lsn) -> Lsn | None:
        """Up to where WAL beyond `lsn` may be sent; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._released_lsn > lsn)
            return None if self._closed else self._released_lsn


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionResetError("the receiver has gone")
        data += more
    return data


def _drop(connection: socket.socket) -> None:
    try:
        while connection.recv(1 << 16):
            pass
    except OSError:
        return


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
