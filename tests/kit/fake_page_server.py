"""A page server that serves a stopped cluster's files in the real wire protocol, and misbehaves on demand.

In a test's own process it is an object whose `Behaviour` the test changes while it runs; as a program
(`python -m tests.kit.fake_page_server PAGES_DIR`, prints its port) it can be stopped and killed.
"""

import contextlib
import dataclasses
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from excimer.base.errors import RefusedError
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    SEGMENT_BLOCKS,
    SLRU_DIRECTORIES,
    KeyKind,
    Relation,
    relation_path,
)
from excimer.wire.page_service import (
    BLOCKS_MAX,
    ClientMessageParser,
    ErrorAnswer,
    ErrorCode,
    GetPages,
    Hello,
    HelloOk,
    encode_server_message,
    pages_head,
)


@dataclasses.dataclass
class Behaviour:
    """What the server does to requests; may change at any time."""

    delay_s: float = 0.0
    """Before each answer."""
    token: str | None = None
    """The only token that is let in."""
    blocks_max: int = BLOCKS_MAX
    error: tuple[ErrorCode, str] | None = None
    """Answer to every GetPages, or to those for `error_blocks`."""
    error_blocks: frozenset[int] = frozenset()
    errors_left: int | None = None
    """After so many, answers are good again."""
    garbage: bytes | None = None
    """Sent instead of an answer."""
    cut_after_bytes: int | None = None
    """Answers end there and the connection closes."""
    hang: bool = False
    """Requests are read and never answered, until this is False."""
    reverse_batches: bool = False
    """Answers requests that arrive together in the opposite order."""


class FakePageServer:
    """Serves `pages_dir` on a free port of the loopback until it is closed; a context manager."""

    def __init__(self, pages_dir: Path, port: int = 0) -> None:
        self.pages_dir = pages_dir
        self.behaviour = Behaviour()
        self.requests: list[GetPages] = []
        self.hellos: list[Hello] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self._closed = True
        _shut(self._listener)
        for connection in list(self._sockets):
            _shut(connection)
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, target: object, *arguments: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.add(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        parser = ClientMessageParser()
        with connection:
            try:
                while data := connection.recv(65536):
                    messages = parser.feed(data)
                    for message in reversed(messages) if self.behaviour.reverse_batches else messages:
                        if not self._answer(connection, message):
                            return
            except (OSError, RefusedError):
                return
            finally:
                self._sockets.discard(connection)

    def _answer(self, connection: socket.socket, message: object) -> bool:
        """False: the connection is to be closed."""
        behaviour = self.behaviour
        if isinstance(message, Hello):
            self.hellos.append(message)
            if behaviour.token is not None and message.token != behaviour.token:
                connection.sendall(encode_server_message(ErrorAnswer(0, ErrorCode.REFUSED, "wrong token")))
                return False
            connection.sendall(encode_server_message(HelloOk(behaviour.blocks_max)))
            return True
        if not isinstance(message, GetPages):
            return False
        self.requests.append(message)
        while self.behaviour.hang and not self._closed:
            time.sleep(0.01)
        if behaviour.delay_s:
            time.sleep(behaviour.delay_s)
        answer = self._pages(message)
        if behaviour.garbage is not None:
            answer = behaviour.garbage
        if behaviour.cut_after_bytes is not None:
            connection.sendall(answer[: behaviour.cut_after_bytes])
            return False
        connection.sendall(answer)
        return True

    def _pages(self, request: GetPages) -> bytes:
        behaviour = self.behaviour
        blocks = range(request.block, request.block + request.count)
        if behaviour.error is not None and (
            not behaviour.error_blocks or behaviour.error_blocks.intersection(blocks)
        ):
            if behaviour.errors_left is None:
                return encode_server_message(ErrorAnswer(request.request_id, *behaviour.error))
            if behaviour.errors_left > 0:
                behaviour.errors_left -= 1
                return encode_server_message(ErrorAnswer(request.request_id, *behaviour.error))
        if request.count > behaviour.blocks_max:
            error = ErrorAnswer(request.request_id, ErrorCode.REFUSED, f"{request.count} blocks are too many")
            return encode_server_message(error)
        path, block = file_of(request)
        try:
            with (self.pages_dir / path).open("rb") as file:
                file.seek(block * BLOCK_SIZE_BYTES)
                pages = file.read(request.count * BLOCK_SIZE_BYTES)
        except FileNotFoundError:
            pages = b""
        if len(pages) != request.count * BLOCK_SIZE_BYTES:
            text = f"{path} has no blocks {block}..{block + request.count - 1}"
            return encode_server_message(ErrorAnswer(request.request_id, ErrorCode.REFUSED, text))
        return pages_head(request.request_id, request.count) + pages


def file_of(request: GetPages) -> tuple[str, int]:
    """Path and block of a request's first page."""
    if request.kind == KeyKind.SLRU_BLOCK:
        return f"{SLRU_DIRECTORIES[request.spc]}/{request.rel:04X}", request.block
    segment, block = divmod(request.block, SEGMENT_BLOCKS)
    return relation_path(Relation(request.spc, request.db, request.rel), request.fork, segment), block


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # its peer may have been faster
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def main() -> None:
    port = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with FakePageServer(Path(sys.argv[1]), port) as server:
        print(server.port, flush=True)
        sys.stdin.read()  # until our parent goes or closes it


if __name__ == "__main__":
    main()
