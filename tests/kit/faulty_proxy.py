"""An HTTP proxy in front of an object store that lets chosen requests go wrong as networks and stores do.

One request per connection, a thread each; requests pass unchanged, so that their signatures stay good.
"""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum, auto
from io import BufferedIOBase
from typing import IO, Any

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HANG_S = 1.0


class Fault(Enum):
    """What happens to a request. From `LOST_ANSWER` on, the store has done what was asked."""

    DROPPED = auto()
    INTERNAL_ERROR = auto()
    SLOW_DOWN = auto()
    LOST_ANSWER = auto()
    TRUNCATED = auto()
    """The connection breaks in the middle of the answer's body."""
    SHORT = auto()
    """The body ends early, and the answer's head says that this is all."""
    SLOW = auto()
    """The answer takes `HANG_S`."""


Chooser = Callable[[str, str], Fault | None]
"""Method and path of a request to what shall happen to it."""


class FaultyProxy(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, backend_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend_port = backend_port
        self.choose: Chooser = lambda method, path: None
        self.requests: list[tuple[str, str, Fault | None]] = []
        self.drops_conditions = False
        """Makes of any store one that ignores create-if-absent."""
        self._handling = 0
        self._idle = threading.Condition()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._idle:
            self._handling += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._idle:
            self._handling -= 1
            self._idle.notify_all()

    def wait_idle(self) -> None:
        """Blocks until the store has done what it was asked for, whether or not anybody waits for that."""
        with self._idle:
            self._idle.wait_for(lambda: self._handling == 0)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running_proxy(backend_endpoint: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(int(backend_endpoint.rpartition(":")[2])) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()


class _Handler(socketserver.StreamRequestHandler):
    server: FaultyProxy

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # whoever asked has gone
            self._handle()

    def _handle(self) -> None:
        head = _read_head(self.rfile)
        if not head:
            return
        method, path, _ = head[0].decode().split(" ", 2)
        body = self.rfile.read(_content_length(head))
        fault = self.server.choose(method, path)
        self.server.requests.append((method, path, fault))
        if fault is Fault.DROPPED:
            return
        if fault in (Fault.INTERNAL_ERROR, Fault.SLOW_DOWN):
            status = b"500 Internal Server Error" if fault is Fault.INTERNAL_ERROR else b"503 Slow Down"
            self.wfile.write(_answer([b"HTTP/1.1 " + status + b"\r\n"], SLOW_DOWN))
            return
        answer_head, answer = self._ask_backend(head, body)
        if fault is Fault.LOST_ANSWER:
            return
        if fault is Fault.SLOW:
            time.sleep(HANG_S)
        if method == "HEAD":  # its length is of a body that does not follow
            self.wfile.write(b"".join(answer_head[:-1]) + b"Connection: close\r\n\r\n")
        elif fault is Fault.TRUNCATED:
            whole = _answer(answer_head, answer)
            self.wfile.write(whole[: len(whole) - (len(answer) + 1) // 2])
        elif fault is Fault.SHORT:
            self.wfile.write(_answer(answer_head, answer[: len(answer) // 2]))
        else:
            self.wfile.write(_answer(answer_head, answer))

    def _ask_backend(self, head: list[bytes], body: bytes) -> tuple[list[bytes], bytes]:
        with socket.create_connection(("127.0.0.1", self.server.backend_port)) as backend:
            dropped = (b"connection:", b"if-none-match:" if self.server.drops_conditions else b"connection:")
            kept = [line for line in head[:-1] if not line.lower().startswith(dropped)]
            backend.sendall(b"".join(kept) + b"Connection: close\r\n\r\n" + body)
            with backend.makefile("rb") as answer:
                answer_head = _read_head(answer)
                return answer_head, answer.read()


def _read_head(file: IO[bytes] | BufferedIOBase) -> list[bytes]:
    """Lines up to the empty one, with their ends; nothing when the connection ends before."""
    lines: list[bytes] = []
    while line := file.readline():
        lines.append(line)
        if line == b"\r\n":
            return lines
    return []


def _content_length(head: list[bytes]) -> int:
    for line in head:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


def _answer(head: list[bytes], body: bytes) -> bytes:
    dropped = (b"content-length:", b"connection:", b"transfer-encoding:", b"\r\n")
    kept = [line for line in head if not line.lower().startswith(dropped)]
    return b"".join(kept) + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
