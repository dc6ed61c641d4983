"""A storage engine whose every file and object operation fails once, in turn, in three ways.

*error*: the operation fails, the caller tries again. *lost answer*: an object is written, but the
caller is told it failed. *crash*: everything stops there, and the next process attaches to what is
left. After each, every page at every LSN must be what the oracle says (S1), nothing acknowledged as
durable may be missing (D2), and no temporary file may stay.
"""

import asyncio
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from excimer.base.errors import RetryableError
from excimer.base.ids import TimelineId
from excimer.base.keys import relation_block_key as block_key
from excimer.base.lsn import Lsn
from excimer.io.filesystem import FaultyFilesystem
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.values import pack_batch
from tests.kit.storage_oracle import BLOCKS_MAX, FORKS, IMPORTED, RELATIONS, TimelineOracle
from tests.kit.storage_world import MAIN, TENANT, new_main, storage_context

SMALL = StorageSettings(
    flush_size_bytes=30_000,
    block_size_bytes=12_000,
    image_layer_size_bytes=40_000,
    compaction_target_size_bytes=4_000,
    compaction_threshold=2,
    image_creation_threshold=1,
)
BRANCH = TimelineId("22" * 16)
TRIES = 4
STRIDE = int(os.environ.get("EXCIMER_FAULT_STRIDE", "8"))


class CrashError(Exception):
    """The process is gone."""


class Fault:
    """Counts operations and lets one of them fail."""

    def __init__(self, at: int, mode: str) -> None:
        self.at = at
        self.mode = mode
        self.count = 0
        self.operation = ""

    def step(self, operation: str, name: object) -> None:
        self.count += 1
        if self.count == self.at:
            self.operation = f"{operation} {name}"
            if self.mode == "crash":
                raise CrashError(self.operation)
            if isinstance(name, Path):
                raise OSError(28, "No space left on device")
            raise ObjectStoreError(self.operation)
        if self.mode == "crash" and self.count > self.at > 0:
            raise CrashError("nothing runs after a crash")


class World:
    """The script's state outside the process: what was put, and what the engine said was durable."""

    def __init__(self) -> None:
        self.main = TimelineOracle.imported()
        self.branch: TimelineOracle | None = None
        self.chance = random.Random(7)
        self.created = False
        self.durable: dict[TimelineId, int] = {}


async def retried(step: Callable[[], Awaitable[object]]) -> None:
    for _ in range(TRIES):
        try:
            await step()
        except (RetryableError, OSError):
            continue
        return
    raise AssertionError("still failing though the fault has passed")


def put_records(timeline: Timeline, oracle: TimelineOracle, world: World, count: int) -> None:
    before = oracle.last_lsn
    oracle.next_values(world.chance, count)
    for values, end_lsn in oracle.batches_after(before, 10):
        timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))


async def flush(timeline: Timeline, world: World) -> None:
    await timeline.flush()
    world.durable[timeline.timeline_id] = timeline.remote_consistent_lsn


async def compact(timeline: Timeline) -> None:
    """Every step: a merge, a round in pieces."""
    while await timeline.compact():
        pass


async def script(context: StorageContext, world: World) -> None:
    tenant = TenantStorage(context, TENANT, 1)
    await retried(lambda: tenant.create_timeline(new_main(), IMPORTED))
    world.created = True
    main = tenant.timeline(MAIN)
    for _ in range(2):
        put_records(main, world.main, world, 25)
        await retried(lambda: flush(main, world))
    put_records(main, world.main, world, 5)
    await retried(lambda: tenant.branch_timeline(BRANCH, MAIN))
    branch = tenant.timeline(BRANCH)
    world.branch = TimelineOracle(ancestor=world.main, ancestor_lsn=world.main.last_lsn)
    world.durable[BRANCH] = branch.last_record_lsn
    await retried(lambda: compact(main))
    put_records(branch, world.branch, world, 20)
    await retried(lambda: flush(branch, world))
    put_records(main, world.main, world, 20)
    await retried(lambda: flush(main, world))


