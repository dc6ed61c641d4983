"""Garbage collection on a real engine: what goes, what stays readable, and in which order."""

import asyncio
import dataclasses
import random
import threading
from pathlib import Path

import pytest

from excimer.base.ids import TimelineId
from excimer.base.keys import KeyKind, kind_range
from excimer.base.lsn import Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine.errors import LsnTooOldError, TimelineHasBranchesError, TimelineStoppedError
from excimer.storage.engine.garbage_collector import GcTooEarlyError
from excimer.storage.engine.layer_stack import LayerStack
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.value_reads import ValueCache, scan_values
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.plan.retention import NotRetainedError
from tests.kit.collected_timeline import SMALL, check_reads, grow, new_tenant
from tests.kit.storage_oracle import TimelineOracle
from tests.kit.storage_world import MAIN, START, attach, in_event_loop, storage_context

CHILD, GRANDCHILD = TimelineId("22" * 16), TimelineId("33" * 16)


def own_objects(objects: MemoryObjectStore, timeline: Timeline) -> set[str]:
    return {name.rsplit("/", 1)[-1] for name in objects.objects if f"{timeline.timeline_id}/layers/" in name}


@in_event_loop
async def test_history_goes_and_held_points_stay(tmp_path: Path) -> None:
    """A child, a grandchild below its parent's branch point, and a lease: each read survives everything."""
    objects, chance = MemoryObjectStore(), random.Random(1)
    async with storage_context(tmp_path, store=objects, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 4)
        early, late, leased = (oracle.ends[len(oracle.ends) * part // 10] for part in (3, 6, 8))
        child = await tenant.branch_timeline(CHILD, MAIN, lsn=Lsn(late), prev_record_lsn=Lsn(late - 8))
        child_oracle = TimelineOracle(ancestor=oracle, ancestor_lsn=late)
        await grow(child, child_oracle, chance, 3)
        await tenant.branch_timeline(GRANDCHILD, CHILD, lsn=Lsn(early), prev_record_lsn=Lsn(early - 8))
        grandchild_oracle = TimelineOracle(ancestor=child_oracle, ancestor_lsn=early)
        await tenant.set_settings({"lsn_lease_length_s": 1000})
        timeline.lease(Lsn(leased))
        await tenant.set_settings({})
        await grow(timeline, oracle, chance, 12)
        before = sum(layer.size_bytes for layer in timeline.manifest.layers)
        outcome = await timeline.collect_garbage(timeline.last_record_lsn)
        await timeline.in_thread(timeline.deletions.drain)
        assert outcome.held_points == 3
        assert outcome.layers_removed > 0
        assert sum(layer.size_bytes for layer in timeline.manifest.layers) < before
        assert own_objects(objects, timeline) == {layer.name for layer in timeline.manifest.layers}
        await check_reads(timeline, oracle, leased)
        await check_reads(timeline, oracle, oracle.last_lsn)
        await check_reads(child, child_oracle, late)
        await check_reads(child, child_oracle, child_oracle.last_lsn)
        await check_reads(tenant.timeline(GRANDCHILD), grandchild_oracle, early)
        with pytest.raises(LsnTooOldError):
            await check_reads(timeline, oracle, oracle.ends[len(oracle.ends) // 2])
        await tenant.delete_timeline(GRANDCHILD)
        await tenant.delete_timeline(CHILD)
        outcome = await timeline.collect_garbage(timeline.last_record_lsn)
        assert (outcome.held_points, outcome.layers_removed > 0) == (1, True)


@in_event_loop
async def test_a_branch_collects_its_own_history_and_needs_no_copy_of_its_ancestor(tmp_path: Path) -> None:
    chance = random.Random(2)
    async with storage_context(tmp_path, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 6)
        child = await tenant.branch_timeline(CHILD, MAIN)
        child_oracle = TimelineOracle(ancestor=oracle, ancestor_lsn=oracle.last_lsn)
        await grow(child, child_oracle, chance, 12)
        outcome = await child.collect_garbage(child.last_record_lsn)
        assert outcome.layers_removed > 0
        assert (child.oldest_lsn, timeline.oldest_lsn) == (outcome.cutoff_lsn, START)
        await check_reads(child, child_oracle, child_oracle.last_lsn)
        await check_reads(timeline, oracle, oracle.last_lsn)
        await check_reads(timeline, oracle, oracle.ends[5])
        # Below its branch point the child shows its ancestor, under the ancestor's cutoff.
        await check_reads(child, child_oracle, oracle.ends[5])
        await timeline.collect_garbage(timeline.last_record_lsn)
        with pytest.raises(LsnTooOldError):
            await check_reads(child, child_oracle, oracle.ends[5])
        await check_reads(child, child_oracle, child_oracle.last_lsn)


@in_event_loop
async def test_each_window_keeps_what_is_in_it(tmp_path: Path) -> None:
    chance = random.Random(3)
    async with storage_context(tmp_path, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 4)
        middle = Lsn(oracle.ends[50])
        assert (await timeline.collect_garbage(middle)).cutoff_lsn == middle
        await tenant.set_settings({"gc_horizon_bytes": 400})
        outcome = await timeline.collect_garbage(timeline.last_record_lsn)
        assert outcome.cutoff_lsn == timeline.last_record_lsn - 400
        assert timeline.oldest_lsn == outcome.cutoff_lsn
        for lsn in oracle.ends:
            if lsn >= outcome.cutoff_lsn:
                await check_reads(timeline, oracle, lsn)


@in_event_loop
async def test_nothing_is_collected_before_leases_could_be_renewed(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, random.Random(4), 3)
        await tenant.set_settings({"lsn_lease_length_s": 1000})
        with pytest.raises(GcTooEarlyError, match="attached a moment ago"):
            await timeline.collect_garbage(timeline.last_record_lsn)
        assert timeline.oldest_lsn == START
        with pytest.raises(LsnTooOldError):
            timeline.lease(Lsn(START - 8))  # what cannot be read cannot be kept
        assert timeline.lease(Lsn(oracle.ends[3])) == pytest.approx(1000, abs=1)


@in_event_loop
async def test_no_layer_goes_before_the_cutoff_is_durable(tmp_path: Path) -> None:
    """The manifest with the cutoff fails: nothing has gone, and what it announced is refused to newcomers."""
    failing: set[str] = set()

    def fault(operation: str, name: str) -> None:
        if operation in failing and "index-" in name:
            raise ObjectStoreError(f"{operation} {name}")

    store, chance = FaultyObjectStore(MemoryObjectStore(), fault), random.Random(5)
    async with storage_context(tmp_path, store=store, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 8)
        names = set(timeline.stack.files)
        failing.add("put")
        with pytest.raises(ObjectStoreError):
            await timeline.collect_garbage(timeline.last_record_lsn)
        assert set(timeline.stack.files) == names
        assert timeline.oldest_lsn == START
        await check_reads(timeline, oracle, oracle.ends[10])
        with pytest.raises(NotRetainedError):
            await tenant.branch_timeline(CHILD, MAIN, lsn=Lsn(oracle.ends[10]))
        failing.clear()
        assert (await timeline.collect_garbage(timeline.last_record_lsn)).layers_removed > 0
        await tenant.close()
        again = (await attach(context, generation=2)).timeline(MAIN)
        assert again.oldest_lsn == oracle.last_lsn
        await check_reads(again, oracle, oracle.last_lsn)


BOTTOM_ONLY = dataclasses.replace(
    SMALL, image_creation_threshold=1000, image_layer_size_bytes=9000, compaction_threshold=100
)
"""No images but those that a collection writes, in several pieces."""


@in_event_loop
async def test_images_at_the_cutoff_let_everything_older_go(tmp_path: Path) -> None:
    chance = random.Random(9)
    async with storage_context(tmp_path, settings=BOTTOM_ONLY) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 12)
        child = await tenant.branch_timeline(CHILD, MAIN)
        child_oracle = TimelineOracle(ancestor=oracle, ancestor_lsn=oracle.last_lsn)
        await grow(child, child_oracle, chance, 12)
        outcome = await timeline.collect_garbage(timeline.last_record_lsn)
        assert outcome.has_written_images
        assert {layer.kind for layer in timeline.manifest.layers} == {LayerKind.IMAGE}
        assert len(timeline.manifest.layers) > 1
        await check_reads(timeline, oracle, oracle.last_lsn)
        assert (await child.collect_garbage(child.last_record_lsn)).has_written_images
        assert {layer.covers_after_lsn for layer in child.manifest.layers} == {oracle.last_lsn}
        await check_reads(child, child_oracle, child_oracle.last_lsn)
        await grow(timeline, oracle, chance, 2)
        for lsn in oracle.ends[-20:]:
            await check_reads(timeline, oracle, lsn)


@pytest.mark.parametrize("piece", range(1, 5))
@in_event_loop
async def test_images_left_halfway_by_a_crash_are_finished(tmp_path: Path, piece: int) -> None:
    """Object storage goes away at each piece; the next process finishes what there is of the round."""
    uploaded = [-1]

    def fault(operation: str, name: str) -> None:
        if uploaded[0] >= 0 and operation.startswith("put"):
            uploaded[0] += "/image-" in name
            if uploaded[0] >= piece:
                raise ObjectStoreError(f"{operation} {name}")

    store, chance = FaultyObjectStore(MemoryObjectStore(), fault), random.Random(10)
    async with storage_context(tmp_path, store=store, settings=BOTTOM_ONLY) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 12)
        uploaded[0] = 0
        with pytest.raises(ObjectStoreError):
            await timeline.collect_garbage(timeline.last_record_lsn)
        await tenant.close()
        uploaded[0] = -1
        timeline = (await attach(context, generation=2)).timeline(MAIN)
        await check_reads(timeline, oracle, oracle.last_lsn)
        await timeline.collect_garbage(timeline.last_record_lsn)
        assert {layer.kind for layer in timeline.manifest.layers} == {LayerKind.IMAGE}
        assert all(layer.round_after_lsn is None for layer in timeline.manifest.layers)
        await check_reads(timeline, oracle, oracle.last_lsn)


@in_event_loop
async def test_a_collection_under_way_does_not_bring_a_deleted_timeline_back(tmp_path: Path) -> None:
    objects, chance = MemoryObjectStore(), random.Random(6)
    async with storage_context(tmp_path, store=objects, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 8)
        async with timeline.compaction_lock:
            collecting = asyncio.create_task(timeline.collect_garbage(timeline.last_record_lsn))
            await asyncio.sleep(0)
            await tenant.delete_timeline(MAIN)
        with pytest.raises(TimelineStoppedError):
            await collecting
        assert [name.rsplit("/", 1)[-1] for name in objects.objects if MAIN in name] == ["deleted"]


@in_event_loop
async def test_a_branch_that_is_being_made_is_not_collected_from(tmp_path: Path) -> None:
    """Its manifest is on the way while a whole collection passes its branch point."""
    reached, let_go = threading.Event(), threading.Event()

    def fault(operation: str, name: str) -> None:
        if operation == "put" and f"{CHILD}/index-" in name:
            reached.set()
            assert let_go.wait(10)

    store, chance = FaultyObjectStore(MemoryObjectStore(), fault), random.Random(7)
    async with storage_context(tmp_path, store=store, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 6)
        lsn = Lsn(oracle.ends[20])
        branching = asyncio.create_task(
            tenant.branch_timeline(CHILD, MAIN, lsn=lsn, prev_record_lsn=Lsn(lsn - 8))
        )
        assert await asyncio.to_thread(reached.wait, 10)
        outcome = await timeline.collect_garbage(timeline.last_record_lsn)
        await timeline.in_thread(timeline.deletions.drain)
        assert (outcome.held_points, outcome.cutoff_lsn) == (1, oracle.last_lsn)
        let_go.set()
        await check_reads(await branching, TimelineOracle(ancestor=oracle, ancestor_lsn=lsn), lsn)


@in_event_loop
async def test_a_branch_that_comes_during_a_collection_is_refused(tmp_path: Path) -> None:
    """From the announcement on: the manifest with the cutoff is still on the way."""
    reached, let_go = threading.Event(), threading.Event()

    def fault(operation: str, name: str) -> None:
        if reached.is_set() or operation != "put" or "index-" not in name or not armed:
            return
        reached.set()
        assert let_go.wait(10)

    armed: list[bool] = []
    store, chance = FaultyObjectStore(MemoryObjectStore(), fault), random.Random(8)
    async with storage_context(tmp_path, store=store, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 4)
        armed.append(True)
        collecting = asyncio.create_task(timeline.collect_garbage(timeline.last_record_lsn))
        assert await asyncio.to_thread(reached.wait, 10)
        with pytest.raises(NotRetainedError):
            await tenant.branch_timeline(CHILD, MAIN, lsn=Lsn(oracle.ends[20]))
        with pytest.raises(NotRetainedError):
            timeline.lease(Lsn(oracle.ends[20]))
        await check_reads(timeline, oracle, oracle.ends[20])  # it is still there
        let_go.set()
        await collecting


@in_event_loop
async def test_a_branch_that_may_have_been_made_keeps_its_point(tmp_path: Path) -> None:
    """Its manifest is there, the answer was lost, and nobody tries again before the next attachment."""
    failing: list[str] = []

    def fault(operation: str, name: str) -> None:
        if operation == "put" and any(part in name for part in failing):
            raise ObjectStoreError(f"the answer to {operation} {name} was lost")

    objects = MemoryObjectStore()
    store, chance = FaultyObjectStore(objects, fault, lose_answer=True), random.Random(11)
    async with storage_context(tmp_path, store=store, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 6)
        lsn = Lsn(oracle.ends[20])
        failing.append(f"{CHILD}/index-")
        with pytest.raises(ObjectStoreError):
            await tenant.branch_timeline(CHILD, MAIN, lsn=lsn)
        failing.clear()
        await tenant.branch_timeline(GRANDCHILD, MAIN)
        await tenant.delete_timeline(GRANDCHILD)
        assert (await timeline.collect_garbage(timeline.last_record_lsn)).held_points == 1
        with pytest.raises(TimelineHasBranchesError):
            await tenant.delete_timeline(MAIN)
        await tenant.close()
        tenant = await attach(context, generation=2)
        child_oracle = TimelineOracle(ancestor=oracle, ancestor_lsn=lsn)
        await check_reads(tenant.timeline(CHILD), child_oracle, lsn)


@in_event_loop
async def test_a_branch_that_may_have_been_made_can_be_made_or_deleted(tmp_path: Path) -> None:
    failing: list[str] = []

    def fault(operation: str, name: str) -> None:
        if operation == "put" and any(part in name for part in failing):
            raise ObjectStoreError(f"the answer to {operation} {name} was lost")

    objects = MemoryObjectStore()
    store = FaultyObjectStore(objects, fault, lose_answer=True)
    async with storage_context(tmp_path, store=store, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, random.Random(12), 3)
        for child_id in (CHILD, GRANDCHILD):
            failing.append(f"{child_id}/index-")
            with pytest.raises(ObjectStoreError):
                await tenant.branch_timeline(child_id, MAIN, lsn=Lsn(oracle.ends[20]))
        failing.clear()
        child = await tenant.branch_timeline(CHILD, MAIN, lsn=Lsn(oracle.ends[20]))
        assert not tenant.may_exist(CHILD)
        assert tenant.may_exist(GRANDCHILD)
        await tenant.delete_timeline(GRANDCHILD)
        assert not [name for name in objects.objects if f"{GRANDCHILD}/index-" in name]
        await check_reads(
            child, TimelineOracle(ancestor=oracle, ancestor_lsn=oracle.ends[20]), oracle.ends[20]
        )
        await tenant.delete_timeline(CHILD)
        assert (await timeline.collect_garbage(timeline.last_record_lsn)).held_points == 0


@dataclasses.dataclass
class StackReader:
    """A read that has taken its layers."""

    stack: LayerStack
    value_cache: ValueCache


def scan_stack(stack: LayerStack, lsn: int) -> list[tuple[bytes, bytes]]:
    """All keys with whole values."""
    reader = StackReader(stack, ValueCache(0, lambda lsn: False))
    kinds = kind_range(KeyKind.RELATION_SIZE), kind_range(KeyKind.RELATION_MAP)
    return [entry for start, end in kinds for entry in scan_values(reader, start, end, lsn)]


@in_event_loop
async def test_a_read_that_began_before_a_detachment_finds_the_old_ancestor(tmp_path: Path) -> None:
    """It holds the branch's old layers; the ancestor is collected before it comes there."""
    chance = random.Random(13)
    async with storage_context(tmp_path, settings=SMALL) as context:
        tenant, timeline, oracle = await new_tenant(context)
        await grow(timeline, oracle, chance, 4)
        lsn = Lsn(oracle.ends[30])
        child = await tenant.branch_timeline(CHILD, MAIN, lsn=lsn)
        await grow(timeline, oracle, chance, 4)
        readers = [child.stack]
        await tenant.detach_ancestor(CHILD)
        assert (await timeline.collect_garbage(timeline.last_record_lsn)).held_points == 1
        old_view = dataclasses.replace(readers[0])
        assert scan_stack(old_view, lsn) == oracle.scan(lsn)
        del old_view
        readers.clear()
        assert (await timeline.collect_garbage(timeline.last_record_lsn)).held_points == 0
        await check_reads(child, TimelineOracle(ancestor=oracle, ancestor_lsn=lsn), lsn)
