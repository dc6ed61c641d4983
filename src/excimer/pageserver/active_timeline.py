"""One timeline in service: its store, the ingest that feeds it, and the tasks that keep it going.

::

    WalReceiver --begin_stream, ingest--> ActiveTimeline --put_batch--> storage Timeline
    page service --wait, get_pages, basebackup--> ActiveTimeline --reads--> storage Timeline

Two tasks run per timeline: the receiver and the store's own flushing. If one of them meets something
that trying again cannot heal, the timeline is *broken*: it says why, serves what it has, and takes no more.

Not here: creating and deleting timelines (`tenants`), choosing safekeepers (`wal_receiver`).
"""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field

from excimer.base.clock import Clock
from excimer.base.errors import CorruptionError, FencedError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import KeyKind, make_key
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn, record_end
from excimer.pageserver.basebackup_job import BasebackupPoint, build_basebackup
from excimer.pageserver.durable_wal import DurableWal
from excimer.pageserver.ingest import WalGapError, WalIngest
from excimer.pageserver.lsn_by_timestamp import (
    LsnAtTimestamp,
    WindowStart,
    find_lsn_at_timestamp,
    find_window_start,
)
from excimer.pageserver.metrics import TimelineMetrics
from excimer.pageserver.model import TimelineDetail
from excimer.pageserver.sizes import LogicalSizes, remote_size_bytes, resident_size_bytes
from excimer.pageserver.wal_receiver import WalReceiver, WalSources
from excimer.pgformat.checkpoint_state import CheckpointState
from excimer.pgformat.control_file import ControlFile
from excimer.service.health import Health
from excimer.service.logs import get_logger, log_context
from excimer.service.tasks import TaskScope
from excimer.storage.engine.archived_timeline import ArchivedTimeline
from excimer.storage.engine.damaged_timeline import DamagedTimeline
from excimer.storage.engine.errors import LsnTimeoutError
from excimer.storage.engine.timeline import Timeline

log = get_logger(__name__)

ANCESTOR_WAIT_S = 3600.0
BASEBACKUP_KEPT_S = 60.0
"""How long the last basebackup is kept, should a compute start at the same LSN again."""


@dataclass(frozen=True, slots=True)
class TimelineWorld:
    """What an active timeline needs from the process it runs in."""

    scope: TaskScope
    executor: Executor
    """Runs ingest: one thread per timeline that receives WAL at the same time."""
    clock: Clock
    health: Health
    metrics: TimelineMetrics
    sources: Callable[[TenantId, TimelineId], WalSources]
    """Of a timeline's WAL."""
    moved: deque[tuple[TenantId, TimelineId]] = field(default_factory=deque)
    """Timelines whose positions have changed, for whoever tells others; some more than once."""


