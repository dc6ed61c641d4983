"""The page service: one TCP connection of a compute, from its Hello to its end.

::

    connected --Hello--> authenticated --GetPages, GetBasebackup--> ... --> closed
        |  wrong token, unknown timeline, no Hello in time     garbage, an expired token, silence
        +---------------------> closed <---------------------- while an answer cannot be sent

Requests that came together and can be answered at once, because all they need is in memory, are answered on
the spot and with one write. Others run as tasks at the same time, up to `REQUESTS_IN_FLIGHT_MAX`; while
that many run, or while the peer does not take its answers, nothing more is read from the socket, so a
connection's memory is bounded. After `BLOCKS_AT_ONCE_MAX` blocks other connections have their turn. A
request that fails is answered with an error; only bytes that are not the protocol close the connection.

Not here: finding timelines and reading pages (`tenants`, the store), frames (`wire.page_service`).
"""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, Protocol, cast

from excimer.base.errors import CorruptionError, ExcimerError, RefusedError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import Lsn
from excimer.pageserver.metrics import PageServiceMetrics
from excimer.service.accept import accept_connections, serve_protocol
from excimer.service.connections import Admission, ConnectionGate, ConnectionLimits, process_limits
from excimer.service.logs import get_logger
from excimer.wire.auth import Claims, Resource, Right, TokenExpiredError, TokenVerifier, authorize
from excimer.wire.page_service import (
    BLOCKS_MAX,
    CONNECTION_REQUEST_ID,
    NEWEST_LSN,
    PROTOCOL_VERSION,
    ClientMessage,
    ClientMessageParser,
    ErrorAnswer,
    ErrorCode,
    GetBasebackup,
    GetPages,
    GetPosition,
    Hello,
    HelloOk,
    PageProtocolError,
    PositionAnswer,
    basebackup_head,
    encode_server_message,
    error_code,
    pages_head,
)

log = get_logger(__name__)

REQUESTS_IN_FLIGHT_MAX: Final = 32
"""As many as libhydrate sends at once."""
BLOCKS_IN_FLIGHT_MAX: Final = 2048
"""No request is started while those under way are for so many."""
WRITE_BUFFER_BYTES_MAX: Final = 4 << 20
"""Above this much unsent, a connection starts no more requests and reads no more bytes."""
BLOCKS_AT_ONCE_MAX: Final = 64
"""Answered before other connections have their turn: about a millisecond."""
JOIN_BYTES_MAX: Final = 64 << 10
"""Answers up to this size are joined with others into one write; larger ones are not copied."""
RECEIVE_BUFFER_BYTES: Final = 16 << 10
"""What one read of the socket takes: some hundred requests. asyncio's own buffer, allocated anew for each
read, is 256 KiB.
"""
FIRST_LSN: Final = 8
"""Any timeline that can be read at all has got further."""
STALL_TIMEOUT_S: Final = 120.0
"""A peer that takes none of its answers for so long is disconnected."""


class ServedTimeline(Protocol):
    """What the page service asks of a timeline."""

    @property
    def last_record_lsn(self) -> Lsn:
        """The newest LSN that can be read; 0 while it has to wait for an ancestor's WAL."""

    def record_end(self, lsn: int, /) -> Lsn:
        """`lsn` itself, or the record end before it if `lsn` is just behind a WAL page's header."""

    async def wait_for_lsn(self, lsn: Lsn, timeout_s: float, /) -> None: ...
    async def get_pages(self, key: bytes, count: int, lsn: Lsn, /) -> bytes: ...
    def start_read(self, key: bytes, count: int, lsn: Lsn, /) -> "bytes | Reading":
        """`get_pages`: at once if nothing has to be waited for, else what to call and await."""

    async def basebackup(self, lsn: Lsn, /) -> bytes:
        """Compressed; the LSN has arrived."""


Reading = Callable[[], Awaitable[bytes]]
Spawn = Callable[[str, Coroutine[Any, Any, None]], object]
"""Runs a coroutine in the background; it must not let an unexpected error end the service."""


