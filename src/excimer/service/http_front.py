"""What stands at an HTTP port before the application: it answers ``GET /healthz``, and hands on all else.

A service that nobody manages is asked for nothing but its health. As long as that is so, the server and the
application behind are not touched: 3 MiB of a process's own, and a timer ten times a second.

Not here: how much a connection may take and how long (`connections`); ``/healthz`` asked for in another way,
with a query for example, which the application answers.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from excimer.service.connections import Admission
from excimer.service.health import Health

_HEALTH_REQUEST: Final = b"GET /healthz HTTP/1.1\r\n"
_HEAD_END: Final = b"\r\n\r\n"
HEAD_BYTES_MAX: Final = 16 << 10


class FirstRequest(asyncio.Protocol):
    """A connection of which nothing or a part of its first request has been read. Releases its admission when
    it is lost, unless it was handed on to the protocol that `begin_application` gives.
    """

    def __init__(
        self, admission: Admission, health: Health, begin_application: Callable[[Admission], asyncio.Protocol]
    ) -> None:
        self._admission = admission
        self._health = health
        self._begin_application = begin_application
        self._head = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._head += data
        if not is_health_request(self._head) or len(self._head) > HEAD_BYTES_MAX:
            self._hand_on()
        elif _HEAD_END in self._head:
            self._answer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._admission.release()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _answer(self) -> None:
        assert self._transport is not None
        status, body = self._health.answer()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        self._transport.close()

    def _hand_on(self) -> None:
        assert self._transport is not None
        transport, self._transport = self._transport, None
        protocol = self._begin_application(self._admission)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        protocol.data_received(bytes(self._head))


def is_health_request(head: bytes | bytearray) -> bool:
    """Whether this begins the request, or can still become its beginning."""
    return head.startswith(_HEALTH_REQUEST) or _HEALTH_REQUEST.startswith(head)
