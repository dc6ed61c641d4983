"""A relay between a client and a PostgreSQL server that keeps the base backup which went through it.

The backup can be held up in its middle, so that the server is written to meanwhile. Connections must not be
encrypted: `sslmode=disable`. PostgreSQL 15 and later, whose backup's messages say what they are.
"""

import contextlib
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from excimer.io.processes import make_owned_dir, run

HOLD_TIMEOUT_S = 120.0
_READ_SIZE_BYTES = 1 << 16
_LENGTH = struct.Struct(">I")
_COPY_DATA, _NEW_ARCHIVE, _ARCHIVE_DATA = b"d", b"n", b"d"


class BackupRecorder(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, server_port: int, hold_after_bytes: int) -> None:
        """The connection that has received so much waits for `go_on`."""
        super().__init__(("127.0.0.1", 0), _Relay)
        self.server_port = server_port
        self.hold_after_bytes = hold_after_bytes
        self.holds = threading.Event()
        self.go_on = threading.Event()
        self.received: list[bytearray] = []
        """What the server sent, by connection."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def unpack_backup(self, target: Path) -> Path:
        """A data directory of PostgreSQL's user, as the backup described it."""
        (archive,) = [found for data in self.received if (found := _archive_in(bytes(data)))]
        make_owned_dir(target)
        run(["tar", "-xf", "-", "-C", target], stdin=archive)
        run(["chmod", "700", target])
        return target


class _Relay(socketserver.BaseRequestHandler):
    server: BackupRecorder
    request: socket.socket

    def handle(self) -> None:
        received = bytearray()
        self.server.received.append(received)
        with socket.create_connection(("127.0.0.1", self.server.server_port)) as backend:
            threading.Thread(target=_pass_on, args=(self.request, backend), daemon=True).start()
            with contextlib.suppress(OSError):
                while data := backend.recv(_READ_SIZE_BYTES):
                    received += data
                    self.request.sendall(data)
                    if len(received) > self.server.hold_after_bytes and not self.server.holds.is_set():
                        self.server.holds.set()
                        self.server.go_on.wait(HOLD_TIMEOUT_S)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_READ_SIZE_BYTES):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _archive_in(data: bytes) -> bytes:
    """The tar file among a connection's messages; empty if there is none."""
    archive: list[bytes] = []
    at = 0
    while at + 5 <= len(data):
        end = at + 1 + _LENGTH.unpack_from(data, at + 1)[0]
        kind, body = data[at : at + 1], data[at + 5 : end]
        if kind == _COPY_DATA and body[:1] == _NEW_ARCHIVE:
            archive.clear()
        elif kind == _COPY_DATA and body[:1] == _ARCHIVE_DATA:
            archive.append(body[1:])
        at = end
    return b"".join(archive)


@contextlib.contextmanager
def running_recorder(server_port: int, hold_after_bytes: int) -> Iterator[BackupRecorder]:
    with BackupRecorder(server_port, hold_after_bytes) as recorder:
        thread = threading.Thread(target=recorder.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield recorder
        finally:
            recorder.go_on.set()
            recorder.shutdown()
            thread.join()
