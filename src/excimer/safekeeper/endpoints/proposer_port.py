"""The port of proposers: one thread per connection, from the socket to the disk and back.

Once a timeline is streamed, its `serve` receives too and answers appends; what it leaves is parsed here.

A connection's first frame names its timeline and carries the token; until it is accepted the
peer can hold neither memory nor a place for long (`service.connections`). A connection lives as long as its
token; a proposer sends a newer one in time. Errors are answered with
a frame that says which family they are of, then the connection closes; the safekeeper lives on.

Not here: what the messages mean (`consensus.acceptor`, driven by `timeline`).
"""

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Sequence

from excimer._native.channel import TlsChannel
from excimer.base.errors import CorruptionError, ExcimerError, FencedError, RefusedError, RetryableError
from excimer.consensus.acceptor import ConnectionId
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.registry import TimelineNotFoundError
from excimer.safekeeper.timeline import Outgoing, SafekeeperTimeline, TimelineDeletedError
from excimer.safekeeper.timeline_door import TimelineDoor
from excimer.service.accept import accept_connections
from excimer.service.connections import Admission, ConnectionGate, ConnectionLimits, process_limits
from excimer.service.logs import get_logger
from excimer.service.tasks import TaskScope, failure_of
from excimer.service.tls import server_channel
from excimer.wire.auth import Claims, Right, TokenExpiredError
from excimer.wire.replication import HotStandbyFeedback
from excimer.wire.safekeeping import (
    AcceptorFrame,
    ErrorCode,
    ErrorResponse,
    ProposerFrame,
    ProposerGreeting,
    ProposerMessage,
    ProposerMessageParser,
    StandbysNeed,
    TimelineIdentity,
    TokenRenewal,
    encode_acceptor_message,
)

SEND_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 60.0
"""A proposer sends a heartbeat each second; one that is silent this long is gone."""
EXPIRY_CHECK_S = 1.0
_RECEIVE_SIZE_BYTES = 1 << 18
_CLOSE_TIMEOUT_S = 3.0

log = get_logger(__name__)

_CODE_OF_FAMILY: tuple[tuple[type[ExcimerError], int], ...] = (
    (TokenExpiredError, ErrorCode.RETRYABLE),
    (FencedError, ErrorCode.FENCED),
    (TimelineNotFoundError, ErrorCode.NO_TIMELINE),
    (TimelineDeletedError, ErrorCode.NO_TIMELINE),
    (RefusedError, ErrorCode.REFUSED),
    (CorruptionError, ErrorCode.CORRUPTION),
    (RetryableError, ErrorCode.RETRYABLE),
)


def error_response(error: ExcimerError) -> ErrorResponse:
    code = next((code for family, code in _CODE_OF_FAMILY if isinstance(error, family)), ErrorCode.RETRYABLE)
    return ErrorResponse(code, str(error))