async def check(tenant: TenantStorage, world: World) -> None:
    """Every page now, and at a few LSNs of the past."""
    for timeline_id, oracle in ((MAIN, world.main), (BRANCH, world.branch)):
        if oracle is None:
            continue
        timeline = tenant.timeline(timeline_id)
        assert timeline.last_record_lsn == oracle.last_lsn
        for lsn in [oracle.last_lsn, *random.Random(1).sample(oracle.ends, min(4, len(oracle.ends)))]:
            for relation in RELATIONS:
                for fork in FORKS:
                    key = block_key(relation, fork, 0)
                    size = oracle.size(relation, fork, lsn)
                    assert timeline.size_blocks(key, Lsn(lsn)) == size
                    assert size is None or size <= BLOCKS_MAX
                    if size:
                        expected = [oracle.page(block_key(relation, fork, at), lsn) for at in range(size)]
                        assert await timeline.get_pages(key, size, Lsn(lsn)) == b"".join(expected)


async def run_with_fault(directory: Path, at: int, mode: str) -> bool:
    """Whether the fault happened: when it no longer does, every operation has had its turn."""
    fault = Fault(at, mode)
    inner = MemoryObjectStore()
    world = World()
    store = FaultyObjectStore(inner, fault.step, lose_answer=mode == "lost answer")
    filesystem = FaultyFilesystem(fault.step)
    try:
        async with storage_context(directory, store=store, filesystem=filesystem, settings=SMALL) as context:
            await script(context, world)
            if mode != "crash":
                fault.at = 0
                tenant = await TenantStorage.attach(context, TENANT, 2)
                await replay(tenant, world)
                await check(tenant, world)
    except CrashError:
        pass
    if mode == "crash":
        async with storage_context(directory, store=inner, settings=SMALL) as context:
            await check_after_crash(context, world)
    return bool(fault.operation)


async def check_after_crash(context: StorageContext, world: World) -> None:
    tenant = await TenantStorage.attach(context, TENANT, 2)
    if MAIN not in tenant.timelines:
        assert not world.created
        return
    if BRANCH not in tenant.timelines:
        assert BRANCH not in world.durable
        world.branch = None
    elif world.branch is None:  # the branch was made, its maker never heard of it
        world.branch = TimelineOracle(ancestor=world.main, ancestor_lsn=tenant.timeline(BRANCH).ancestor_lsn)
    for timeline_id, durable_lsn in world.durable.items():
        assert tenant.timeline(timeline_id).remote_consistent_lsn >= durable_lsn
    await replay(tenant, world)
    await check(tenant, world)
    for timeline in tenant.timelines.values():
        names = context.filesystem.list_files(timeline.home.local_dir)
        assert set(names) <= set(timeline.stack.files), "a crash left files that nobody removes"
    for timeline in tenant.timelines.values():
        await compact(timeline)  # from wherever it was left
    await check(tenant, world)


async def replay(tenant: TenantStorage, world: World) -> None:
    """WAL after what is durable comes again."""
    for timeline_id, oracle in ((MAIN, world.main), (BRANCH, world.branch)):
        if oracle is not None:
            timeline = tenant.timeline(timeline_id)
            for values, end_lsn in oracle.batches_after(timeline.disk_consistent_lsn, 10):
                if not timeline._has_room():
                    await timeline.flush()
                timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))


@pytest.mark.parametrize(("mode", "first"), [("error", 1), ("lost answer", 3), ("crash", 5)])
def test_any_operation_may_fail(tmp_path: Path, mode: str, first: int) -> None:
    """Every STRIDE-th operation; all of them with EXCIMER_FAULT_STRIDE=1."""
    at = first if STRIDE > 1 else 1
    while asyncio.run(run_with_fault(tmp_path / str(at), at, mode)):
        shutil.rmtree(tmp_path / str(at), ignore_errors=True)
        at += STRIDE
    assert at > 100, "the script does less than it did: is it still worth its name?"