class ActiveTimeline:
    def __init__(self, store: Timeline, world: TimelineWorld) -> None:
        self.store = store
        self.problem: str | None = None
        """Why it is broken; None while all is well."""
        self._world = world
        self._loop = asyncio.get_running_loop()
        self._ingest: WalIngest | None = None
        self._ingest_lock = threading.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._basebackup_lock = asyncio.Lock()
        self._is_complete = False
        self._last_basebackup: tuple[Lsn, bytes] | None = None
        gauge = world.metrics.logical_size_bytes
        self.logical_sizes = LogicalSizes(
            store,
            self._loop.time,
            tell=lambda size: gauge.labels(store.tenant_id, store.timeline_id).set(size),
        )
        labels = store.tenant_id, store.timeline_id
        self._wal_bytes = world.metrics.wal_bytes.labels(*labels)
        world.metrics.watch_sizes(
            labels, remote=lambda: remote_size_bytes(store), resident=lambda: resident_size_bytes(store)
        )
        self.sources = world.sources(*labels)
        self.receiver = WalReceiver(
            consumer=self,
            sources=self.sources,
            executor=world.executor,
            clock=world.clock,
            on_progress=self._progressed,
        )

        self.durable_wal = DurableWal(
            store,
            sources=self.sources.known,
            connect=self.sources.connect,
            streams_from=lambda: self.receiver.source,
        )
        store.on_flushed = self._flushed
        store.kept_slots.on_changed = self.durable_wal.moved

    # Life

    def start(self) -> None:
        """Begins to receive WAL and to flush."""
        name = self.store.timeline_id
        self._moved()
        self._tasks = [
            self._world.scope.supervise(f"receive {name}", lambda: self._guarded(self._receive)),
            self._world.scope.supervise(f"flush {name}", lambda: self._guarded(self.store.run)),
            self._world.scope.supervise(f"durable WAL {name}", lambda: self._guarded(self.durable_wal.run)),
        ]

    async def stop(self) -> None:
        """Ends the tasks and closes the store, which frees a thread that waits for room in it."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(self.store.close(), *tasks, return_exceptions=True)
        self._world.health.report(self._check_name, None)
        self._world.metrics.forget(self.store.tenant_id, self.store.timeline_id)

    async def _receive(self) -> None:
        """A branch first waits for its ancestor to have the WAL that the branch begins with."""
        await self.store.wait_for_lsn(self.store.last_record_lsn, ANCESTOR_WAIT_S)
        await self.receiver.run()

    async def _guarded(self, job: Callable[[], Awaitable[None]]) -> None:
        with log_context(tenant_id=self.store.tenant_id, timeline_id=self.store.timeline_id):
            try:
                await job()
            except (CorruptionError, FencedError) as error:
                self.problem = f"{type(error).__name__}: {error}"
                self._world.health.report(self._check_name, self.problem)
                raise

    def _progressed(self, wal_size_bytes: int) -> None:
        self._wal_bytes.inc(wal_size_bytes)
        self._moved()

    def _flushed(self) -> None:
        self.durable_wal.moved()
        self._moved()

    def _moved(self) -> None:
        self._world.moved.append((self.store.tenant_id, self.store.timeline_id))

    @property
    def _check_name(self) -> str:
        return f"timeline {self.store.timeline_id}"

    # What WAL is fed to (called in a thread)

    def begin_stream(self) -> Lsn:
        """Forgets a record that came in part. The state of ingest is read anew from the store."""
        with self._ingest_lock:
            self._ingest = WalIngest(self.store, read_pages=self._read_pages)
            return self._ingest.last_record_lsn

    def ingest(self, start_lsn: Lsn, data: bytes) -> None:
        with self._ingest_lock:
            if self._ingest is None:
                raise WalGapError("WAL came before the stream had begun")
            self._ingest.ingest(data, start_lsn)

    def _read_pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        return asyncio.run_coroutine_threadsafe(self.store.get_pages(key, count, lsn), self._loop).result()

    def positions(self) -> tuple[Lsn, Lsn]:
        return self.store.last_record_lsn, self.durable_wal.lsn

    def is_settled(self, lsn: Lsn) -> bool:
        return self.durable_wal.is_settled(lsn)

    # What the page service asks

    @property
    def last_record_lsn(self) -> Lsn:
        """0 while an ancestor has not received, again, all WAL up to where this history leaves it."""
        if not self._is_complete:
            self._is_complete = _has_all_ancestry(self.store)
        return self.store.last_record_lsn if self._is_complete else INVALID_LSN

    def record_end(self, lsn: int) -> Lsn:
        return record_end(lsn, self.store.wal_segment_size_bytes)

    async def wait_for_lsn(self, lsn: Lsn, timeout_s: float) -> None:
        await self.store.wait_for_lsn(max(lsn, self.store.ancestor_lsn), timeout_s)

    async def wait_while_ingesting(self, lsn: Lsn, stall_s: float, timeout_s: float) -> None:
        """As `wait_for_lsn`, but gives up when nothing was ingested for `stall_s`, here or in an ancestor."""
        deadline = self._loop.time() + timeout_s
        while True:
            before = _last_record_lsns(self.store)
            try:
                return await self.wait_for_lsn(lsn, min(stall_s, max(0.0, deadline - self._loop.time())))
            except LsnTimeoutError:
                if _last_record_lsns(self.store) == before or self._loop.time() >= deadline:
                    raise

    async def get_pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        return await self.store.get_pages(key, count, lsn)

    def start_read(self, key: bytes, count: int, lsn: Lsn) -> bytes | Callable[[], Awaitable[bytes]]:
        return self.store.start_read(key, count, lsn)

    async def basebackup(self, lsn: Lsn) -> bytes:
        """Compressed. The last one is kept: computes start again and again at an LSN that stands still."""
        async with self._basebackup_lock:
            if self._last_basebackup is not None and self._last_basebackup[0] == lsn:
                return self._last_basebackup[1]
            point = await asyncio.to_thread(self._point_at, lsn)
            compressed = await build_basebackup(self.store, point)
            self._last_basebackup = lsn, compressed
            self._loop.call_later(BASEBACKUP_KEPT_S, self._forget_basebackup, compressed)
            return compressed

    def _forget_basebackup(self, compressed: bytes) -> None:
        if self._last_basebackup is not None and self._last_basebackup[1] is compressed:
            self._last_basebackup = None

    def _point_at(self, lsn: Lsn) -> BasebackupPoint:
        position = self.store.position
        prev_lsn = position.prev_record_lsn if position.last_record_lsn == lsn else INVALID_LSN
        control = self.store.get_value(make_key(KeyKind.CONTROL_FILE), lsn)
        state = self._exact_state(lsn) or self._stored_state(lsn)
        if control is None or state is None:
            raise CorruptionError(
                f"timeline {self.store.timeline_id} has no pg_control or checkpoint at {format_lsn(lsn)}"
            )
        control_file = state.apply_to(ControlFile.unpack(control, self.store.pg_version))
        return BasebackupPoint(lsn, prev_lsn, control_file.pack(), state.checkpoint)

    def _stored_state(self, lsn: Lsn) -> CheckpointState | None:
        state = self.store.get_value(make_key(KeyKind.CHECKPOINT), lsn)
        return None if state is None else CheckpointState.unpack(state)

    def _exact_state(self, lsn: Lsn) -> CheckpointState | None:
        """What ingest knows, if it stands still at `lsn`: the stored state rounds the next xid up."""
        if not self._ingest_lock.acquire(blocking=False):
            return None
        try:
            if self._ingest is None or self._ingest.last_record_lsn != lsn:
                return None
            return self._ingest.checkpoint_state
        finally:
            self._ingest_lock.release()

    # What operators ask

    def detail(self) -> TimelineDetail:
        store = self.store
        source = self.receiver.source
        return TimelineDetail(
            tenant_id=store.tenant_id,
            timeline_id=store.timeline_id,
            pg_version=store.pg_version,
            system_id=store.system_id,
            wal_segment_size=store.wal_segment_size_bytes,
            ancestor_timeline_id=None if store.ancestor is None else store.ancestor.timeline_id,
            ancestor_lsn=None if store.ancestor is None else store.ancestor_lsn,
            last_record_lsn=store.last_record_lsn,
            prev_record_lsn=store.prev_record_lsn,
            disk_consistent_lsn=store.disk_consistent_lsn,
            remote_consistent_lsn=store.remote_consistent_lsn,
            oldest_lsn=store.oldest_lsn,
            physical_size_bytes=remote_size_bytes(store),
            wal_source=None if source is None else str(source),
            problem=self.problem or self.sources.problem(),
        )

    @property
    def unflushed_size_bytes(self) -> int:
        """Memory of what is in no durable layer yet."""
        stack = self.store.stack
        return stack.open.size_bytes + sum(frozen.memory.size_bytes for frozen in stack.frozen)

    async def lsn_at_timestamp(self, timestamptz: int) -> LsnAtTimestamp:
        return await asyncio.to_thread(self._lsn_at_timestamp, timestamptz)

    def _lsn_at_timestamp(self, timestamptz: int) -> LsnAtTimestamp:
        store = self.store
        return find_lsn_at_timestamp(
            self.commit_time,
            store.oldest_lsn,
            store.last_record_lsn,
            timestamptz,
            store.wal_segment_size_bytes,
        )

    async def window_start(self, timestamptz: int) -> WindowStart:
        """Where the timeline stood at a moment that a window of retained history begins with."""
        store = self.store
        return await asyncio.to_thread(
            find_window_start, self.commit_time, store.oldest_lsn, store.last_record_lsn, timestamptz
        )

    def commit_time(self, lsn: Lsn) -> int | None:
        """When the last commit at or below an LSN happened (timestamptz); None if none is known. Blocks."""
        value = self.store.get_value(make_key(KeyKind.COMMIT_TIME), lsn)
        return None if value is None else int.from_bytes(value, "little", signed=True)


def detail_of_archived(tenant_id: TenantId, archived: ArchivedTimeline) -> TimelineDetail:
    """The same of a timeline that is not in service."""
    return TimelineDetail(
        tenant_id=tenant_id,
        timeline_id=archived.timeline_id,
        pg_version=archived.pg_version,
        system_id=archived.system_id,
        wal_segment_size=archived.wal_segment_size_bytes,
        ancestor_timeline_id=archived.ancestor_timeline_id,
        ancestor_lsn=None if archived.ancestor_timeline_id is None else archived.ancestor_lsn,
        last_record_lsn=archived.last_record_lsn,
        prev_record_lsn=archived.prev_record_lsn,
        disk_consistent_lsn=archived.last_record_lsn,
        remote_consistent_lsn=archived.last_record_lsn,
        oldest_lsn=archived.oldest_lsn,
        physical_size_bytes=archived.size_bytes,
        wal_source=None,
        problem=None,
        is_archived=True,
    )


def detail_of_damaged(tenant_id: TenantId, damaged: DamagedTimeline) -> TimelineDetail:
    """The same of one that cannot be put into service."""
    manifest = damaged.manifest
    ancestor_id = damaged.ancestor_timeline_id
    durable_lsn = Lsn(0 if manifest is None else manifest.disk_consistent_lsn)
    return TimelineDetail(
        tenant_id=tenant_id,
        timeline_id=damaged.timeline_id,
        pg_version=0 if manifest is None else manifest.pg_version,
        system_id=0 if manifest is None else manifest.system_id,
        wal_segment_size=0 if manifest is None else manifest.wal_segment_size_bytes,
        ancestor_timeline_id=ancestor_id,
        ancestor_lsn=None if manifest is None or ancestor_id is None else Lsn(manifest.ancestor_lsn),
        last_record_lsn=durable_lsn,
        prev_record_lsn=Lsn(0 if manifest is None else manifest.prev_record_lsn),
        disk_consistent_lsn=durable_lsn,
        remote_consistent_lsn=durable_lsn,
        oldest_lsn=Lsn(0 if manifest is None else manifest.oldest_lsn),
        physical_size_bytes=0 if manifest is None else sum(layer.size_bytes for layer in manifest.layers),
        wal_source=None,
        problem=damaged.reason,
        is_archived=manifest is not None and manifest.archived,
        is_damaged=True,
    )


def _last_record_lsns(store: Timeline) -> list[Lsn]:
    """Its own and its ancestors'."""
    lsns = [store.last_record_lsn]
    while store.ancestor is not None:
        store = store.ancestor
        lsns.append(store.last_record_lsn)
    return lsns


def _has_all_ancestry(store: Timeline) -> bool:
    """Whether each ancestor has come as far as its branch needs."""
    ancestor, needed = store.ancestor, store.ancestor_lsn
    while ancestor is not None:
        if ancestor.last_record_lsn < needed:
            return False
        needed = min(needed, ancestor.ancestor_lsn)
        ancestor = ancestor.ancestor
    return True