class PageService:
    """What all connections share."""

    def __init__(
        self,
        *,
        find_timeline: Callable[[TenantId, TimelineId], ServedTimeline],
        verifier: TokenVerifier,
        spawn: Spawn,
        metrics: PageServiceMetrics,
        lsn_wait_timeout_s: float,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self.find_timeline = find_timeline
        self.verifier = verifier
        self.spawn = spawn
        self.metrics = metrics
        self.lsn_wait_timeout_s = lsn_wait_timeout_s
        self._gate = ConnectionGate("page_service_listen", process_limits(limits))
        self._connections: set[PageConnection] = set()

    async def serve(self, listening: socket.socket) -> None:
        """Until cancelled; connections go on until `close_all`."""
        await accept_connections(listening, self._gate, self._accepted)

    def _accepted(self, admission: Admission) -> None:
        self.spawn("page connection", serve_protocol(admission, PageConnection(self, admission)))

    def opened(self, connection: "PageConnection") -> None:
        self._connections.add(connection)
        self.metrics.connections.set(len(self._connections))

    def closed(self, connection: "PageConnection") -> None:
        self._connections.discard(connection)
        self.metrics.connections.set(len(self._connections))

    def close_all(self) -> None:
        """Drops every connection; computes connect again by themselves."""
        for connection in list(self._connections):
            connection.abort()


class PageConnection(asyncio.BufferedProtocol):
    def __init__(self, service: PageService, admission: Admission) -> None:
        self._service = service
        self._admission = admission
        self._parser = ClientMessageParser()
        self._received = memoryview(bytearray(RECEIVE_BUFFER_BYTES))
        self._transport: asyncio.Transport | None = None
        self._peer: tuple[TenantId, TimelineId] | None = None
        self._claims: Claims | None = None
        self._waiting: deque[GetPages | GetBasebackup | GetPosition] = deque()
        self._in_flight = 0
        self._blocks_in_flight = 0
        self._outgoing: list[bytes] = []
        """Answers of one step of the event loop, written together."""
        self._answered_s: list[float] = []
        """How long these took; told to the metrics when they are on their way."""
        self._is_reading = True
        self._is_writable = True
        self._timer: asyncio.TimerHandle | None = None

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        self._service.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        try:
            messages = self._parser.feed(self._received[:nbytes])
            for message in messages:
                self._take(message)
        except ExcimerError as error:
            self._refuse(error)
            return
        self._start_requests()

    def connection_lost(self, exc: Exception | None) -> None:
        self._admission.release()
        self._set_timer(None, "")
        self._waiting.clear()
        self._outgoing.clear()
        self._transport = None
        self._service.closed(self)

    def pause_writing(self) -> None:
        self._is_writable = False
        self._set_timer(STALL_TIMEOUT_S, "the peer does not take its answers")
        self._start_requests()

    def resume_writing(self) -> None:
        self._is_writable = True
        self._set_timer(None, "")
        self._start_requests()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # Hello

    def _take(self, message: ClientMessage) -> None:
        if isinstance(message, Hello):
            self._hello(message)
        elif self._claims is None:
            raise PageProtocolError("the first message must be Hello")
        else:
            self._claims.check_current(time.time())
            self._waiting.append(message)

    def _hello(self, hello: Hello) -> None:
        if self._peer is not None:
            raise PageProtocolError("a second Hello on one connection")
        if hello.version != PROTOCOL_VERSION:
            raise PageProtocolError(
                f"protocol version {hello.version} is not known here, only {PROTOCOL_VERSION}"
            )
        claims = self._service.verifier.verify(hello.token, time.time())
        authorize(claims, Right.READ_PAGES, Resource(hello.tenant_id, hello.timeline_id))
        self._service.find_timeline(hello.tenant_id, hello.timeline_id)
        self._admission.authenticated()
        self._peer, self._claims = (hello.tenant_id, hello.timeline_id), claims
        self._write(encode_server_message(HelloOk(BLOCKS_MAX)))

    def _refuse(self, error: ExcimerError) -> None:
        """Tells why, then closes: the connection has no further use."""
        self._service.metrics.refused_connections.inc()
        log.info("page connection refused", error=error, peer=self._address())
        self._waiting.clear()
        self._write(
            encode_server_message(ErrorAnswer(CONNECTION_REQUEST_ID, _refusal_code(error), str(error)))
        )
        self._write_outgoing()
        if self._transport is not None:
            self._transport.close()

    # Requests

    def _start_requests(self) -> None:
        is_done = False
        try:
            blocks = 0
            while self._may_start() and blocks < BLOCKS_AT_ONCE_MAX:
                message = self._waiting.popleft()
                if isinstance(message, GetPages):
                    blocks += self._answer_or_start(message)
                elif isinstance(message, GetPosition):
                    self._answer_position(message)
                else:
                    self._start(message.request_id, 0, partial(self._get_basebackup, message))
            if blocks:
                self._write_outgoing()
                self._account(blocks)
            is_done = True
        finally:
            if not is_done:  # a defect: never leave the peer waiting for an answer
                self.abort()
        if self._may_start():
            asyncio.get_running_loop().call_soon(self._start_requests)
        self._set_reading(self._is_writable and not self._waiting)

    def _account(self, blocks: int) -> None:
        """After the answers have gone out: nobody waits for it."""
        metrics = self._service.metrics
        metrics.pages.inc(blocks)
        for answered_s in self._answered_s:
            metrics.get_pages_seconds.observe(answered_s)
        self._answered_s.clear()

    def _may_start(self) -> bool:
        return (
            bool(self._waiting)
            and self._is_writable
            and self._in_flight < REQUESTS_IN_FLIGHT_MAX
            and self._blocks_in_flight < BLOCKS_IN_FLIGHT_MAX
        )

    def _answer_or_start(self, request: GetPages) -> int:
        """Answers, or starts a task that will; how many blocks were answered."""
        started = time.perf_counter()
        try:
            pages = self._start_read(request)
            if not isinstance(pages, bytes):
                answering = partial(self._get_pages, request, pages, started)
                self._start(request.request_id, request.count, answering)
                return 0
            self._outgoing += (_pages_head(request, pages), pages)
        except ExcimerError as error:
            self._answer_error(request.request_id, error)
            return 0
        self._answered_s.append(time.perf_counter() - started)
        return request.count

    def _answer_position(self, request: GetPosition) -> None:
        try:
            lsn = self._timeline().last_record_lsn
        except ExcimerError as error:
            self._answer_error(request.request_id, error)
        else:
            self._write(encode_server_message(PositionAnswer(request.request_id, lsn)))

    def _start(self, request_id: int, blocks: int, request: Callable[[], Awaitable[None]]) -> None:
        self._in_flight += 1
        self._blocks_in_flight += blocks
        self._service.spawn("page request", self._serve(request_id, blocks, request))

    def _set_reading(self, is_wanted: bool) -> None:
        if self._transport is None or self._transport.is_closing() or is_wanted == self._is_reading:
            return
        self._is_reading = is_wanted
        if is_wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    async def _serve(self, request_id: int, blocks: int, request: Callable[[], Awaitable[None]]) -> None:
        is_answered = False
        try:
            await request()
            is_answered = True
        except ExcimerError as error:
            self._answer_error(request_id, error)
            is_answered = True
        finally:
            self._in_flight -= 1
            self._blocks_in_flight -= blocks
            if is_answered:
                self._start_requests()
            else:  # cancelled, or a defect: never leave the peer waiting for an answer
                self.abort()

    def _start_read(self, request: GetPages) -> bytes | Reading:
        """The pages, or what to call and await for them."""
        if not 0 < request.count <= BLOCKS_MAX:
            raise RefusedError(
                f"{request.count} blocks were asked for; one request may have 1 to {BLOCKS_MAX}"
            )
        timeline = self._timeline()
        newest_lsn = timeline.last_record_lsn
        if request.lsn == NEWEST_LSN:
            lsn, wanted_lsn = newest_lsn, max(request.not_modified_since, FIRST_LSN)
        else:
            lsn = wanted_lsn = timeline.record_end(request.lsn)
        if newest_lsn < wanted_lsn:
            return partial(self._wait_and_read, timeline, request, Lsn(wanted_lsn))
        return timeline.start_read(request.key(), request.count, Lsn(lsn))

    async def _wait_and_read(self, timeline: ServedTimeline, request: GetPages, wanted_lsn: Lsn) -> bytes:
        await self._wait(timeline, wanted_lsn)
        lsn = timeline.last_record_lsn if request.lsn == NEWEST_LSN else wanted_lsn
        return await timeline.get_pages(request.key(), request.count, lsn)

    async def _get_pages(self, request: GetPages, reading: Reading, started: float) -> None:
        pages = await reading()
        self._write(_pages_head(request, pages), pages)
        self._service.metrics.pages.inc(request.count)
        self._service.metrics.get_pages_seconds.observe(time.perf_counter() - started)

    async def _get_basebackup(self, request: GetBasebackup) -> None:
        started = time.perf_counter()
        timeline = self._timeline()
        compressed = await timeline.basebackup(await self._wait(timeline, request.lsn))
        self._write(basebackup_head(request.request_id, len(compressed)), compressed)
        self._service.metrics.basebackup_seconds.observe(time.perf_counter() - started)

    async def _wait(self, timeline: ServedTimeline, lsn: int) -> Lsn:
        """The record end at or below `lsn`, once the timeline has it."""
        end = timeline.record_end(lsn)
        if timeline.last_record_lsn < end:
            await timeline.wait_for_lsn(end, self._service.lsn_wait_timeout_s)
        return end

    def _timeline(self) -> ServedTimeline:
        """Looked up for each request: a deleted timeline is refused from then on."""
        if self._peer is None:
            raise PageProtocolError("the first message must be Hello")
        return self._service.find_timeline(*self._peer)

    def _answer_error(self, request_id: int, error: ExcimerError) -> None:
        code = error_code(error)
        self._service.metrics.errors.labels(code.name.lower()).inc()
        if code is ErrorCode.CORRUPTION:
            log.error("page request failed", error=error, peer=self._address())
        else:
            log.info("page request failed", error=error, peer=self._address())
        self._write(encode_server_message(ErrorAnswer(request_id, code, str(error))))

    # Socket

    def _write(self, head: bytes, body: bytes = b"") -> None:
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._write_outgoing)
        self._outgoing += (head, body)

    def _write_outgoing(self) -> None:
        """One system call for what was answered together; large answers go out uncopied."""
        parts, self._outgoing = self._outgoing, []
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        joined: list[bytes] = []
        for part in parts:
            if len(part) > JOIN_BYTES_MAX:
                transport.write(b"".join(joined))
                joined = []
                transport.write(part)
            else:
                joined.append(part)
        transport.write(b"".join(joined))

    def _set_timer(self, delay_s: float | None, why: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if delay_s is not None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._time_is_over, why)

    def _time_is_over(self, why: str) -> None:
        log.info("page connection dropped", reason=why, peer=self._address())
        self.abort()

    def _address(self) -> str:
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{name[0]}:{name[1]}" if name else "gone"


def _refusal_code(error: ExcimerError) -> ErrorCode:
    """A compute whose token has run out gets a new one: it shall try again."""
    return ErrorCode.RETRYABLE if isinstance(error, TokenExpiredError) else error_code(error)


def _pages_head(request: GetPages, pages: bytes) -> bytes:
    if len(pages) != request.count * BLOCK_SIZE_BYTES:
        raise CorruptionError(f"{request.count} pages were read as {len(pages)} bytes")
    return pages_head(request.request_id, request.count)
