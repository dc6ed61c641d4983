"""One timeline: its acceptor, its WAL and its control file under one lock.

Proposer connections are threads with blocking sockets: from the socket through the disk to the
acknowledgement nothing changes threads, which is what commit latency is made of (a hop to a thread
pool and back cost as much again as the fdatasync, 0.34 against 0.18 ms). All appends that one
`recv` brought share one fdatasync.

Messages come in two ways, of which each takes the acceptor as the other left it::

    handle    any message: the acceptor's effects, one after the other
    serve     appends in a row from one connection, natively (`_native/append_path.pyx`)

`handle` closes the append path before it does anything, and opens it after an append or a commit
announcement, when nothing waits to be flushed.

When the disk refuses, the acceptor is ahead of it: it is thrown away and made anew from what is
durable, as after a crash. Nothing was acknowledged in between.

Not here: sockets (`endpoints.proposer_port`), what may be accepted (`consensus.acceptor`).
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from excimer._native.append_path import AppendPath
from excimer._native.channel import Channel
from excimer._native.wal_scanner import WalScanner
from excimer.base.clock import Monotonic
from excimer.base.errors import FencedError, RetryableError
from excimer.base.ids import NodeId
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.consensus.acceptor import (
    Acceptor,
    AcceptorEffect,
    AcceptorState,
    CommitAdvanced,
    ConnectionId,
    DiscardWal,
    FlushWal,
    PersistControl,
    ReadWal,
    Send,
    TruncateWal,
    WriteWal,
)
from excimer.pgformat.wal_segment import InvalidWalError
from excimer.safekeeper.commit_watch import CommitWatch
from excimer.safekeeper.control_file import ControlRecord, read_control_file, write_control_file
from excimer.safekeeper.disk import Disk
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.recovery import check_committed, find_end_of_wal, new_scanner
from excimer.safekeeper.standby_needs import StandbyNeeds
from excimer.safekeeper.wal_retention import WRITER_RETURN_S, Floor, ReaderPositions, WalNeeds
from excimer.safekeeper.wal_storage import WalStorage
from excimer.service.logs import get_logger
from excimer.wire.safekeeping import (
    AcceptorMessage,
    AppendRequest,
    CommitAnnounce,
    ProposerMessage,
    WalChunk,
)

log = get_logger(__name__)

Outgoing = tuple[ConnectionId, AcceptorMessage]
_IN_A_ROW = (AppendRequest, CommitAnnounce)
"""Messages that a flush may wait for, and after which more appends are to be expected."""


class TimelineClosedError(RetryableError):
    """The safekeeper is stopping."""


class TimelineDeletedError(FencedError):
    """The timeline was deleted."""


class SafekeeperTimeline:
    """Made on the event loop, used from threads. All methods may block for the disk."""

    def __init__(
        self,
        directory: Path,
        *,
        disk: Disk,
        preparer: ThreadPoolExecutor,
        metrics: SafekeeperMetrics,
    ) -> None:
        """Reads the control file, finds the end of WAL. Raises CorruptionError, OSError."""
        record = read_control_file(directory)
        self.directory = directory
        self.node_id: NodeId = record.node_id
        self.identity = record.identity
        self.start_lsn = record.timeline_start_lsn
        self.commits = CommitWatch(record.commit_lsn)
        self.readers = ReaderPositions()
        self.standbys = StandbyNeeds()
        self.wal_start_lsn = max(record.wal_start_lsn, record.timeline_start_lsn)
        """WAL below has been removed, or is about to be."""
        self._may_have_leftovers = True
        """Files below `wal_start_lsn`, of a removal that was broken off."""
        self._durable_lsn = record.durable_lsn
        self._disk = disk
        self._preparer = preparer
        self._metrics = metrics
        self._append_path = AppendPath(
            self.commits.mark,
            failed=self._append_failed,
            notify=self._count_appends,
            disk=None if type(disk) is Disk else disk,
        )
        self._lock = self._append_path.lock
        self._closed: RetryableError | FencedError | None = None
        self._persisted_commit_lsn = record.commit_lsn
        self._persisted_lsns = (INVALID_LSN, INVALID_LSN, INVALID_LSN)
        self._flush: FlushWal | None = None
        self._writers: set[ConnectionId] = set()
        self._writer_seen_at: Monotonic | None = None
        self._acceptor: Acceptor | None = None
        self._storage = self._new_storage(record.commit_lsn)
        self._scanner: WalScanner
        self._load(record.state, self._storage.end_lsn())

    @staticmethod
    def create(directory: Path, record: ControlRecord, disk: Disk) -> None:
        """A new timeline's directory, whole and durable once it bears its name. Raises OSError."""
        temporary = directory.with_name(directory.name + ".new")
        temporary.mkdir(parents=True, exist_ok=True)
        write_control_file(temporary, record, disk)
        temporary.rename(directory)
        disk.sync_directory(directory.parent)
        disk.sync_directory(directory.parent.parent)

    @property
    def commit_lsn(self) -> Lsn:
        return self.commits.commit_lsn

    @property
    def flush_lsn(self) -> Lsn:
        acceptor = self._acceptor
        return self._storage.flush_lsn if acceptor is None else acceptor.flush_lsn

    @property
    def term(self) -> int:
        acceptor = self._acceptor
        return 0 if acceptor is None else acceptor.state.promised_term

    def handle(self, connection: ConnectionId, messages: Sequence[ProposerMessage]) -> list[Outgoing]:
        """Carries out what a proposer sent, and returns what to send after everything is durable.

        Raises RefusedError (answer it and close), RetryableError (the disk; close, the proposer comes
        again), CorruptionError.
        """
        with self._lock:
            self._close_append_path()
            self._writers.add(connection)
            acceptor = self._usable()
            acceptor.durable_lsn = self._durable_lsn
            outgoing: list[Outgoing] = []
            try:
                for message in messages:
                    if not isinstance(message, _IN_A_ROW):
                        self._flush_written(outgoing)
                    self._carry_out(acceptor.receive(connection, message), outgoing)
                self._flush_written(outgoing)
            except (OSError, RetryableError, InvalidWalError) as error:
                self._discard_acceptor(error)
                raise
            if isinstance(messages[-1], _IN_A_ROW):
                self._open_append_path(connection, acceptor)
            return outgoing

    def serve(self, connection: ConnectionId, channel: Channel, buffer: bytearray, size_bytes: int) -> int:
        """Receives from a channel; answers plain appends itself, for as long as they come.

        The first `size_bytes` of `buffer` are the beginning of a message that has come in part. Returns how
        many bytes at the buffer's start it has left, of which `handle` gets the messages; 0 when the peer
        has closed. Raises OSError for the socket, and as `handle` does.
        """
        return self._append_path.serve(connection, channel, buffer, size_bytes)

    def disconnected(self, connection: ConnectionId) -> None:
        with self._lock:
            if self._append_path.open_to == connection:
                self._close_append_path()
            self._writers.discard(connection)
            if self._acceptor is not None:
                self._acceptor.disconnected(connection)

    @property
    def writers(self) -> int:
        """Proposers that are connected."""
        return len(self._writers)

    def read_wal(self, start_lsn: Lsn, end_lsn: Lsn) -> bytes:
        """Stored bytes; zeros below the timeline's start. Raises `WalMissingError`."""
        return self._storage.read(start_lsn, end_lsn)

    def first_lsn(self) -> Lsn:
        """Where readers may begin: with the segment in which the timeline starts, of which they get zeros
        before it, but not in what was skipped of a segment.
        """
        if self.wal_start_lsn > self.start_lsn:
            return self.wal_start_lsn
        return self._segment_start(self.start_lsn)

    def _segment_start(self, lsn: Lsn) -> Lsn:
        return Lsn(lsn - lsn % self.identity.wal_segment_size_bytes)

    def check_open(self) -> None:
        """Raises why this timeline can no longer be used, if it cannot."""
        if self._closed is not None:
            raise self._closed

    @property
    def has_lsns_to_persist(self) -> bool:
        """Whether commit LSN, horizon or durable LSN have moved."""
        acceptor = self._acceptor
        return acceptor is not None and self._moving_lsns(acceptor.state) != self._persisted_lsns

    def persist_lsns(self) -> None:
        """Puts LSNs that have moved on disk: after a kill, readers go on from there, and WAL may go.

        Raises OSError.
        """
        with self._lock:
            if self._closed is None and self._acceptor is not None and self.has_lsns_to_persist:
                self._persist(self._acceptor.state)

    def _moving_lsns(self, state: AcceptorState) -> tuple[Lsn, Lsn, Lsn]:
        return state.commit_lsn, state.horizon_lsn, self._durable_lsn

    # Removal of WAL (D2)

    def confirm_durable(self, lsn: Lsn) -> None:
        """The pageserver has made everything below `lsn` durable in object storage. Any thread."""
        self._durable_lsn = max(self._durable_lsn, lsn)

    @property
    def horizon_lsn(self) -> Lsn:
        """Every member has what is below; not known while the disk refuses."""
        acceptor = self._acceptor
        return self.start_lsn if acceptor is None else acceptor.state.horizon_lsn

    def wal_needs(self, now: Monotonic) -> WalNeeds:
        """On the event loop."""
        if self._writers or self._writer_seen_at is None:
            self._writer_seen_at = now
        return WalNeeds(
            self._durable_lsn,
            self.horizon_lsn,
            self.commit_lsn,
            self.readers.lsns(now),
            has_writer=now - self._writer_seen_at < WRITER_RETURN_S,
        )

    def has_removable_wal(self, floor: Floor) -> bool:
        """Whether a whole segment lies below the floor."""
        return self._may_have_leftovers or self._segment_start(floor.lsn) > self.wal_start_lsn

    def remove_wal(self, floor: Floor) -> int:
        """Removes segments below the floor; how many bytes they had. Blocks. Raises OSError.

        The control file says so first: after a crash, files that it does not speak of are not missed.
        """
        with self._lock:
            acceptor = self._acceptor
            if self._closed is not None or acceptor is None:
                return 0
            self._may_have_leftovers = True
            before_lsn, wal_start_lsn = self.wal_start_lsn, self._segment_start(floor.lsn)
            if wal_start_lsn > before_lsn:
                self.wal_start_lsn = wal_start_lsn
                try:
                    self._persist(acceptor.state)
                except OSError:
                    self.wal_start_lsn = before_lsn
                    raise
                acceptor.wal_start_lsn = wal_start_lsn
        size_bytes = self._storage.remove_below(self.wal_start_lsn)
        self._may_have_leftovers = False
        return size_bytes

    @property
    def durable_lsn(self) -> Lsn:
        return self._durable_lsn

    @property
    def stored_size_bytes(self) -> int:
        """What its segments take on disk. Blocks, briefly."""
        return self._storage.stored_size_bytes

    def close(self, reason: RetryableError | FencedError) -> None:
        """Ends all use; whoever comes later gets `reason`. Puts the commit LSN on disk if it can."""
        with self._lock:
            if self._closed is not None:
                return
            self._closed = reason
            self._close_append_path()
            if self._acceptor is not None and not isinstance(reason, TimelineDeletedError):
                try:
                    self._persist(self._acceptor.state)
                except OSError as error:
                    log.warning("commit LSN not saved", error=error, timeline_id=self.identity.timeline_id)
            self._storage.close()

    def _open_append_path(self, connection: ConnectionId, acceptor: Acceptor) -> None:
        """If `connection` may go on appending, and all that it has appended is durable."""
        span = self._storage.open_span()
        if span is None or acceptor.accepted.streaming_connection != connection:
            return
        segment_size_bytes = self.identity.wal_segment_size_bytes
        self._append_path.open(
            connection,
            acceptor.accepted,
            self._scanner,
            fd=span.fd,
            segment_start_lsn=span.segment_start_lsn,
            end_lsn=span.end_lsn,
            # `_committed` puts the first commit LSN of each segment on disk.
            commit_end_lsn=(self._persisted_commit_lsn // segment_size_bytes + 1) * segment_size_bytes,
        )

    def _close_append_path(self) -> None:
        if self._append_path.open_to is not None and self._acceptor is not None:
            self._storage.flushed_beside(self._acceptor.flush_lsn)
        self._append_path.close()
        self._count_flushes(*self._append_path.take_flushes())

    def _append_failed(self, error: Exception) -> Exception:
        """Called with the lock held. The error as `handle` raises it."""
        if self._acceptor is not None:
            self._storage.flushed_beside(self._acceptor.flush_lsn)
        failure = self._storage.as_failure(error) if isinstance(error, OSError) else error
        self._discard_acceptor(failure)
        return failure

    def _count_appends(self, flush_seconds: list[float], size_bytes: int, has_risen: bool) -> None:
        if has_risen:
            self.commits.wake()
        self._count_flushes(flush_seconds, size_bytes)

    def _count_flushes(self, flush_seconds: list[float], size_bytes: int) -> None:
        for seconds in flush_seconds:
            self._metrics.flush_seconds.observe(seconds)
        self._metrics.wal_bytes.inc(size_bytes)

    def _usable(self) -> Acceptor:
        self.check_open()
        if self._acceptor is None:
            # Not below what this process has served: a boundary that is durable here.
            state = read_control_file(self.directory).state
            state = replace(state, commit_lsn=max(state.commit_lsn, self.commits.commit_lsn))
            self._load(state, self._storage.flush_lsn)
        assert self._acceptor is not None
        return self._acceptor

    def _load(self, state: AcceptorState, limit_lsn: Lsn) -> None:
        """Makes the acceptor from what is durable; WAL at and above `limit_lsn` does not count.

        The control file is put on disk anew: the one that was read may be a renamed one whose directory
        was never synced, and a promise it holds is about to be spoken (C2).
        """
        self._persist(state)
        start_lsn = state.commit_lsn
        check_committed(self._storage, self.identity, self.wal_start_lsn, start_lsn)
        end_lsn = find_end_of_wal(self._storage, self.identity, start_lsn, limit_lsn)
        self._storage.rewrite(start_lsn, end_lsn)
        acceptor = Acceptor(
            node_id=self.node_id,
            identity=self.identity,
            timeline_start_lsn=self.start_lsn,
            state=state,
            recovered_end_lsn=end_lsn,
            wal_start_lsn=self.wal_start_lsn,
            durable_lsn=self._durable_lsn,
        )
        self._flush = None
        self._carry_out(acceptor.start(), [])
        self._acceptor = acceptor

    def _new_storage(self, flush_lsn: Lsn) -> WalStorage:
        return WalStorage(
            self.directory,
            self.identity.wal_segment_size_bytes,
            flush_lsn,
            disk=self._disk,
            preparer=self._preparer,
        )

    def _discard_acceptor(self, error: Exception) -> None:
        self._metrics.disk_failures.inc()
        log.error("timeline stops acknowledging", error=error, timeline_id=self.identity.timeline_id)
        self._acceptor = None
        self._storage.revert()

    def _carry_out(self, effects: Sequence[AcceptorEffect], outgoing: list[Outgoing]) -> None:
        """In the order given, each done before the next; only flushes wait for the end of the batch."""
        for effect in effects:
            match effect:
                case WriteWal(lsn, wal):
                    self._scanner.feed(wal)  # before it is stored: what is not WAL never is
                    self._storage.write(lsn, wal)
                case FlushWal():
                    self._flush = effect
                case Send(connection, message):
                    outgoing.append((connection, message))
                case CommitAdvanced(commit_lsn):
                    self._committed(commit_lsn)
                case PersistControl(state):
                    self._persist(state)
                case TruncateWal(lsn):
                    self._storage.truncate(lsn)
                    self._scanner = new_scanner(self.identity, lsn)
                case DiscardWal(state):
                    self._discard_wal(state)
                case ReadWal(connection, term, start_lsn, end_lsn):
                    wal_bytes = self._storage.read(start_lsn, end_lsn)
                    outgoing.append((connection, WalChunk(term, start_lsn, wal_bytes)))
                case _:
                    assert_never(effect)

    def _discard_wal(self, state: AcceptorState) -> None:
        """The control file first: after a crash, files below what it says are not missed."""
        before_lsn, lsn = self.wal_start_lsn, state.commit_lsn
        self.wal_start_lsn = lsn
        try:
            self._persist(state)
        except OSError:
            self.wal_start_lsn = before_lsn
            raise
        self._may_have_leftovers = True
        end_lsn = self._storage.write_lsn
        self._storage.discard(lsn)
        self._scanner = new_scanner(self.identity, lsn)
        self._metrics.skipped_bytes.inc(lsn - end_lsn)
        log.warning(
            "WAL skipped: no other safekeeper has it any more, and it is in object storage",
            timeline_id=self.identity.timeline_id,
            from_lsn=end_lsn,
            to_lsn=lsn,
        )

    def _flush_written(self, outgoing: list[Outgoing]) -> None:
        flush, self._flush = self._flush, None
        if flush is None or self._acceptor is None:
            return
        before_lsn = self._storage.flush_lsn
        started = time.perf_counter()
        flush_lsn = self._storage.flush()
        self._metrics.flush_seconds.observe(time.perf_counter() - started)
        self._metrics.wal_bytes.inc(flush_lsn - before_lsn)
        self._carry_out(self._acceptor.wal_flushed(flush, self._scanner.last_record_end), outgoing)

    def _committed(self, commit_lsn: Lsn) -> None:
        self.commits.advance(commit_lsn)
        segment_size_bytes = self.identity.wal_segment_size_bytes
        crossed = commit_lsn // segment_size_bytes != self._persisted_commit_lsn // segment_size_bytes
        if crossed and self._acceptor is not None:
            self._persist(self._acceptor.state)

    def _persist(self, state: AcceptorState) -> None:
        moving_lsns = self._moving_lsns(state)
        record = ControlRecord.of(
            self.node_id,
            self.identity,
            self.start_lsn,
            state,
            wal_start_lsn=self.wal_start_lsn,
            durable_lsn=moving_lsns[2],
        )
        write_control_file(self.directory, record, self._disk)
        self._persisted_lsns = moving_lsns
        self._persisted_commit_lsn = state.commit_lsn
