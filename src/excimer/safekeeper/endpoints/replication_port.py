"""The port of WAL readers: PostgreSQL's physical replication protocol, for our services and stock tools.

::

    psql-style start-up with options='-c excimer.tenant_id=… -c excimer.timeline_id=…', the token as password
    IDENTIFY_SYSTEM, SHOW …, READ_REPLICATION_SLOT …      (pg_receivewal, walreceiver)
    START_REPLICATION … X/X      WAL up to the commit LSN (C3), then as it is committed
    CONFIRM_DURABLE X/X          from a pageserver: everything below is durable in object storage (D2)

WAL below the timeline's start is zeros, as far as the segment reaches that the start lies in: stock
receivers begin with whole segments. Below what has been removed nothing is read: 58P01. Slots do not exist
here: WAL is kept for whoever is connected, or was a minute ago, up to a limit (`wal_retention`).

Not here: what is committed (`consensus.acceptor`), protocol framing (`wire.pg_server`).
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import assert_never

from excimer.base.clock import Clock
from excimer.base.errors import (
    CorruptionError,
    ExcimerError,
    FencedError,
    NotFoundError,
    RefusedError,
    RetryableError,
)
from excimer.base.ids import parse_tenant_id, parse_timeline_id
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, format_lsn
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.registry import TimelineNotFoundError
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.safekeeper.timeline_door import TimelineDoor, confirms_durability
from excimer.safekeeper.wal_retention import ReaderPosition
from excimer.safekeeper.wal_storage import WalMissingError
from excimer.service.accept import accept_connections
from excimer.service.connections import Admission, ConnectionGate, ConnectionLimits, process_limits
from excimer.service.logs import get_logger
from excimer.service.postgres_tls import open_postgres_streams
from excimer.service.replication_server import ReplicationServerStream
from excimer.service.tasks import TaskScope
from excimer.wire import pg_messages as pg
from excimer.wire.auth import AuthError, Claims, Right, RightMissingError, TokenExpiredError
from excimer.wire.pg_server import (
    CopyDataReceived,
    CopyDoneReceived,
    PasswordReceived,
    QueryReceived,
    StartupReceived,
)
from excimer.wire.replication import (
    POSTGRES_TIMELINE,
    ConfirmDurable,
    CreateReplicationSlot,
    EmptyCommand,
    HotStandbyFeedback,
    IdentifySystem,
    ReadReplicationSlot,
    Show,
    StandbyStatus,
    StartReplication,
    SystemIdentity,
    TimelineHistory,
    decode_from_client,
    encode_system_identity,
    parse_command,
    parse_options,
)

KEEPALIVE_INTERVAL_S = 1.0
CHUNK_SIZE_BYTES = 128 << 10
"""As PostgreSQL's own walsender (MAX_SEND_SIZE)."""
GATHER_S = 0.02
"""A reader that has everything gets more after this time at the earliest. Each message costs the reader as
much as hundreds of records do, on the same cores that commits need when all runs on one machine."""
_OPTION_TENANT = "excimer.tenant_id"
_OPTION_TIMELINE = "excimer.timeline_id"

TellNeeds = Callable[[SafekeeperTimeline, HotStandbyFeedback], None]

log = get_logger(__name__)

SQLSTATE_OF_FAMILY: tuple[tuple[type[ExcimerError], str], ...] = (
    (AuthError, "28P01"),
    (pg.ProtocolViolationError, "08P01"),
    (NotFoundError, "3D000"),
    (FencedError, "57P01"),
    (RefusedError, "0A000"),
    (RetryableError, "57P03"),
    (CorruptionError, "XX001"),
)
"""First match counts."""


class WalRemovedError(RefusedError):
    """WAL below the oldest segment was asked for, or the reader was too slow and its WAL has gone."""


class WalAheadError(RetryableError):
    """WAL was asked for that this safekeeper does not have yet: ask another, or later."""


class SlotMissingError(NotFoundError):
    """Safekeepers keep no replication slots."""


def sqlstate_of(error: ExcimerError) -> str:
    if isinstance(error, WalRemovedError | WalMissingError):
        return "58P01"
    if isinstance(error, SlotMissingError):
        return "42704"
    return next((state for family, state in SQLSTATE_OF_FAMILY if isinstance(error, family)), "XX000")


