"""A client of the page service that asks for pages as fast as they come: blocking, on one connection.

`run` keeps a number of requests under way and checks of each answer that it is pages, as many as were
asked for; their content is checked elsewhere (`page_reads`). Receiving takes most of its time, so it reads
in large pieces.
"""

import socket
import struct
import time
from collections.abc import Sequence

from bench.pgbench import BenchFailedError
from excimer.base.address import Address
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, parse_key
from excimer.wire.page_service import GetPages, Hello, encode_client_message

_ANSWER_HEAD = struct.Struct("<IBQI")
_HELLO_OK_BYTES = 13
_ASKED_AT_ONCE = 8
"""Requests are sent in groups of at least so many (or of all that may be under way): one write each."""


class BenchPageClient:
    def __init__(self, address: Address, tenant_id: TenantId, timeline_id: TimelineId, token: str) -> None:
        self._socket = socket.create_connection((address.host, address.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(4 << 20)
        self._socket.sendall(encode_client_message(Hello(tenant_id, timeline_id, token)))
        answer = self._socket.recv(_HELLO_OK_BYTES, socket.MSG_WAITALL)
        if answer[4:5] != b"h":
            raise BenchFailedError(f"the pageserver refuses: {answer!r}")

    def close(self) -> None:
        self._socket.close()

    def run(self, requests: Sequence[bytes], blocks: int, depth: int) -> float:
        """Seconds for all of them, each for `blocks` blocks, `depth` of them under way."""
        begun = time.perf_counter()
        sent = min(depth, len(requests))
        self._socket.sendall(b"".join(requests[:sent]))
        answered = 0
        group = min(_ASKED_AT_ONCE, depth)
        reader = _Answers(self._socket, self._buffer, blocks)
        while answered < len(requests):
            answered += reader.receive()
            free = depth - (sent - answered)
            if free >= group and sent < len(requests):
                self._socket.sendall(b"".join(requests[sent : sent + free]))
                sent = min(sent + free, len(requests))
        return time.perf_counter() - begun

    def latencies(self, requests: Sequence[bytes]) -> list[float]:
        """Seconds of each request for one block, one after the other."""
        taken = []
        size = _ANSWER_HEAD.size + BLOCK_SIZE_BYTES
        view = memoryview(self._buffer)[:size]
        for request in requests:
            begun = time.perf_counter()
            self._socket.sendall(request)
            filled = 0
            while filled < size:
                filled += _checked(self._socket.recv_into(view[filled:]))
            taken.append(time.perf_counter() - begun)
            _check_head(view, 0, 1)
        return taken

    def pages(self, request: bytes, blocks: int) -> bytes:
        """The content of one answer."""
        size = _ANSWER_HEAD.size + blocks * BLOCK_SIZE_BYTES
        self._socket.sendall(request)
        answer = self._socket.recv(size, socket.MSG_WAITALL)
        _check_head(memoryview(answer), 0, blocks)
        return answer[_ANSWER_HEAD.size :]


class _Answers:
    """Answers of one known size each, counted as they come in."""

    def __init__(self, connection: socket.socket, buffer: bytearray, blocks: int) -> None:
        self._socket = connection
        self._view = memoryview(buffer)
        self._blocks = blocks
        self._size = _ANSWER_HEAD.size + blocks * BLOCK_SIZE_BYTES
        self._filled = 0

    def receive(self) -> int:
        """Waits for bytes; how many answers they complete."""
        self._filled += _checked(self._socket.recv_into(self._view[self._filled :]))
        count, rest = divmod(self._filled, self._size)
        for at in range(0, count * self._size, self._size):
            _check_head(self._view, at, self._blocks)
        if rest and count:
            end = count * self._size
            self._view[:rest] = bytes(self._view[end : end + rest])
        elif rest and self._filled >= _ANSWER_HEAD.size:
            _check_head(self._view, 0, self._blocks)  # an error is shorter than an answer: say so now
        self._filled = rest
        return count


def _checked(count: int) -> int:
    if not count:
        raise BenchFailedError("the pageserver has closed the connection")
    return count


def _check_head(view: memoryview, at: int, blocks: int) -> None:
    length, kind, _, count = _ANSWER_HEAD.unpack_from(view, at)
    if kind != ord("g") or count != blocks or length != 13 + blocks * BLOCK_SIZE_BYTES:
        raise BenchFailedError(f"not pages: {bytes(view[at : at + 200])!r}")


def page_requests(first_key: bytes, blocks: Sequence[int], count: int, lsn: int, since: int) -> list[bytes]:
    """One request of `count` blocks from each of these blocks on."""
    kind, spc, db, rel, fork, _ = parse_key(first_key)
    return [
        encode_client_message(GetPages(number, lsn, since, kind, fork, spc, db, rel, block, count))
        for number, block in enumerate(blocks, 1)
    ]
