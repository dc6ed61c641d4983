"""One tenant's page store on a machine that may die, beside an oracle that never does.

Each operation is done to the engine and to the oracle, whose answers are then compared. A crash ends
the process at some operation of its file system or object store; the next process attaches to what
is left, WAL above what is durable comes again, and everything acknowledged must be there.
"""

import asyncio
import random
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from excimer.base.errors import FencedError, RefusedError
from excimer.base.ids import TimelineId
from excimer.base.keys import KeyKind, kind_range, make_key
from excimer.base.lsn import Lsn, format_lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore
from excimer.pageserver.model import TenantSizes
from excimer.pageserver.sizes import LogicalSizes, tenant_sizes
from excimer.storage.engine import detach_job, disk_layer, manifest_store
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.errors import (
    BranchesUnknownError,
    IngestPausedError,
    LsnTooOldError,
    NoSuchPageError,
    TimelineArchivedError,
    TimelineDamagedError,
)
from excimer.storage.engine.garbage_collector import GcStandsStillError, GcTooEarlyError
from excimer.storage.engine.local_disk import LocalDisk
from excimer.storage.engine.manifest_store import timeline_prefix
from excimer.storage.engine.partial_copy import LayerMissingError, PartialCopy
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.upload_queue import UploadQueue
from excimer.storage.format.manifest import DamagedManifestError, unpack_manifest
from excimer.storage.format.values import pack_batch
from tests.kit.engine_oracle import FILES, IMPORTED, BlockFile, TimelineOracle
from tests.kit.io_faults import CrashError, Fault, InlineExecutor, UnsyncedFilesystem
from tests.kit.storage_world import MAIN, START, TENANT, FakeRedo, apply_native, new_main

SMALL = StorageSettings(
    flush_size_bytes=40_000,
    block_size_bytes=700,
    image_layer_size_bytes=30_000,
    compaction_threshold=2,
    compaction_target_size_bytes=50_000,
    image_creation_threshold=1,
    gc_horizon_bytes=0,
    lsn_lease_length_s=600.0,
)
RECORDS_PER_BATCH = 10
COMPACTION_STEPS_MAX = 100
PAGE_HEADER_BYTES_MAX = 40
CHUNK_SIZE_BYTES = 2000
"""Layers are small here."""

_Result = TypeVar("_Result")


