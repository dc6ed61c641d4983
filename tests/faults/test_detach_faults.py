"""A branch of a branch is detached, and every file and object operation of it fails once, in turn.

    main ---+-----------+------------+---->     (flushes that straddle each branch point, rounds of images)
            |           |            +- late    leaves main above: stays
            |           +- middle -+---+->
            |                      |   +- leaf
            |                      +- early     leaves middle at or below leaf's point: moves to leaf
            +- old   (archived)

Whatever happens, every page and value at every LSN stays what the oracle says (S1, S2), a repeated
detachment comes to its end, and so does one that nobody repeats but that had become a fact.
"""

import asyncio
import os
import random
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from excimer.base.errors import RetryableError
from excimer.base.ids import TimelineId
from excimer.base.keys import relation_block_key as block_key
from excimer.base.lsn import Lsn
from excimer.io.filesystem import FaultyFilesystem
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.errors import LsnTooOldError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.values import pack_batch
from tests.kit.directories import new_memory_directory
from tests.kit.io_faults import InlineExecutor
from tests.kit.storage_oracle import FORKS, IMPORTED, MAP_KEY, RELATIONS, TimelineOracle
from tests.kit.storage_world import MAIN, START, TENANT, new_main, storage_context

SMALL = StorageSettings(
    flush_size_bytes=400_000,
    block_size_bytes=3_000,
    image_layer_size_bytes=40_000,
    compaction_target_size_bytes=4_000,
    compaction_threshold=2,
    image_creation_threshold=1,
)
MIDDLE, LEAF, EARLY, LATE, OLD = (TimelineId(f"{number:02x}" * 16) for number in range(2, 7))
LIVE = (MAIN, MIDDLE, LEAF, EARLY, LATE)
REPEATS = 5
STRIDE = int(os.environ.get("EXCIMER_FAULT_STRIDE", "8"))


class CrashError(Exception):
    """The process is gone."""


class Fault:
    """Lets the `at`-th operation fail; after a crash none runs."""

    def __init__(self, at: int, mode: str) -> None:
        self.at = at
        self.mode = mode
        self.count = 0
        self.happened = False

    def step(self, operation: str, name: object) -> None:
        self.count += 1
        if self.count == self.at or (self.happened and self.mode == "crash"):
            self.happened = True
            if self.mode == "crash":
                raise CrashError(f"{operation} {name}")
            if isinstance(name, Path):
                raise OSError(28, "No space left on device")
            raise ObjectStoreError(f"{operation} {name}")


Content = tuple[bytes | None, ...]
"""A value, and per relation fork its pages, None where it does not exist."""


async def read_all(timeline: Timeline, lsn: int) -> Content:
    found = [timeline.get_value(MAP_KEY, Lsn(lsn))]
    for relation in RELATIONS:
        for fork in FORKS:
            key = block_key(relation, fork, 0)
            size = timeline.size_blocks(key, Lsn(lsn))
            if size is None:
                found.append(None)
            else:
                found.append(await timeline.get_pages(key, size, Lsn(lsn)) if size else b"")
    return tuple(found)


def expect_all(oracle: TimelineOracle, lsn: int) -> Content:
    found = [oracle.value(MAP_KEY, lsn)]
    for relation in RELATIONS:
        for fork in FORKS:
            size = oracle.size(relation, fork, lsn)
            keys = [block_key(relation, fork, at) for at in range(size or 0)]
            found.append(None if size is None else b"".join(oracle.page(key, lsn) for key in keys))
    return tuple(found)


