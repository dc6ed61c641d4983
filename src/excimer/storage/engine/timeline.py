"""A timeline: one history of WAL as a versioned page store. The engine's public face.

::

    put_batch -> open memory layer -> frozen -> delta layer (file, object) -> manifest
                        |               |              |
    get_pages, get_value, scan: newest first, then the ancestor at the branch point

Ingest is one thread calling `put_batch`; reads come from the event loop, any number at a time;
`run` flushes and compacts in the background and belongs in a named task of the host's group.

A flush leaves its memory layer readable until the manifest that names the new file is durable. If
the disk is full or object storage is away, it is tried again, with growing pauses, for ever: reads
go on, and ingest goes on until `frozen_layers_max` memory layers wait, then `put_batch` blocks. What
memory holds is lost in a crash and asked for again from
`disk_consistent_lsn`, which is why WAL may be removed elsewhere only below `confirm_consistent_lsn` (D2).

Not here: what WAL means (`excimer.pageserver.ingest`), which layers to merge (`excimer.storage.plan`).
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from excimer._native.memory_layer import MemoryLayer
from excimer.base.errors import CorruptionError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn
from excimer.storage.engine.background_steps import Step, run_steps
from excimer.storage.engine.compactor import Compactor
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.deletion_queue import DeletionQueue
from excimer.storage.engine.errors import (
    IngestPausedError,
    LsnTimeoutError,
    LsnTooOldError,
    TimelineStoppedError,
)
from excimer.storage.engine.garbage_collector import GarbageCollector, GcOutcome
from excimer.storage.engine.kept_slots import KeptSlotsStore
from excimer.storage.engine.layer_stack import Ancestry, LayerHome, LayerStack, WalPosition
from excimer.storage.engine.leftovers import Leftovers
from excimer.storage.engine.manifest_store import ManifestStore, check_not_overtaken
from excimer.storage.engine.page_explanation import PageExplanation, explain_page
from excimer.storage.engine.page_reads import PageRead, read_size_blocks
from excimer.storage.engine.saved_states import SavedStates
from excimer.storage.engine.settings_store import LiveSettings
from excimer.storage.engine.timeline_commits import TimelineCommits
from excimer.storage.engine.value_reads import ValueCache, read_value, read_value_and_lsn, scan_values
from excimer.storage.engine.walk_memory import WalkMemory
from excimer.storage.format.manifest import Manifest
from excimer.storage.format.tenant_settings import TenantSettings
from excimer.storage.format.values import PackedBatch
from excimer.storage.plan.layer_map import LayerMap
from excimer.storage.plan.retention import NOBODY, Retention

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Timeline:
    """See the module, and `docs/architecture/interfaces.md`. Made by `TenantStorage` only."""

    def __init__(
        self,
        context: StorageContext,
        manifest: Manifest,
        manifests: ManifestStore,
        ancestor: "Timeline | None",
        generation: int,
        live_settings: LiveSettings,
    ) -> None:
        self.context = context
        self._live_settings = live_settings
        self.tenant_id = TenantId(manifest.tenant_id)
        self.timeline_id = TimelineId(manifest.timeline_id)
        self.pg_version = manifest.pg_version
        self.system_id = manifest.system_id
        self.wal_segment_size_bytes = manifest.wal_segment_size_bytes
        self.generation = generation
        self.value_cache = ValueCache(context.settings.metadata_cache_entries, self._is_retained)
        self.walk_memory = WalkMemory()
        self.home = LayerHome(context, manifest.tenant_id, manifest.timeline_id)
        self.stack = LayerStack(
            open=MemoryLayer(manifest.disk_consistent_lsn),
            frozen=(),
            disk=LayerMap.from_descriptions(manifest.layers),
            files={layer.name: self.home.disk_layer(layer) for layer in manifest.layers},
            ancestry=None if ancestor is None else Ancestry(ancestor, Lsn(manifest.ancestor_lsn)),
        )
        self.deletions = DeletionQueue(self.home, generation)
        self.position = WalPosition(Lsn(manifest.prev_record_lsn), Lsn(manifest.disk_consistent_lsn))
        self.manifest = manifest
        """The newest durable one."""
        self.commits = TimelineCommits(self, manifests)
        self._loop = asyncio.get_running_loop()
        self.retention = Retention.of(manifest, self._loop.time(), self.settings.lsn_lease_length_s)
        self.compaction_lock = asyncio.Lock()
        """Held by whoever merges or removes layers: one at a time. Take it before that of `commits`."""
        self.leftovers = Leftovers(self)
        self.deletions.on_overflow = self.leftovers.suspect
        self.saved_states = SavedStates(self)
        self.kept_slots = KeptSlotsStore(self)
        self._loop_thread = threading.get_ident()
        self._write_lock = threading.Lock()
        self._room_made = threading.Condition(self._write_lock)
        self._flush_wanted = asyncio.Event()
        self._unflushed = asyncio.Event()
        self.on_flushed: Callable[[], None] = lambda: None
        """Called on the event loop when more has become durable."""
        self._compaction_wanted = asyncio.Event()
        self._compaction_wanted.set()
        self._room = asyncio.Event()
        self._waiting: list[tuple[Lsn, asyncio.Future[None]]] = []
        self._stopped = False
        self._compactor = Compactor(self)
        self._collector = GarbageCollector(self, self._compactor)

    @property
    def settings(self) -> TenantSettings:
        """The tenant's, as they are now: do not keep them."""
        return self._live_settings.current

    @property
    def ancestor(self) -> "Timeline | None":
        """None for a root, which a branch may become at any moment (`stack.ancestry` for a pair)."""
        ancestry = self.stack.ancestry
        return None if ancestry is None else ancestry.timeline

    @property
    def ancestor_lsn(self) -> Lsn:
        """The branch point; 0 without an ancestor."""
        ancestry = self.stack.ancestry
        return INVALID_LSN if ancestry is None else ancestry.lsn

    @property
    def last_record_lsn(self) -> Lsn:
        """End of the last record put."""
        return self.position.last_record_lsn

    @property
    def prev_record_lsn(self) -> Lsn:
        """Start of the last record put."""
        return self.position.prev_record_lsn

    @property
    def oldest_lsn(self) -> Lsn:
        """Reads below it are refused, but of points that are held (`retention`).

        A branch reads what is below its branch point as long as its ancestor does; the branch point, always.
        """
        own, ancestry = Lsn(self.manifest.oldest_lsn), self.stack.ancestry
        if ancestry is None or own > ancestry.lsn:
            return own
        return min(ancestry.timeline.oldest_lsn, ancestry.lsn)

    @property
    def size_bytes(self) -> int:
        """What its layers take in object storage, its ancestors' included."""
        own = sum(layer.size_bytes for layer in self.stack.disk.descriptions)
        return own + (self.ancestor.size_bytes if self.ancestor is not None else 0)

    @property
    def disk_consistent_lsn(self) -> Lsn:
        """Everything at or below is in durable layers: where WAL is asked for again after a restart."""
        return Lsn(self.manifest.disk_consistent_lsn)

    @property
    def remote_consistent_lsn(self) -> Lsn:
        """Everything at or below is named by a durable manifest in object storage."""
        return Lsn(self.manifest.disk_consistent_lsn)

    def put_batch(self, batch: PackedBatch, end_lsn: Lsn, prev_record_lsn: Lsn) -> None:
        """Adds the values of WAL up to `end_lsn`, the end of the record that starts at `prev_record_lsn`.

        Any thread, one at a time. Readers see the batch when `last_record_lsn` has moved. While too much
        waits to become durable it blocks, at most `put_wait_s` (in the event loop's thread not at all), and
        then raises `IngestPausedError`: nothing was added, put it again after `wait_for_room`. Also raises
        `TimelineStoppedError`, and ValueError for a malformed batch or one whose LSNs are not in
        (last_record_lsn, end_lsn].
        """
        with self._write_lock:
            self._wait_for_compaction_locked(len(batch.data))
            self._wait_for_room_locked()
            self.check_runs()
            if end_lsn < self.last_record_lsn:
                raise ValueError(f"WAL up to {format_lsn(end_lsn)} was put before")
            self.stack.open.put_batch(batch.entries, batch.data, self.last_record_lsn, end_lsn)
            if not self._has_unflushed():
                self._loop.call_soon_threadsafe(self._unflushed.set)
            self.position = WalPosition(prev_record_lsn, end_lsn)
            if self._open_is_full() and len(self.stack.frozen) < self.context.settings.frozen_layers_max:
                self._freeze_locked()
        if self._waiting:
            self._loop.call_soon_threadsafe(self._wake_waiting)

    async def wait_for_room(self) -> None:
        """Returns when `put_batch` would take a batch."""
        while not self._has_room():
            self._room.clear()
            await self._room.wait()

    async def wait_for_lsn(self, lsn: Lsn, timeout_s: float) -> None:
        """Returns when reads at `lsn` are possible. Raises `LsnTimeoutError`."""
        deadline = self._loop.time() + timeout_s
        ancestry = self.stack.ancestry
        if ancestry is not None:
            await ancestry.timeline.wait_for_lsn(min(lsn, ancestry.lsn), timeout_s)
        if lsn <= self.last_record_lsn:
            return
        arrived: asyncio.Future[None] = self._loop.create_future()
        entry = (lsn, arrived)
        self._waiting.append(entry)
        try:
            if lsn > self.last_record_lsn:
                async with asyncio.timeout_at(deadline):
                    await arrived
        except TimeoutError:
            raise LsnTimeoutError(self.timeline_id, lsn, self.last_record_lsn) from None
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    def get_value(self, key: bytes, lsn: Lsn) -> bytes | None:
        """The newest value at or below `lsn` of a key whose values are whole; None if it does not exist then.

        May block on disk the first time. Raises `LsnTimeoutError`, `LsnTooOldError`.
        """
        return self._read(lsn, partial(read_value, self, key, lsn))

    def get_value_and_lsn(self, key: bytes, lsn: Lsn) -> tuple[Lsn, bytes] | None:
        """Like `get_value`, with an LSN at which it had this value already."""
        found = self._read(lsn, partial(read_value_and_lsn, self, key, lsn))
        return None if found is None else (Lsn(found[0]), found[1])

    def scan(self, start: bytes, end: bytes, lsn: Lsn) -> list[tuple[bytes, bytes]]:
        """Keys in [start, end) that exist at `lsn`, in order, with their values. Errors as `get_value`."""
        return self._read(lsn, partial(scan_values, self, start, end, lsn))

    def size_blocks(self, key: bytes, lsn: Lsn) -> int | None:
        """Blocks of the relation fork or SLRU segment of a block key; None if it does not exist at `lsn`."""
        return self._read(lsn, partial(read_size_blocks, self, key, lsn))

    async def get_pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        """`count` adjacent blocks from `key` on, exactly as of `lsn` (S1).

        Raises `NoSuchPageError` if any of them does not exist then, `LsnTimeoutError` (wait first),
        `LsnTooOldError`, `PageRebuildError`, `DamagedLayerError`, `ObjectStoreError`.
        """
        read = self.start_read(key, count, lsn)
        return read if isinstance(read, bytes) else await read()

    def start_read(self, key: bytes, count: int, lsn: Lsn) -> bytes | Callable[[], Awaitable[bytes]]:
        """`get_pages`: at once if nothing has to be waited for, else what to call and await; errors likewise.

        On the event loop's thread.
        """
        self._check_lsn(lsn)
        read = PageRead(self, key, count, lsn)
        pages = read.try_pages()
        if pages is None:
            return partial(self._finish_read, read, lsn)
        self._check_lsn(lsn)  # while it was read, garbage collection may have passed it
        return pages

    async def _finish_read(self, read: PageRead, lsn: Lsn) -> bytes:
        pages = await read.run()
        self._check_lsn(lsn)
        return pages

    async def explain_page(self, key: bytes, lsn: Lsn) -> PageExplanation:
        """How the block comes about at `lsn`. Errors as `get_pages`; damage is explained, not raised."""
        self._check_lsn(lsn)
        explanation = await explain_page(self, key, lsn)
        self._check_lsn(lsn)
        return explanation

    async def flush(self) -> None:
        """All that was put before becomes durable, manifest included. One try: raises `RetryableError`
        (`ObjectStoreError`), OSError, `FencedError`.
        """
        await self.in_thread(self._freeze)
        await self._flush_frozen()

    async def confirm_consistent_lsn(self) -> Lsn:
        """An LSN below which nobody needs WAL again, whoever attaches this timeline (D2).

        The manifest that says so is durable before a newer generation's claim is looked for (`claim`).
        Raises `OvertakenError`, `ObjectStoreError`.
        """
        lsn, ids = self.disk_consistent_lsn, (self.tenant_id, self.timeline_id)
        await self.in_thread(partial(check_not_overtaken, self.context.store, *ids, self.generation))
        return lsn

    async def compact(self) -> bool:
        """A step of the merges and images that are due, if any; says whether. Errors as `flush` and reads."""
        async with self.compaction_lock:
            return await self._compactor.step()

    async def collect_garbage(self, time_lsn: Lsn) -> GcOutcome:
        """Lets go what nobody retains; `time_lsn` is where the timeline stood when the retained window of
        time begins. Raises `GcStandsStillError`, `GcTooEarlyError` soon after attaching, and as flushes,
        reads and uploads do.
        """
        outcome = await self._collector.collect(time_lsn)
        await self.saved_states.remove_superseded()
        return outcome

    async def find_saved_state(self, lsn: Lsn) -> bytes | None:
        """The saved state of exactly this LSN, of an ancestor if the history begins there; None: there is
        none.

        Raises `ObjectStoreError`.
        """
        at, found = self, await self.saved_states.find(lsn)
        while found is None and (ancestry := at.stack.ancestry) is not None and lsn <= ancestry.lsn:
            at = ancestry.timeline
            found = await at.saved_states.find(lsn)
        return found

    def lease(self, lsn: Lsn, holder: str = NOBODY, *, onwards: bool = False) -> float:
        """Keeps an LSN readable for so many seconds from now on; ask again to renew it, and
        `release_leases` when it is not needed any more. `onwards`: all from there on, on this timeline; the
        holder's former lease of that kind ends.

        Raises `LsnTimeoutError` (it has not arrived), `LsnTooOldError`, `NotRetainedError` (about to go).
        """
        self._check_lsn(lsn)
        now_s = self._loop.time()
        length_s = self.settings.lsn_lease_length_s
        if onwards:
            return self.retention.lease_onwards(lsn, now_s, length_s, holder) - now_s
        return self.home_of(lsn).retention.lease(lsn, now_s, length_s, holder) - now_s

    def release_leases(self, holder: str) -> int:
        """Ends what a holder leased here, in the ancestors' part of the history too; how many LSNs."""
        released, timeline = 0, self
        while True:
            released += timeline.retention.release_leases(holder)
            if timeline.ancestor is None:
                return released
            timeline = timeline.ancestor

    @property
    def inherited_size_bytes(self) -> int:
        """What the layers of its ancestors take."""
        return self.ancestor.size_bytes if self.ancestor is not None else 0

    def check_runs(self) -> None:
        """Raises `TimelineStoppedError` once it is closed: what is deleted must not be written again."""
        if self._stopped:
            raise TimelineStoppedError(f"timeline {self.timeline_id} is closed")

    async def run(self) -> None:
        """Flushes by size and by time, compacts, deletes what is no longer named, until cancelled.

        Raises `FencedError` when overtaken.
        """
        steps: dict[str, Step] = {
            "flush": self._flush_when_due,
            "compaction": self._compact_when_due,
            "deletion": partial(self.deletions.run_when_wanted, self.in_thread),
            "removal of leftovers": self.leftovers.run_when_suspected,
        }
        await run_steps(self.timeline_id, steps, self.context.settings)

    async def _flush_when_due(self) -> None:
        if not self.stack.frozen:
            self._unflushed.clear()
            if not self._has_unflushed():  # an idle timeline wakes up for nothing
                await self._unflushed.wait()
            try:
                async with asyncio.timeout(self.settings.flush_interval_s):
                    await self._flush_wanted.wait()
            except TimeoutError:
                await self.in_thread(self._freeze)
            self._flush_wanted.clear()
        await self._flush_frozen()

    async def _compact_when_due(self) -> None:
        await self._compaction_wanted.wait()
        self._compaction_wanted.clear()
        try:
            if await self.compact():
                self._compaction_wanted.set()
        except CorruptionError as error:
            _log.error("compaction of timeline %s stops until the next flush: %s", self.timeline_id, error)

    async def close(self) -> None:
        """No more batches from here on; waits for a flush under way. What memory holds is not flushed."""
        self._stopped = True
        if self._write_lock.acquire(blocking=False):  # thousands may be closed at once: no thread for each
            self._room_made.notify_all()
            self._write_lock.release()
        else:
            await self.in_thread(self._wake_writer)
        async with self.saved_states.lock, self.commits.lock:
            if len(self.deletions):
                await self.in_thread(self.deletions.close)
            for file in self.stack.files.values():
                file.close()

    async def in_thread(self, function: Callable[[], _Result]) -> _Result:
        return await self._loop.run_in_executor(self.context.executor, function)

    async def whole_in_thread(self, function: Callable[[], _Result]) -> _Result:
        """Like `in_thread`, but a cancellation waits until the thread is done: what it writes must not come
        after a later writer's, above all not after a deletion.
        """
        executor = self.context.upload_executor or self.context.executor
        future = self._loop.run_in_executor(executor, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def home_of(self, lsn: Lsn) -> "Timeline":
        """The timeline, this or an ancestor, whose own history the LSN is in: who retains it."""
        at = self
        while (ancestry := at.stack.ancestry) is not None and lsn < ancestry.lsn:
            at = ancestry.timeline
        return at

    def _read(self, lsn: Lsn, read: Callable[[], _Result]) -> _Result:
        """Garbage collection may pass the LSN meanwhile: what was read then does not count."""
        self._check_lsn(lsn)
        found = read()
        self._check_lsn(lsn)
        return found

    def _check_lsn(self, lsn: Lsn) -> None:
        self._check_arrived(lsn)
        if not self.home_of(lsn)._is_retained(lsn):
            raise LsnTooOldError(self.timeline_id, lsn, self.oldest_lsn)
        if self.manifest.deleted:
            raise TimelineStoppedError(f"timeline {self.timeline_id} is deleted")

    def _check_arrived(self, lsn: Lsn) -> None:
        """The branch point of each ancestor is needed by this history, and always retained there."""
        if lsn > self.last_record_lsn:
            raise LsnTimeoutError(self.timeline_id, lsn, self.last_record_lsn)
        ancestry = self.stack.ancestry
        if ancestry is not None:
            ancestry.timeline._check_arrived(min(lsn, ancestry.lsn))

    def _is_retained(self, lsn: int) -> bool:
        """Whether this timeline's own history still has an LSN. Any thread."""
        return lsn >= self.manifest.oldest_lsn or self.retention.is_held(lsn, self._loop.time())

    def _wake_waiting(self) -> None:
        for lsn, arrived in self._waiting:
            if lsn <= self.last_record_lsn and not arrived.done():
                arrived.set_result(None)

    def _has_unflushed(self) -> bool:
        """Whether WAL has moved since the open layer was opened."""
        return self.last_record_lsn > self.stack.open.start_lsn

    def _open_is_full(self) -> bool:
        return self.stack.open.size_bytes >= self.settings.flush_size_bytes

    def _has_room(self) -> bool:
        return not self._open_is_full() or len(self.stack.frozen) < self.context.settings.frozen_layers_max

    def _wake_writer(self) -> None:
        with self._write_lock:
            self._room_made.notify_all()

    def _wait_for_room_locked(self) -> None:
        wait_s = 0.0 if threading.get_ident() == self._loop_thread else self.context.settings.put_wait_s
        if not self._room_made.wait_for(lambda: self._stopped or self._has_room(), wait_s):
            raise IngestPausedError(
                f"timeline {self.timeline_id} waits for {len(self.stack.frozen)} layers to become durable"
            )

    def _wait_for_compaction_locked(self, batch_size_bytes: int) -> None:
        if threading.get_ident() == self._loop_thread:
            return
        delay_s = self._compactor.put_delay_s(batch_size_bytes)
        if delay_s:
            self.context.counters.put_delayed(delay_s)
            self._room_made.wait_for(
                lambda: self._stopped or not self._compactor.put_delay_s(batch_size_bytes), delay_s
            )

    def _freeze(self) -> None:
        with self._write_lock:
            self._freeze_locked()

    def _freeze_locked(self) -> None:
        """Freezes the open layer if WAL has moved since it was opened, even if no value came of it."""
        if self._has_unflushed():
            self.stack = self.stack.with_frozen_open(self.last_record_lsn, self.prev_record_lsn)
            self._loop.call_soon_threadsafe(self._flush_wanted.set)

    async def _flush_frozen(self) -> None:
        async with self.commits.lock:
            while self.stack.frozen:
                self.check_runs()
                await self.whole_in_thread(partial(self.commits.flush, self.stack.frozen[0]))
                self._room.set()
                self._compaction_wanted.set()
                self.on_flushed()

    def adopt(self, manifest: Manifest, change: Callable[[LayerStack], LayerStack]) -> None:
        """Reads go by what a durable manifest says from here on. Any thread; for `commits`."""
        with self._write_lock:
            self.stack = change(self.stack)
            self.manifest = manifest
            self._room_made.notify_all()