class ProposerPort:
    """Accepts on the event loop; each connection then lives in its thread until `close`."""

    def __init__(
        self,
        listening: socket.socket,
        door: TimelineDoor,
        metrics: SafekeeperMetrics,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self._listening = listening
        self._door = door
        self._metrics = metrics
        self._gate = ConnectionGate("proposer_listen", process_limits(limits))
        self._ids = itertools.count(1)
        self._connections: dict[ConnectionId, _Connection] = {}
        self._lock = threading.Lock()

    async def serve(self) -> None:
        """Until cancelled."""
        async with TaskScope() as scope:
            scope.start("expired proposers", self._end_expired())
            await accept_connections(self._listening, self._gate, self._accepted)

    async def _end_expired(self) -> None:
        """A thread that receives natively does not look at its token, so this does."""
        while True:
            await asyncio.sleep(EXPIRY_CHECK_S)
            with self._lock:
                connections = list(self._connections.values())
            for connection in connections:
                try:
                    if connection.claims is not None:
                        self._door.check_current(connection.claims)
                except TokenExpiredError as error:
                    log.warning("proposer connection ends", connection=connection.id, error=error)
                    connection.shut_down()

    def _accepted(self, admission: Admission) -> None:
        connection = _Connection(ConnectionId(next(self._ids)), admission)
        with self._lock:
            self._connections[connection.id] = connection
        connection.thread = threading.Thread(
            target=self._run, args=(connection,), name=f"proposer-{connection.id}", daemon=True
        )
        try:
            connection.thread.start()
        except RuntimeError as error:  # the system gives no more threads
            log.error("a proposer cannot be served", error=error)
            connection.thread = None
            self._forget(connection)

    def close(self) -> None:
        """Ends all connections and waits for their threads. Blocks."""
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            connection.shut_down()
        for connection in connections:
            if connection.thread is not None:
                connection.thread.join(_CLOSE_TIMEOUT_S)

    def tell_needs(self, timeline: SafekeeperTimeline, needs: HotStandbyFeedback) -> None:
        """Tells whoever writes the timeline what its standbys need. Blocks."""
        with self._lock:
            writers = [each for each in self._connections.values() if each.timeline is timeline]
        for connection in writers:
            connection.send(StandbysNeed(needs.xmin, needs.catalog_xmin))

    def _run(self, connection: "_Connection") -> None:
        self._metrics.proposers.inc()
        try:
            failure_of(lambda: self._serve_connection(connection))
        finally:
            self._metrics.proposers.dec()
            if connection.timeline is not None:
                connection.timeline.disconnected(connection.id)
            self._forget(connection)

    def _forget(self, connection: "_Connection") -> None:
        with self._lock:
            self._connections.pop(connection.id, None)
        connection.close()

    def _serve_connection(self, connection: "_Connection") -> None:
        try:
            connection.receive_all(lambda messages: self._handle(connection, messages))
        except ExcimerError as error:
            log.warning("proposer connection ends", connection=connection.id, error=error)
            connection.send(error_response(error))
        except OSError as error:
            log.info("proposer connection lost", connection=connection.id, error=error)

    def _handle(self, connection: "_Connection", frames: Sequence[ProposerFrame]) -> None:
        timeline = connection.timeline
        if timeline is None:
            greeting = frames[0]
            if not isinstance(greeting, ProposerGreeting):
                raise RefusedError("a proposer greets first")
            timeline = self._enter(connection, greeting.token, greeting.identity)
            connection.greeted()
            connection.timeline = timeline
        messages: list[ProposerMessage] = []
        for frame in frames:
            if isinstance(frame, TokenRenewal):
                self._enter(connection, frame.token, timeline.identity)
            else:
                messages.append(frame)
        if messages:
            self._send(timeline.handle(connection.id, messages))

    def _enter(self, connection: "_Connection", token: str, identity: TimelineIdentity) -> SafekeeperTimeline:
        timeline, connection.claims = self._door.enter(
            token, Right.WRITE_WAL, identity.tenant_id, identity.timeline_id
        )
        return timeline

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        for connection_id, message in outgoing:
            with self._lock:
                connection = self._connections.get(connection_id)
            if connection is not None:
                connection.send(message)


class _Connection:
    """One socket. Received by its own thread; other threads may send."""

    def __init__(self, connection_id: ConnectionId, admission: Admission) -> None:
        self.id = connection_id
        self.timeline: SafekeeperTimeline | None = None
        self.claims: Claims | None = None
        self.thread: threading.Thread | None = None
        self._admission = admission
        self._socket = admission.socket
        self._channel = server_channel(self._socket)
        self._socket.setblocking(True)
        # The kernel's own timeouts: Python's would cost a poll before each call.
        with contextlib.suppress(OSError):  # gone already: receiving will say so
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_TIMEOUT_S))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(IDLE_TIMEOUT_S))

    def greeted(self) -> None:
        """Raises `TooManyConnectionsError`."""
        self._admission.authenticated()

    def receive_all(self, handle: Callable[[Sequence[ProposerFrame]], None]) -> None:
        """Calls `handle` with the messages that each `recv` completed, until the peer closes.

        Raises OSError, `MalformedFrameError`, and what `handle` and the timeline's `serve` raise.
        """
        if isinstance(self._channel, TlsChannel):
            self._channel.handshake()
        parser = ProposerMessageParser()
        buffer = bytearray(_RECEIVE_SIZE_BYTES)
        view = memoryview(buffer)
        while (size := self._receive(parser, buffer)) > 0:
            messages = parser.feed(view[:size])
            if messages:
                handle(messages)

    def _receive(self, parser: ProposerMessageParser, buffer: bytearray) -> int:
        """Some bytes of messages, which begin where a message does unless a large one has come in part."""
        if self.timeline is None or parser.rest_size_bytes > len(buffer) // 2:
            return self._channel.receive_into(buffer)
        rest = parser.take_rest()
        buffer[: len(rest)] = rest
        return self.timeline.serve(self.id, self._channel, buffer, len(rest))

    def send(self, message: AcceptorFrame) -> None:
        """A failure is seen by the receiving thread, as the end of the connection."""
        if not self._channel.send_all(encode_acceptor_message(message)):
            log.debug("answer not sent", connection=self.id)

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._admission.release()
        self._channel.close()
        self._socket.close()


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