class World:
    """What was put, and what object storage held before the detachment."""

    def __init__(self) -> None:
        self.chance = random.Random(11)
        self.oracles: dict[TimelineId, TimelineOracle] = {MAIN: TimelineOracle.imported()}
        self.objects: dict[str, bytes] = {}
        self.expected: dict[tuple[TimelineId, int], Content] = {}

    async def build(self, context: StorageContext) -> None:
        tenant = await TenantStorage.attach(context, TENANT, 1)
        await tenant.create_timeline(new_main(), IMPORTED)
        await self.grow(tenant, MAIN)
        await self.branch(tenant, OLD, MAIN, back=15)
        await self.grow(tenant, OLD)
        await self.grow(tenant, MAIN)
        await self.branch(tenant, MIDDLE, MAIN, back=9)
        await self.grow(tenant, MAIN)
        await self.grow(tenant, MIDDLE)
        await self.branch(tenant, EARLY, MIDDLE, back=20)
        await self.branch(tenant, LEAF, MIDDLE, back=7)
        await self.grow(tenant, MIDDLE)
        await self.branch(tenant, LATE, MIDDLE, back=3)
        for timeline_id in (EARLY, LEAF, LATE):
            await self.grow(tenant, timeline_id)
        await tenant.archive_timeline(OLD)
        for timeline_id in LIVE:
            await tenant.timeline(timeline_id).flush()
        await tenant.close()
        assert isinstance(context.store, MemoryObjectStore)
        self.objects = dict(context.store.objects)
        points = {self.oracles[each].ancestor_lsn for each in (MIDDLE, LEAF, EARLY)}
        for timeline_id in LIVE:
            oracle = self.oracles[timeline_id]
            lsns = {START, oracle.last_lsn, *points, *(point + 8 for point in points)}
            lsns |= set(self.chance.sample(range(START, oracle.last_lsn), 2))
            for lsn in sorted(each for each in lsns if each <= oracle.last_lsn):
                self.expected[timeline_id, lsn] = expect_all(oracle, lsn)

    async def grow(self, tenant: TenantStorage, timeline_id: TimelineId) -> None:
        timeline, oracle = tenant.timeline(timeline_id), self.oracles[timeline_id]
        for _ in range(3):
            before = oracle.last_lsn
            oracle.next_values(self.chance, 20)
            for values, end_lsn in oracle.batches_after(before, 20):
                timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))
            await timeline.flush()
            await timeline.compact()

    async def branch(
        self, tenant: TenantStorage, timeline_id: TimelineId, ancestor_id: TimelineId, back: int
    ) -> None:
        ancestor = self.oracles[ancestor_id]
        lsn = ancestor.ends[-back]
        await tenant.branch_timeline(timeline_id, ancestor_id, lsn=Lsn(lsn), prev_record_lsn=Lsn(lsn - 8))
        self.oracles[timeline_id] = TimelineOracle(ancestor=ancestor, ancestor_lsn=lsn)

    async def check(self, tenant: TenantStorage) -> None:
        """What can be read at the branch points, right above them, and at LSNs by chance."""
        for (timeline_id, lsn), expected in self.expected.items():
            assert await read_all(tenant.timeline(timeline_id), lsn) == expected
        for timeline_id in LIVE:
            with pytest.raises(LsnTooOldError):
                tenant.timeline(timeline_id).get_value(MAP_KEY, Lsn(START - 1))

    def check_tree(self, tenant: TenantStorage, *, is_detached: bool) -> None:
        parents = {each: tenant.timeline(each).manifest.ancestor_timeline_id for each in LIVE}
        if is_detached:
            assert parents == {MAIN: None, LEAF: None, MIDDLE: MAIN, EARLY: LEAF, LATE: MIDDLE}
            assert tenant.timeline(LEAF).manifest.detachment is None
        else:
            assert parents == {MAIN: None, MIDDLE: MAIN, LEAF: MIDDLE, EARLY: MIDDLE, LATE: MIDDLE}
        assert tenant.archived[OLD].ancestor_timeline_id == MAIN


async def detach_with_fault(world: World, directory: Path, at: int, mode: str) -> bool:
    """Whether the fault happened: when it no longer does, every operation has had its turn."""
    inner = MemoryObjectStore()
    inner.objects.update(world.objects)
    fault = Fault(0, mode)
    store = FaultyObjectStore(inner, fault.step, lose_answer=mode == "lost answer")
    filesystem = FaultyFilesystem(fault.step)
    place = partial(storage_context, directory, settings=SMALL, executor=InlineExecutor())
    async with place(store=store, filesystem=filesystem) as context:
        tenant = await TenantStorage.attach(context, TENANT, 2)
        fault.count, fault.at = 0, at
        try:
            for _ in range(REPEATS):
                try:
                    await tenant.detach_ancestor(LEAF)
                    break
                except (RetryableError, OSError):
                    assert mode != "crash"
            fault.at = -1
            world.check_tree(tenant, is_detached=True)
            await world.check(tenant)
        except CrashError:
            assert fault.happened
    async with place(store=inner) as context:
        tenant = await TenantStorage.attach(context, TENANT, 3)
        became_fact = tenant.timeline(LEAF).ancestor is None
        assert became_fact or mode == "crash"
        world.check_tree(tenant, is_detached=became_fact)
        if mode == "crash":
            await world.check(tenant)
            await tenant.detach_ancestor(LEAF)
            world.check_tree(tenant, is_detached=True)
        await world.check(tenant)
        await tenant.close()
    return fault.happened


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World()

    async def build() -> None:
        async with storage_context(tmp_path_factory.mktemp("built"), settings=SMALL) as context:
            await made.build(context)

    asyncio.run(build())
    return made


