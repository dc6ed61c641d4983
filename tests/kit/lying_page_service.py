"""A page service between a reader and the real one, which changes some of the pages that pass."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from excimer.base.address import Address
from excimer.base.keys import BLOCK_SIZE_BYTES, make_key, parse_key
from excimer.wire.page_service import (
    ClientMessageParser,
    GetPages,
    Pages,
    ServerMessageParser,
    encode_client_message,
    encode_server_message,
)

Lie = Callable[[bytes, bytes], bytes]
"""Key of a block and its true page to the page that is passed on."""


class LyingPageService:
    """Listens on a free port of the loopback until it is closed; a context manager."""

    def __init__(self, behind: Address, lie: Lie) -> None:
        self._behind = behind
        self._lie = lie
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._behind.host, self._behind.port))
                asked: dict[int, GetPages] = {}
                threading.Thread(target=self._ask, args=(near, far, asked), daemon=True).start()
                threading.Thread(target=self._answer, args=(far, near, asked), daemon=True).start()

    def _ask(self, near: socket.socket, far: socket.socket, asked: dict[int, GetPages]) -> None:
        parser = ClientMessageParser()
        with suppress(OSError):
            while data := near.recv(1 << 16):
                for message in parser.feed(data):
                    if isinstance(message, GetPages):
                        asked[message.request_id] = message
                    far.sendall(encode_client_message(message))
            far.shutdown(socket.SHUT_RDWR)

    def _answer(self, far: socket.socket, near: socket.socket, asked: dict[int, GetPages]) -> None:
        parser = ServerMessageParser()
        with suppress(OSError), far, near:
            while data := far.recv(1 << 20):
                for message in parser.feed(data):
                    if isinstance(message, Pages):
                        request = asked.pop(message.request_id)
                        message = Pages(message.request_id, self._changed(request, message.pages))
                    near.sendall(encode_server_message(message))

    def _changed(self, request: GetPages, pages: bytes) -> bytes:
        kind, spc, db, rel, fork, block = parse_key(request.key())
        return b"".join(
            self._lie(make_key(kind, spc, db, rel, fork, block + index), pages[at : at + BLOCK_SIZE_BYTES])
            for index, at in enumerate(range(0, len(pages), BLOCK_SIZE_BYTES))
        )
