"""`/healthz` and `/metrics` on h11 alone, for processes that must start fast (no FastAPI, no uvicorn).

One request per connection; a request must arrive within `REQUEST_LIMIT_S` and be small, and at
most `CONNECTIONS_MAX` are open, the newest ones, so that nobody can occupy a compute through its health port.

A process may have routes of its own beside these (`light_api`); everything runs on the event loop, no thread.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple, Protocol

import h11

from excimer.base.address import Address
from excimer.service.accept import accept_connections, open_streams
from excimer.service.connections import Admission, ConnectionGate, ConnectionLimits, process_limits
from excimer.service.health import HTTP_OK, Health
from excimer.service.listen import bind_listen, bound_address
from excimer.service.logs import get_logger
from excimer.service.plain_metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from excimer.service.tasks import TaskScope

REQUEST_LIMIT_S = 5.0
REQUEST_SIZE_MAX = 16 * 1024
BODY_SIZE_MAX = 1 << 20
READ_SIZE_BYTES = 4096
CONNECTIONS_MAX = 32
LIMITS = ConnectionLimits(waiting_max=CONNECTIONS_MAX, handshake_s=REQUEST_LIMIT_S)

JSON = "application/json"
TEXT = "text/plain"

log = get_logger(__name__)


class LightAnswer(NamedTuple):
    status: int
    media_type: str
    body: bytes


class LightRoutes(Protocol):
    """What a process serves beside `/healthz` and `/metrics`."""

    async def answer(
        self, request: h11.Request, admission: Admission, read_body: Callable[[], Awaitable[bytes]]
    ) -> LightAnswer:
        """`admission` ends the connection unless the request proves who it is. `read_body` raises
        `h11.RemoteProtocolError` for one that is too long or not whole.
        """


@contextlib.asynccontextmanager
async def serving_light_http(
    listen: str,
    health: Health,
    read_metrics: Callable[[], bytes],
    limits: ConnectionLimits = LIMITS,
    routes: LightRoutes | None = None,
) -> AsyncIterator[Address]:
    """Serves while the block runs; yields the address. Raises `ListenError` if the port is taken."""
    what = f"{health.service} http_listen"
    bound = bind_listen(listen, what)
    gate = ConnectionGate(what, process_limits(limits))
    try:
        async with TaskScope() as scope:
            server = _LightServer(health, read_metrics, scope, routes)
            scope.start("accept", accept_connections(bound, gate, server.accepted))
            yield bound_address(bound)
    finally:
        bound.close()


class _LightServer:
    def __init__(
        self, health: Health, read_metrics: Callable[[], bytes], scope: TaskScope, routes: LightRoutes | None
    ) -> None:
        self._health = health
        self._read_metrics = read_metrics
        self._scope = scope
        self._routes = routes

    def accepted(self, admission: Admission) -> None:
        self._scope.contain("http request", self._serve(admission))

    async def _serve(self, admission: Admission) -> None:
        """One request; the admission's deadline ends it."""
        writer = None
        try:
            reader, writer = await open_streams(admission)
            await self._serve_one(admission, reader, writer)
        except (OSError, h11.ProtocolError) as error:
            log.debug("http connection failed", error=error)
        finally:
            admission.release()
            if writer is not None:
                writer.close()
            else:
                admission.socket.close()

    async def _serve_one(
        self, admission: Admission, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_SIZE_MAX)
        try:
            request = await self._read_request(connection, reader)
            answer = None if request is None else await self._route(request, admission, connection, reader)
        except h11.RemoteProtocolError as error:
            if connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                await self._answer(
                    connection, writer, LightAnswer(error.error_status_hint, TEXT, str(error).encode())
                )
            return
        if answer is not None:
            await self._answer(connection, writer, answer)

    async def _read_request(
        self, connection: h11.Connection, reader: asyncio.StreamReader
    ) -> h11.Request | None:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(READ_SIZE_BYTES))
            elif isinstance(event, h11.Request):
                return event
            else:
                return None

    async def _route(
        self,
        request: h11.Request,
        admission: Admission,
        connection: h11.Connection,
        reader: asyncio.StreamReader,
    ) -> LightAnswer:
        path = request.target.split(b"?")[0]
        is_read = request.method in (b"GET", b"HEAD")
        if is_read and path == b"/healthz":
            status, body = self._health.answer()
            return LightAnswer(status, JSON, body)
        if is_read and path == b"/metrics":
            return LightAnswer(HTTP_OK, METRICS_CONTENT_TYPE, self._read_metrics())
        if self._routes is not None:
            return await self._routes.answer(request, admission, lambda: _read_body(connection, reader))
        if not is_read:
            return LightAnswer(405, TEXT, b"only GET is served here\n")
        return LightAnswer(404, TEXT, b"only /healthz and /metrics are served here\n")

    async def _answer(
        self, connection: h11.Connection, writer: asyncio.StreamWriter, answer: LightAnswer
    ) -> None:
        headers = [
            ("content-type", answer.media_type),
            ("content-length", str(len(answer.body))),
            ("connection", "close"),
        ]
        head = connection.send(h11.Response(status_code=answer.status, headers=headers))
        is_head_only = connection.their_state is h11.ERROR
        content = b"" if is_head_only else connection.send(h11.Data(data=answer.body))
        writer.write((head or b"") + (content or b""))
        await writer.drain()


async def _read_body(connection: h11.Connection, reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_SIZE_BYTES))
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_SIZE_MAX:
                raise h11.RemoteProtocolError(f"a body is longer than {BODY_SIZE_MAX} bytes", 413)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        else:
            raise h11.RemoteProtocolError("the connection was closed within a request")