@pytest.mark.parametrize(("mode", "first"), [("error", 2), ("lost answer", 4), ("crash", 6)])
def test_any_operation_of_a_detachment_may_fail(world: World, mode: str, first: int) -> None:
    """Every STRIDE-th operation; all of them with EXCIMER_FAULT_STRIDE=1."""
    at, happened = (first if STRIDE > 1 else 1), True
    while happened:
        directory = new_memory_directory("excimer-detach-")
        try:
            happened = asyncio.run(detach_with_fault(world, directory, at, mode))
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        at += STRIDE
    assert at > 30, "the detachment does less than it did: is the test still worth its name?"


def test_a_branch_below_its_ancestors_branch_point(world: World, tmp_path: Path) -> None:
    """It needs nothing of the ancestors that begin above, and of the others nothing above its own point."""
    low_id = TimelineId("77" * 16)
    main = world.oracles[MAIN]
    below = [end for end in main.ends if end < world.oracles[MIDDLE].ancestor_lsn]
    low = TimelineOracle(ancestor=main, ancestor_lsn=below[-4])

    async def scenario() -> None:
        store = MemoryObjectStore()
        store.objects.update(world.objects)
        async with storage_context(tmp_path, store=store, settings=SMALL) as context:
            tenant = await TenantStorage.attach(context, TENANT, 2)
            lsn = Lsn(low.ancestor_lsn)
            await tenant.branch_timeline(low_id, LEAF, lsn=lsn, prev_record_lsn=Lsn(lsn - 8))
            low.next_values(random.Random(5), 20)
            for values, end_lsn in low.batches_after(lsn, 20):
                tenant.timeline(low_id).put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))
            assert await tenant.detach_ancestor(low_id) == []
            for read_lsn in (START, *below[-6:], low.last_lsn):
                assert await read_all(tenant.timeline(low_id), read_lsn) == expect_all(low, read_lsn)

    asyncio.run(scenario())


def test_reads_and_ingest_go_on_while_a_branch_is_detached(world: World, tmp_path: Path) -> None:
    """Each operation of the detachment leaves readers time to get in between."""
    oracle = world.oracles[LEAF]
    own = TimelineOracle(oracle.ancestor, oracle.ancestor_lsn, list(oracle.values), list(oracle.ends))
    known = {lsn: content for (each, lsn), content in world.expected.items() if each == LEAF}

    def slow(operation: str, name: str) -> None:
        time.sleep(0.002)

    async def scenario() -> None:
        store = MemoryObjectStore()
        store.objects.update(world.objects)
        slowed = FaultyObjectStore(store, slow)
        async with storage_context(tmp_path, store=slowed, settings=SMALL) as context:
            tenant = await TenantStorage.attach(context, TENANT, 2)
            leaf = tenant.timeline(LEAF)
            detaching = asyncio.ensure_future(tenant.detach_ancestor(LEAF))
            rounds = 0
            while not detaching.done() or rounds < 2:
                for lsn, expected in known.items():
                    assert await read_all(leaf, lsn) == expected
                before = own.last_lsn
                own.next_values(world.chance, 3)
                for values, end_lsn in own.batches_after(before, 3):
                    leaf.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))
                rounds += 1
            assert await detaching == [EARLY]
            await leaf.flush()
            assert await read_all(leaf, own.last_lsn) == expect_all(own, own.last_lsn)

    asyncio.run(scenario())