class ReplicationPort:
    """Serves connections until its task is cancelled."""

    def __init__(
        self,
        listening: socket.socket,
        door: TimelineDoor,
        clock: Clock,
        metrics: SafekeeperMetrics,
        limits: ConnectionLimits | None = None,
        tell_needs: TellNeeds = lambda timeline, needs: None,
    ) -> None:
        """`tell_needs` takes what the hot standbys need to whoever writes the timeline; it may block."""
        self._listening = listening
        self._door = door
        self._clock = clock
        self._metrics = metrics
        self._tell_needs = tell_needs
        self._gate = ConnectionGate("replication_listen", process_limits(limits))

    async def serve(self) -> None:
        """Until cancelled; then all connections end."""
        async with TaskScope() as scope:

            def accepted(admission: Admission) -> None:
                scope.contain("wal reader", self._serve_connection(admission))

            await accept_connections(self._listening, self._gate, accepted)

    async def _serve_connection(self, admission: Admission) -> None:
        self._metrics.readers.inc()
        writer = None
        try:
            streams = await open_postgres_streams(admission)
            if streams is None:
                return
            reader, writer = streams
            session = _Session(
                reader, writer, admission, self._door, self._clock, self._metrics, self._tell_needs
            )
            await session.run()
        except OSError as error:
            log.info("WAL reader lost", error=error)
        finally:
            admission.release()
            self._metrics.readers.dec()
            if writer is not None:
                writer.close()
            else:
                admission.socket.close()


