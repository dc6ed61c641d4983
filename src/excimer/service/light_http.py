"""`/healthz` and `/metrics` on h11 alone, for processes that must start fast (no FastAPI, no uvicorn).

One request per connection; a request must arrive within `REQUEST_LIMIT_S` and be small, and at
most `CONNECTIONS_MAX` are open, the newest ones, so that nobody can occupy a compute through its health port.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

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
READ_SIZE_BYTES = 4096
CONNECTIONS_MAX = 32
LIMITS = ConnectionLimits(waiting_max=CONNECTIONS_MAX, handshake_s=REQUEST_LIMIT_S)

log = get_logger(__name__)


@contextlib.asynccontextmanager
async def serving_light_http(
    listen: str, health: Health, read_metrics: Callable[[], bytes], limits: ConnectionLimits = LIMITS
) -> AsyncIterator[Address]:
    """Serves while the block runs; yields the address. Raises `ListenError` if the port is taken."""
    what = f"{health.service} http_listen"
    bound = bind_listen(listen, what)
    gate = ConnectionGate(what, process_limits(limits))
    try:
        async with TaskScope() as scope:
            server = _LightServer(health, read_metrics, scope)
            scope.start("accept", accept_connections(bound, gate, server.accepted))
            yield bound_address(bound)
    finally:
        bound.close()


class _LightServer:
    def __init__(self, health: Health, read_metrics: Callable[[], bytes], scope: TaskScope) -> None:
        self._health = health
        self._read_metrics = read_metrics
        self._scope = scope

    def accepted(self, admission: Admission) -> None:
        self._scope.contain("http request", self._serve(admission))

    async def _serve(self, admission: Admission) -> None:
        """One request; the admission's deadline ends it."""
        writer = None
        try:
            reader, writer = await open_streams(admission)
            await self._serve_one(reader, writer)
        except (OSError, h11.ProtocolError) as error:
            log.debug("http connection failed", error=error)
        finally:
            admission.release()
            if writer is not None:
                writer.close()
            else:
                admission.socket.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_SIZE_MAX)
        try:
            request = await self._read_request(connection, reader)
        except h11.RemoteProtocolError as error:
            if connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                await self._answer(
                    connection, writer, error.error_status_hint, "text/plain", str(error).encode()
                )
            return
        if request is not None:
            await self._answer(connection, writer, *self._route(request))

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

    def _route(self, request: h11.Request) -> tuple[int, str, bytes]:
        path = request.target.split(b"?")[0]
        if request.method not in (b"GET", b"HEAD"):
            return 405, "text/plain", b"only GET is served here\n"
        if path == b"/healthz":
            status, body = self._health.answer()
            return status, "application/json", body
        if path == b"/metrics":
            return HTTP_OK, METRICS_CONTENT_TYPE, self._read_metrics()
        return 404, "text/plain", b"only /healthz and /metrics are served here\n"

    async def _answer(
        self, connection: h11.Connection, writer: asyncio.StreamWriter, status: int, kind: str, body: bytes
    ) -> None:
        headers = [("content-type", kind), ("content-length", str(len(body))), ("connection", "close")]
        head = connection.send(h11.Response(status_code=status, headers=headers))
        content = b"" if connection.their_state is h11.ERROR else connection.send(h11.Data(data=body))
        writer.write((head or b"") + (content or b""))
        await writer.drain()