class QuickRunner:
    """`asyncio.Runner` without its handler of SIGINT, whose setting takes longer than most runs here."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._runner.get_loop()

    def run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        return self.get_loop().run_until_complete(coroutine)

    def close(self) -> None:
        self._runner.close()


class PromptDisk(LocalDisk):
    """Does at once what it is to do in the background."""

    def in_background(self, job: Callable[[], None]) -> bool:
        self._jobs += 1
        self._run(job)
        return True

    def run_together(self, fetches: Iterable[Callable[[], None]]) -> None:
        for fetch in fetches:
            with suppress(CrashError):  # whoever waits for it goes on, and meets it too
                fetch()


@dataclass
class Process:
    """A pageserver process as far as the engine goes; its local directory outlives it."""

    directory: Path
    generation: int
    fault: Fault
    filesystem: UnsyncedFilesystem
    context: StorageContext
    tenant: TenantStorage | None = None


@dataclass
class EngineWorld:
    """Close it. `directory` is for local files; object storage is in memory."""

    directory: Path
    settings: StorageSettings = SMALL
    seed: int = 0
    objects: MemoryObjectStore = field(default_factory=MemoryObjectStore)
    oracles: dict[TimelineId, TimelineOracle] = field(default_factory=dict)
    durable: dict[TimelineId, int] = field(default_factory=dict)
    """What was acknowledged as durable, by timeline."""
    local_disk_bytes: int | None = 200_000
    durable_files: set[Path] = field(default_factory=set)
    leases: dict[TimelineId, set[int]] = field(default_factory=dict)
    """LSNs that somebody holds and goes on renewing."""
    harmed: dict[str, bytes] = field(default_factory=dict)
    """Objects that are damaged, and what they were."""
    crashes: int = 0
    moves: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.runner = QuickRunner()
        self.skipped_s = 0.0
        loop = self.runner.get_loop()
        real_time_s = loop.time
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(loop, "time", lambda: real_time_s() + self.skipped_s)
        self.patch.setattr(manifest_store, "ThreadPoolExecutor", InlineExecutor)
        self.patch.setattr(detach_job, "ANCESTOR_WAIT_S", 0.0)  # all WAL is there, or never comes
        self.patch.setattr(disk_layer, "PartialCopy", partial(PartialCopy, chunk_size_bytes=CHUNK_SIZE_BYTES))
        self.process = self._new_process(self.directory / "0", 1)
        self.former: Process | None = None
        """The one that had the tenant before, and does not know yet that it has it no more."""

    # Processes

    def _new_process(self, directory: Path, generation: int) -> Process:
        fault = Fault()
        filesystem = UnsyncedFilesystem(fault.step, self.durable_files)
        context = StorageContext(
            store=FaultyObjectStore(self.objects, fault.step),
            filesystem=filesystem,
            local_dir=directory,
            redo=FakeRedo(),
            apply_native=apply_native,
            executor=InlineExecutor(),
            settings=self.settings,
            local_disk=PromptDisk(self.local_disk_bytes),
            uploads=UploadQueue(pause_s_first=0),
        )
        return Process(directory, generation, fault, filesystem, context)

    @property
    def tenant(self) -> TenantStorage:
        assert self.process.tenant is not None
        return self.process.tenant

    def create(self, images: list[tuple[bytes, bytes]] = IMPORTED) -> None:
        self._attach()
        self.oracles[MAIN] = TimelineOracle.imported(images)
        self.runner.run(self.tenant.create_timeline(new_main(), images))
        self.durable[MAIN] = START

    def close(self) -> None:
        self.process.fault.at = 0
        if self.process.tenant is not None and not self.process.fault.crashed:
            self.runner.run(self.process.tenant.close())
        self.runner.close()
        self.patch.undo()
        shutil.rmtree(self.directory, ignore_errors=True)

    def restart(self, *, keep_files: bool) -> None:
        """An orderly end; the next process has the same generation."""
        self.runner.run(self.tenant.close())
        if not keep_files:
            shutil.rmtree(self.process.directory, ignore_errors=True)
        self.process = self._new_process(self.process.directory, self.process.generation)
        self.recover()

    def move(self) -> None:
        """Another pageserver attaches the tenant; this one has not heard of it."""
        self.former = self.process
        self.moves += 1
        self.process = self._new_process(self.directory / str(self.moves), self.process.generation + 1)
        self.recover()

    def crash(
        self, step: Callable[[], object], operations: int, *, power_failure: bool, again: int = 0
    ) -> bool:
        """Ends the process at the `operations`-th operation of `step`; whether it came that far.

        With `again` the next one ends too, that many operations after its start.
        """
        self.process.fault.crash_in(operations)
        try:
            step()
        except CrashError:
            self.crashes += 1
        else:
            if not self.process.fault.crashed:
                self.process.fault.at = 0
                return False
        self._start_anew(power_failure=power_failure)
        if again:
            self.process.fault.crash_in(again)
            try:
                self.recover()
                self.process.fault.at = 0
                return True
            except CrashError:
                self.crashes += 1
                self._start_anew(power_failure=power_failure)
        self.recover()
        return True

    def _start_anew(self, *, power_failure: bool) -> None:
        if power_failure:
            self.process.filesystem.lose_unsynced(self.process.directory, self.chance)
        self.process = self._new_process(self.process.directory, self.process.generation)

    def recover(self) -> None:
        """Attaches, compares what is there with what was acknowledged, and sends WAL again."""
        self._attach()
        for timeline_id in list(self.tenant.archived):
            self.runner.run(self.tenant.unarchive_timeline(timeline_id))
        self._know_of_unanswered()
        assert set(self.tenant.damaged) == self._unservable()
        assert set(self.tenant.timelines) == set(self.oracles) - set(self.tenant.damaged)
        for timeline_id in self.served:
            oracle = self.oracles[timeline_id]
            timeline = self.tenant.timeline(timeline_id)
            durable_lsn = timeline.disk_consistent_lsn
            assert timeline.last_record_lsn == durable_lsn == timeline.remote_consistent_lsn
            assert durable_lsn >= self.durable[timeline_id], "what was acknowledged as durable is gone"
            assert durable_lsn in (oracle.ancestor_lsn, *oracle.ends), (
                f"{timeline_id}: {durable_lsn:x} is no record's end"
            )
            assert timeline.prev_record_lsn == record_start(durable_lsn)
            self.durable[timeline_id] = durable_lsn
            self.put_after(timeline, oracle, durable_lsn)
        self.check_local_files()
        self.check_objects()

    def _attach(self) -> None:
        process = self.process
        process.tenant = self.runner.run(TenantStorage.attach(process.context, TENANT, process.generation))

    def _know_of_unanswered(self) -> None:
        """A creation or deletion that was under way in the crash has happened or has not."""
        for timeline_id, timeline in self.tenant.timelines.items():
            if timeline_id not in self.oracles and timeline.ancestor is not None:
                ancestor = self.oracles[timeline.ancestor.timeline_id]
                self.oracles[timeline_id] = TimelineOracle(ancestor, timeline.ancestor_lsn)
                self.durable[timeline_id] = timeline.ancestor_lsn
        for timeline_id in [each for each in self.oracles if each not in self.durable]:
            if timeline_id in self.tenant.damaged:
                self.durable[timeline_id] = self.oracles[timeline_id].ancestor_lsn
            elif timeline_id not in self.tenant.timelines:
                del self.oracles[timeline_id]
                self.leases.pop(timeline_id, None)
            else:
                self.durable[timeline_id] = self.tenant.timeline(timeline_id).ancestor_lsn

    # What happens to object storage

    def newest_manifest(self, timeline_id: TimelineId) -> str:
        """The object that the next attachment goes by."""
        prefix = f"{timeline_prefix(TENANT, timeline_id)}/index-"
        return max(name for name in self.objects.objects if name.startswith(prefix))

    def damage(self, timeline_id: TimelineId) -> None:
        """A byte of its newest manifest is another one, which the next process finds."""
        name = self.newest_manifest(timeline_id)
        intact = self.harmed[name] = self.objects.objects[name]
        at = self.chance.randrange(len(intact))
        self.objects.objects[name] = intact[:at] + bytes([intact[at] ^ 0x10]) + intact[at + 1 :]
        self.restart(keep_files=True)
        assert timeline_id in self.tenant.damaged
        for each in self.tenant.damaged:
            with pytest.raises(TimelineDamagedError, match=name.rsplit("/", 1)[-1]):
                self.timeline(each)
            self.leases.pop(each, None)  # whoever held it cannot renew

    def repair(self) -> None:
        """What was damaged and is still there is put back."""
        there = self.harmed.keys() & self.objects.objects.keys()
        self.objects.objects.update((name, self.harmed[name]) for name in there)
        self.harmed.clear()
        self.restart(keep_files=True)
        assert not self.tenant.damaged

    def _unservable(self) -> set[TimelineId]:
        """Whose newest manifest cannot be read, or an ancestor's."""
        ancestors: dict[TimelineId, TimelineId] = {}
        found = set()
        for timeline_id in self.oracles:
            name = self.newest_manifest(timeline_id)
            try:
                manifest = unpack_manifest(self.objects.objects[name], name)
            except DamagedManifestError:
                found.add(timeline_id)
            else:
                ancestors[timeline_id] = TimelineId(manifest.ancestor_timeline_id or "")
        while more := {each for each, ancestor in ancestors.items() if ancestor in found} - found:
            found |= more
        return found

    @property
    def served(self) -> list[TimelineId]:
        return [each for each in self.oracles if each not in self.tenant.damaged]

    # What happens to timelines

    def timeline(self, timeline_id: TimelineId) -> Timeline:
        return self.tenant.timeline(timeline_id)

    def put(self, timeline_id: TimelineId, records: int) -> None:
        oracle, timeline = self.oracles[timeline_id], self.timeline(timeline_id)
        before = oracle.last_lsn
        oracle.next_values(self.chance, records)
        self.put_after(timeline, oracle, before)

    def put_after(self, timeline: Timeline, oracle: TimelineOracle, lsn: int) -> None:
        for values, end_lsn in oracle.batches_after(lsn, RECORDS_PER_BATCH):
            batch = pack_batch(values)
            try:
                timeline.put_batch(batch, end_lsn, Lsn(end_lsn - 8))
            except IngestPausedError:
                self.runner.run(timeline.flush())
                timeline.put_batch(batch, end_lsn, Lsn(end_lsn - 8))
        assert timeline.last_record_lsn == oracle.last_lsn

    def freeze(self, timeline_id: TimelineId) -> None:
        self.timeline(timeline_id)._freeze()

    def flush(self, timeline_id: TimelineId) -> None:
        timeline = self.timeline(timeline_id)
        self.runner.run(timeline.flush())
        assert timeline.remote_consistent_lsn == timeline.last_record_lsn
        self.durable[timeline_id] = timeline.remote_consistent_lsn

    def compact(self, timeline_id: TimelineId) -> None:
        self.runner.run(compact_wholly(self.timeline(timeline_id)))

    def compact_partly(self, timeline_id: TimelineId, steps: int) -> None:
        """The rest is left for later: a round of images may be unfinished."""
        while steps and self.runner.run(self.timeline(timeline_id).compact()):
            steps -= 1

    def branch(self, ancestor_id: TimelineId, lsn: int) -> None:
        timeline_id = TimelineId(f"{self.chance.getrandbits(64) | 1 << 70:032x}")
        ancestor = self.oracles[ancestor_id]
        branching = self.tenant.branch_timeline(
            timeline_id, ancestor_id, lsn=Lsn(lsn), prev_record_lsn=record_start(lsn)
        )
        self.runner.run(branching)
        self.oracles[timeline_id] = TimelineOracle(ancestor, lsn)
        self.durable[timeline_id] = lsn

    def delete(self, timeline_id: TimelineId) -> None:
        acknowledged = self.durable.pop(timeline_id)
        deleting = self.tenant.delete_timeline(timeline_id)
        try:
            self.runner.run(deleting)
        except RefusedError:
            self.durable[timeline_id] = acknowledged
            raise
        del self.oracles[timeline_id]
        self.leases.pop(timeline_id, None)
        for name in [each for each in self.harmed if timeline_id in each]:
            del self.harmed[name]

    def lease(self, timeline_id: TimelineId, lsn: int) -> None:
        """Somebody comes to hold the LSN, and lives on."""
        self.runner.run(_called(lambda: self.timeline(timeline_id).lease(Lsn(lsn))))
        self.leases.setdefault(timeline_id, set()).add(lsn)

    def pass_lease_length(self) -> None:
        """Holders of leases renew them in time; all others run out."""
        for _ in range(4):
            for timeline_id, lsns in self.leases.items():
                for lsn in lsns:
                    self.lease(timeline_id, lsn)
            self.skipped_s += self.settings.lsn_lease_length_s / 3

    def collect(self, timeline_id: TimelineId, kept_bytes: int) -> None:
        """Garbage: what is older than so much WAL, and nobody holds (S3)."""
        timeline = self.timeline(timeline_id)
        before_lsn = timeline.manifest.oldest_lsn
        time_lsn = max(0, timeline.last_record_lsn - kept_bytes)
        try:
            self.runner.run(timeline.collect_garbage(Lsn(time_lsn)))
        except GcStandsStillError:
            assert self.tenant.damaged
        except GcTooEarlyError:
            self.pass_lease_length()
            self.runner.run(timeline.collect_garbage(Lsn(time_lsn)))
        assert timeline.manifest.oldest_lsn <= max(before_lsn, time_lsn + PAGE_HEADER_BYTES_MAX)
        timeline.deletions.drain()

    def sweep(self, timeline_id: TimelineId) -> None:
        """Somebody suspects layers that nobody names."""
        timeline = self.timeline(timeline_id)
        self.runner.run(sweep_suspected(timeline))
        assert not timeline.leftovers.is_suspected

    def evict(self, timeline_id: TimelineId, share: float) -> None:
        """The disk is needed for something else: local copies of layers go, in no particular order."""
        for file in self.timeline(timeline_id).stack.files.values():
            if self.chance.random() < share:
                file.evict()

    def detach(self, timeline_id: TimelineId) -> None:
        """Nothing that can be read changes, so that the oracle never hears of it."""
        timeline = self.timeline(timeline_id)
        if self.tenant.damaged:
            with pytest.raises(BranchesUnknownError):
                self.runner.run(self.tenant.detach_ancestor(timeline_id))
            return
        ancestor_id, branch_lsn = timeline.manifest.ancestor_timeline_id, timeline.ancestor_lsn
        moved = self.runner.run(self.tenant.detach_ancestor(timeline_id))
        assert timeline.ancestor is None
        assert timeline_id not in moved
        for other in self.tenant.timelines.values():
            if ancestor_id is not None and other.manifest.ancestor_timeline_id == ancestor_id:
                assert other.ancestor_lsn > branch_lsn
        assert all(self.timeline(each).ancestor is timeline for each in moved)

    def archive_and_back(self, timeline_id: TimelineId) -> None:
        """A branch that others leave is not archived, nor one that others may leave."""
        if self.tenant.branches(timeline_id) or self.tenant.damaged:
            with pytest.raises((TimelineArchivedError, BranchesUnknownError)):
                self.runner.run(self.tenant.archive_timeline(timeline_id))
            return
        self.runner.run(self.tenant.archive_timeline(timeline_id))
        self.runner.run(self.tenant.offload_timeline(timeline_id))
        with pytest.raises(TimelineArchivedError):
            self.timeline(timeline_id)
        timeline = self.runner.run(self.tenant.unarchive_timeline(timeline_id))
        assert timeline.last_record_lsn == self.oracles[timeline_id].last_lsn
        self.durable[timeline_id] = timeline.last_record_lsn

    def former_acts(self, act: Callable[[Timeline], Awaitable[object]]) -> None:
        """The process that lost the tenant goes on working on every timeline it knows."""
        if self.former is None or self.former.tenant is None:
            return
        for timeline in list(self.former.tenant.timelines.values()):
            oracle = self.oracles.get(timeline.timeline_id)
            if oracle is not None:
                with suppress(IngestPausedError):
                    for values, end_lsn in oracle.batches_after(timeline.last_record_lsn, RECORDS_PER_BATCH):
                        timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))
            with suppress(FencedError, LayerMissingError):  # the newer one has deleted it by right
                self.runner.run(_awaited(act(timeline)))

    # What must be true

    def readable_lsns(self, timeline_id: TimelineId) -> tuple[int, int]:
        """First and last LSN that the timeline must serve."""
        return self.timeline(timeline_id).oldest_lsn, self.oracles[timeline_id].last_lsn

    def check_blocks(
        self, timeline_id: TimelineId, file: BlockFile, first: int, count: int, lsn: int
    ) -> None:
        """Pages are the oracle's, or it says too that they do not exist (S1, S2)."""
        timeline, oracle = self.timeline(timeline_id), self.oracles[timeline_id]
        blocks = oracle.blocks(file, lsn)
        what = f"{file} {first}+{count} of {timeline_id} at {format_lsn(lsn)}"
        assert timeline.size_blocks(file.block_key(first), Lsn(lsn)) == blocks, what
        reading = timeline.get_pages(file.block_key(first), count, Lsn(lsn))
        if blocks is None or first + count > blocks:
            try:
                self.runner.run(reading)
            except NoSuchPageError:
                return
            raise AssertionError(f"blocks that do not exist were served: {what}")
        assert self.runner.run(reading) == oracle.pages(file, first, count, lsn), what

    def check_values(self, timeline_id: TimelineId, lsn: int) -> None:
        timeline, oracle = self.timeline(timeline_id), self.oracles[timeline_id]
        ends = (
            kind_range(KeyKind.RELATION_SIZE),
            (make_key(KeyKind.SLRU_SIZE), make_key(KeyKind.COMMIT_TIME)),
        )
        found = [entry for start, end in ends for entry in timeline.scan(start, end, Lsn(lsn))]
        assert found == oracle.scan(lsn), f"values of {timeline_id} at {format_lsn(lsn)}"
        for key, value in found:
            assert timeline.get_value(key, Lsn(lsn)) == value

    def check_some(self, reads: int = 1) -> None:
        """Random keys at random LSNs of every timeline that is served."""
        for timeline_id in self.served:
            oldest_lsn, last_lsn = self.readable_lsns(timeline_id)
            self.check_values(timeline_id, last_lsn)
            held = self.leases.get(timeline_id, ())
            for _ in range(reads):
                any_lsn = self.chance.randint(oldest_lsn, last_lsn)
                lsn = self.chance.choice([last_lsn, oldest_lsn, any_lsn, *sorted(held)])
                first, count = self.chance.randrange(6), self.chance.randint(1, 4)
                self.check_blocks(timeline_id, self.chance.choice(FILES), first, count, lsn)
                self.check_values(timeline_id, lsn)

    def check_all(self, moments: int = 6) -> None:
        """Every page and value, now, at the oldest LSN and at some between."""
        for timeline_id in self.served:
            oracle = self.oracles[timeline_id]
            oldest_lsn, last_lsn = self.readable_lsns(timeline_id)
            lsns = {oldest_lsn, last_lsn, *self.leases.get(timeline_id, ())}
            lsns |= {self.chance.randint(oldest_lsn, last_lsn) for _ in range(moments)}
            for lsn in sorted(lsns):
                self.check_values(timeline_id, lsn)
                for file in FILES:
                    blocks = oracle.blocks(file, lsn)
                    self.check_blocks(timeline_id, file, 0, blocks or 1, lsn)

    def check_below(self, timeline_id: TimelineId, lsn: int) -> None:
        """Below the oldest LSN there is nothing, or what an ancestor still has; never something wrong."""
        try:
            self.check_values(timeline_id, lsn)
        except LsnTooOldError:
            return
        assert lsn >= START, f"{timeline_id} served {format_lsn(lsn)}, which is before its history"

    def check_sizes(self) -> None:
        """The tenant costs no more than all WAL and copies where histories begin and points are held."""
        timelines = self.tenant.timelines
        sizes = {each: LogicalSizes(timeline, lambda: 0.0) for each, timeline in timelines.items()}

        async def ask() -> tuple[TenantSizes, int]:
            now_s, copies = asyncio.get_running_loop().time(), 0
            for each, timeline in timelines.items():
                held = timeline.retention.retained(now_s).points
                for lsn in {max(timeline.ancestor_lsn, timeline.oldest_lsn), *held}:
                    copies += await sizes[each].at(Lsn(lsn))
            return await tenant_sizes(self.tenant, sizes, now_s), copies

        asked, copies = self.runner.run(ask())
        wal = sum(timeline.last_record_lsn - START for timeline in timelines.values())
        assert 0 <= asked.synthetic_size_bytes <= copies + wal
        assert [row.timeline_id for row in asked.timelines] == sorted(self.oracles)

    def check_objects(self) -> None:
        """What a manifest names is there."""
        for timeline in self.tenant.timelines.values():
            for layer in timeline.manifest.layers:
                name = timeline.home.object_name(layer)
                assert name in self.objects.objects, f"{name} is named by a manifest and not there"
        for name, intact in self.harmed.items():
            timeline_id = TimelineId(unpack_manifest(intact, name).timeline_id)
            if timeline_id in self.oracles and self.newest_manifest(timeline_id) == name:
                prefix = f"{timeline_prefix(TENANT, timeline_id)}/layers"
                for layer in unpack_manifest(intact, name).layers:
                    assert f"{prefix}/{layer.name}" in self.objects.objects, "what was damaged is lost"

    def check_no_garbage(self) -> None:
        """After a move or a sweep: what nobody names is gone."""
        named = {
            timeline.home.object_name(layer)
            for timeline in self.tenant.timelines.values()
            for layer in timeline.manifest.layers
        }
        kept = {name for name in self.objects.objects if "/layers/" in name}
        assert kept == named, f"{len(kept - named)} layers that nobody names stay for ever"

    def check_local_files(self) -> None:
        """Right after attaching: nothing is there that nobody removes."""
        for timeline in self.tenant.timelines.values():
            names = self.process.filesystem.list_files(timeline.home.local_dir)
            assert set(names) <= set(timeline.stack.files), "a crash left files that nobody removes"


def record_start(lsn: int) -> Lsn:
    """Where the record that ends there starts."""
    return Lsn(START - 0x40 if lsn == START else lsn - 8)


async def compact_wholly(timeline: Timeline) -> None:
    """Until nothing is due any more."""
    for _ in range(COMPACTION_STEPS_MAX):
        if not await timeline.compact():
            return
    raise AssertionError(f"compaction of {timeline.timeline_id} comes to no end")


async def sweep_suspected(timeline: Timeline) -> None:
    timeline.leftovers.suspect()
    await timeline.leftovers.sweep()


async def _called(function: Callable[[], object]) -> object:
    return function()


async def _awaited(something: Awaitable[object]) -> object:
    return await something