class _Session:
    """One client, from start-up to its end."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        admission: Admission,
        door: TimelineDoor,
        clock: Clock,
        metrics: SafekeeperMetrics,
        tell_needs: TellNeeds,
    ) -> None:
        self._tell_needs = tell_needs
        self._stream = ReplicationServerStream(reader, writer)
        self._admission = admission
        self._door = door
        self._clock = clock
        self._metrics = metrics
        self._sent_lsn = Lsn(0)
        self._claims: Claims | None = None

    async def run(self) -> None:
        """Answers errors as FATAL and returns. Raises OSError when the connection is lost."""
        try:
            timeline = await self._login()
            if timeline is not None:
                await self._serve_until_expiry(timeline)
        except ExcimerError as error:
            # A pageserver may hear of a timeline before this safekeeper does: it comes again.
            is_early = isinstance(error, TimelineNotFoundError)
            (log.info if is_early else log.warning)("WAL reader refused", error=error)
            self._stream.write(pg.encode_error(str(error), sqlstate_of(error), severity="FATAL"))
            with contextlib.suppress(OSError):
                await self._stream.drain()

    async def _login(self) -> SafekeeperTimeline | None:
        startup = await self._stream.next_event()
        if not isinstance(startup, StartupReceived):
            return None
        self._stream.write(pg.AUTHENTICATION_CLEARTEXT)
        answer = await self._stream.next_event()
        if not isinstance(answer, PasswordReceived):
            return None
        timeline = self._authenticate(startup.parameters, answer.password)
        self._stream.authenticated()
        version = f"{timeline.identity.pg_version}.0"
        for name, value in (
            ("server_version", version),
            ("server_encoding", "UTF8"),
            ("client_encoding", startup.parameters.get("client_encoding", "UTF8")),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
        ):
            self._stream.write(pg.encode_parameter_status(name, value))
        self._stream.write(pg.READY_FOR_QUERY)
        return timeline

    def _authenticate(self, parameters: dict[str, str], password: str) -> SafekeeperTimeline:
        if parameters.get("replication", "").lower() not in ("true", "on", "yes", "1"):
            raise RefusedError(
                "a safekeeper answers replication connections only: connect with replication=true"
            )
        options = parse_options(parameters.get("options", ""))
        if _OPTION_TENANT not in options or _OPTION_TIMELINE not in options:
            raise RefusedError(f"name the timeline: options='-c {_OPTION_TENANT}=… -c {_OPTION_TIMELINE}=…'")
        tenant_id = parse_tenant_id(options[_OPTION_TENANT])
        timeline_id = parse_timeline_id(options[_OPTION_TIMELINE])
        timeline, self._claims = self._door.enter(password, Right.READ_WAL, tenant_id, timeline_id)
        self._admission.authenticated()
        self._stream.write(pg.AUTHENTICATION_OK)
        return timeline

    async def _serve_until_expiry(self, timeline: SafekeeperTimeline) -> None:
        """A reader with a newer token connects again: PostgreSQL's protocol has no way to show it later."""
        assert self._claims is not None
        expires = self._claims.exp
        try:
            async with asyncio.timeout(None if expires is None else expires - self._clock.now()) as life:
                await self._serve_queries(timeline)
        except TimeoutError as error:
            if not life.expired():  # ETIMEDOUT of the socket is a TimeoutError too: the connection is lost
                raise
            raise TokenExpiredError from error

    async def _serve_queries(self, timeline: SafekeeperTimeline) -> None:
        while True:
            await self._stream.drain()
            event = await self._stream.next_event()
            if event is None:
                return
            if not isinstance(event, QueryReceived):
                continue
            try:
                command = parse_command(event.query)
                if isinstance(command, StartReplication):
                    await self._send_from(timeline, command)
                elif isinstance(command, ConfirmDurable):
                    self._confirm(timeline, command.lsn)
                    self._stream.write(pg.encode_command_complete("CONFIRM_DURABLE") + pg.READY_FOR_QUERY)
                else:
                    self._stream.write(_answer(timeline, command))
            except RefusedError as error:
                self._stream.write(pg.encode_error(str(error), sqlstate_of(error)) + pg.READY_FOR_QUERY)

    async def _send_from(self, timeline: SafekeeperTimeline, command: StartReplication) -> None:
        """CopyBoth until the client ends it. Raises errors before it begins, and fatal ones."""
        _check_start(timeline, command)
        self._sent_lsn = command.start_lsn
        with self._keeping_place(timeline, command.start_lsn) as position:
            self._stream.begin_copy()
            async with TaskScope() as scope:
                sending = scope.start("send WAL", self._send_wal(timeline))
                try:
                    is_connected = await self._receive_status(timeline, position)
                finally:
                    needs = timeline.standbys.leave(self)
                    if needs is not None:
                        await asyncio.shield(asyncio.to_thread(self._tell_needs, timeline, needs))
                sending.cancel()
        self._stream.end_copy(is_connected)

    @contextlib.contextmanager
    def _keeping_place(self, timeline: SafekeeperTimeline, start_lsn: Lsn) -> Iterator[ReaderPosition]:
        """The reader's position, for which WAL is kept; but not a pageserver's.

        What that needs is what it has not called durable, and its position is only where it was when it last
        spoke: an archived branch's WAL would stay for it although all of it is durable.
        """
        if self._claims is not None and confirms_durability(self._claims):
            yield ReaderPosition(start_lsn)
            return
        position = timeline.readers.enter(start_lsn)
        try:
            yield position
        finally:
            timeline.readers.leave(position, self._clock.monotonic())

    async def _send_wal(self, timeline: SafekeeperTimeline) -> None:
        """Until cancelled. Chunks end at page boundaries or at the commit LSN, which ends a record."""
        segment_size_bytes = timeline.identity.wal_segment_size_bytes
        while True:
            commit_lsn = timeline.commit_lsn
            if self._sent_lsn >= commit_lsn:
                await asyncio.sleep(GATHER_S)
                if not await timeline.commits.wait_beyond(self._sent_lsn, KEEPALIVE_INTERVAL_S):
                    self._send_keepalive(timeline)
                    await self._stream.drain()
                continue
            end_lsn = Lsn(min(commit_lsn, _page_start(self._sent_lsn + CHUNK_SIZE_BYTES)))
            if commit_lsn - self._sent_lsn > segment_size_bytes:  # old WAL may not be in memory
                wal = await asyncio.to_thread(timeline.read_wal, self._sent_lsn, end_lsn)
            else:
                wal = timeline.read_wal(self._sent_lsn, end_lsn)
            self._stream.send_wal(self._sent_lsn, wal, commit_lsn, self._clock.now())
            self._sent_lsn = end_lsn
            self._metrics.sent_bytes.inc(len(wal))
            await self._stream.drain()
            if end_lsn == commit_lsn:
                await asyncio.sleep(GATHER_S)

    def _send_keepalive(self, timeline: SafekeeperTimeline) -> None:
        timeline.check_open()
        self._stream.send_keepalive(timeline.commit_lsn, self._clock.now())

    async def _receive_status(self, timeline: SafekeeperTimeline, position: ReaderPosition) -> bool:
        """Reads the client's side of the copy; False when the connection ended with it."""
        while True:
            event = await self._stream.next_event()
            if event is None:
                return False
            if isinstance(event, CopyDoneReceived):
                return True
            if isinstance(event, CopyDataReceived):
                message = decode_from_client(event.payload)
                if not isinstance(message, StandbyStatus):
                    needs = timeline.standbys.tell(self, message)
                    await asyncio.to_thread(self._tell_needs, timeline, needs)
                    continue
                position.lsn = max(position.lsn, message.flush_lsn)
                if self._claims is not None and confirms_durability(self._claims):
                    timeline.confirm_durable(message.flush_lsn)
                if message.is_reply_requested:
                    self._send_keepalive(timeline)

    def _confirm(self, timeline: SafekeeperTimeline, lsn: Lsn) -> None:
        if self._claims is None or not confirms_durability(self._claims):
            raise RightMissingError("only a pageserver can say what is durable in object storage")
        timeline.confirm_durable(lsn)


def _page_start(lsn: int) -> int:
    return lsn - lsn % WAL_PAGE_SIZE_BYTES


def _check_start(timeline: SafekeeperTimeline, command: StartReplication) -> None:
    if command.slot is not None:
        raise SlotMissingError(f'replication slot "{command.slot}" does not exist: safekeepers keep no slots')
    if command.postgres_timeline not in (None, POSTGRES_TIMELINE):
        raise RefusedError(f"there is no PostgreSQL timeline {command.postgres_timeline}; all WAL is on 1")
    if command.start_lsn < timeline.first_lsn():
        raise WalRemovedError(
            f"requested WAL at {format_lsn(command.start_lsn)} is not kept: "
            + (
                f"this timeline begins at {format_lsn(timeline.start_lsn)}"
                if timeline.wal_start_lsn == timeline.start_lsn
                else f"it was removed below {format_lsn(timeline.wal_start_lsn)}, being in object storage"
            )
        )
    newest_lsn = max(timeline.flush_lsn, timeline.commit_lsn)
    if command.start_lsn > newest_lsn:
        raise WalAheadError(
            f"requested starting point {format_lsn(command.start_lsn)} is ahead of "
            f"this safekeeper's WAL, which ends at {format_lsn(newest_lsn)}"
        )


def _answer(
    timeline: SafekeeperTimeline,
    command: IdentifySystem
    | Show
    | TimelineHistory
    | CreateReplicationSlot
    | ReadReplicationSlot
    | EmptyCommand,
) -> bytes:
    """The whole answer to a command that is not START_REPLICATION. Raises RefusedError."""
    match command:
        case IdentifySystem():
            identity = SystemIdentity(timeline.identity.system_id, POSTGRES_TIMELINE, timeline.commit_lsn)
            return encode_system_identity(identity)
        case Show(name):
            row: list[bytes | None] = [_setting(timeline, name).encode()]
            return pg.encode_result([pg.Column(name)], [row], "SHOW")
        case ReadReplicationSlot():
            columns = [
                pg.Column("slot_type"),
                pg.Column("restart_lsn"),
                pg.Column("restart_tli", pg.INT8_OID, 8),
            ]
            return pg.encode_result(columns, [[None, None, None]], "READ_REPLICATION_SLOT")
        case TimelineHistory(number):
            raise WalRemovedError(f"there is no history of PostgreSQL timeline {number}; all WAL is on 1")
        case CreateReplicationSlot():
            raise RefusedError("safekeepers keep no replication slots: connect without one")
        case EmptyCommand():
            return pg.EMPTY_QUERY_RESPONSE + pg.READY_FOR_QUERY
        case _:
            assert_never(command)


def _setting(timeline: SafekeeperTimeline, name: str) -> str:
    if name == "wal_segment_size":
        return f"{timeline.identity.wal_segment_size_bytes >> 20}MB"
    if name == "data_directory_mode":
        return "0700"
    if name == "server_version":
        return f"{timeline.identity.pg_version}.0"
    raise RefusedError(f'unrecognized configuration parameter "{name}"')
