"""Layers leave object storage only when nothing can need them: D3 and G1, step by step."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine import deletion_queue
from excimer.storage.engine.claim import claim_newest
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.manifest_store import OvertakenError, timeline_prefix
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.manifest import LayerDescription
from tests.kit.storage_oracle import IMPORTED, MAP_KEY
from tests.kit.storage_world import (
    MAIN,
    START,
    TENANT,
    attach,
    in_event_loop,
    new_main,
    put,
    size_value,
    storage_context,
)
from tests.unit.storage.test_timeline import SIZE

LAYERS = f"{timeline_prefix(TENANT, MAIN)}/layers/"


class Steps:
    """What is done to the store, in order; some operations fail, or something else happens right before."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.failing: set[str] = set()
        self.before: dict[tuple[str, str], Callable[[], object]] = {}

    def __call__(self, operation: str, name: str) -> None:
        last_part = name.rsplit("/", 1)[-1]
        hook = self.before.pop((operation, last_part), None)
        if hook is not None:
            hook()
        if operation in self.failing:
            raise ObjectStoreError(f"{operation} {name}")
        self.done.append((operation, last_part))


def layer_names(objects: MemoryObjectStore) -> set[str]:
    return {name.removeprefix(LAYERS) for name in objects.objects if name.startswith(LAYERS)}


def named(timeline: Timeline) -> set[str]:
    return {layer.name for layer in timeline.manifest.layers}


async def flushed(timeline: Timeline, lsn: int, size: int) -> LayerDescription:
    """One more layer, and its description."""
    put(timeline, [size_value(SIZE, lsn, size)])
    await timeline.flush()
    return next(layer for layer in timeline.manifest.layers if layer.end_lsn == lsn)


async def remove(timeline: Timeline, layer: LayerDescription) -> None:
    await timeline.in_thread(partial(timeline.commits.commit_layers, timeline.manifest, [], removed=[layer]))


@in_event_loop
async def test_a_layer_goes_after_the_manifest_and_after_a_look_for_newer_generations(tmp_path: Path) -> None:
    steps, objects = Steps(), MemoryObjectStore()
    async with storage_context(tmp_path, store=FaultyObjectStore(objects, steps)) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(timeline, START + 8, 1)
        path = timeline.home.local_path(layer)
        steps.done.clear()
        await remove(timeline, layer)
        assert layer.name in layer_names(objects)
        assert path.exists()
        assert await timeline.in_thread(timeline.deletions.drain) == 1
        manifest = next(name for operation, name in steps.done if operation == "put")
        deleted = ("delete", layer.name)
        of_older_manifests = [step for step in steps.done if step[0] == "delete" and step != deleted]
        rest = [step for step in steps.done if step not in of_older_manifests]
        assert rest == [("put", manifest), ("list", MAIN), ("size", "index-00000002-00000001"), deleted]
        assert layer_names(objects) == named(timeline)
        assert not path.exists()


@in_event_loop
async def test_nothing_goes_when_the_manifest_could_not_be_written(tmp_path: Path) -> None:
    steps, objects = Steps(), MemoryObjectStore()
    async with storage_context(tmp_path, store=FaultyObjectStore(objects, steps)) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(timeline, START + 8, 1)
        steps.failing.add("put")
        with pytest.raises(ObjectStoreError):
            await remove(timeline, layer)
        assert await timeline.in_thread(timeline.deletions.drain) == 0
        assert timeline.get_value(SIZE, Lsn(START + 8)) == b"\1\0\0\0"


@in_event_loop
async def test_a_reader_of_an_older_map_is_waited_for(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(timeline, START + 8, 1)
        readers = [timeline.stack]
        await flushed(timeline, START + 16, 2)
        await remove(timeline, layer)
        assert await timeline.in_thread(timeline.deletions.drain) == 0
        assert layer.name in layer_names(objects)
        readers.clear()
        assert await timeline.in_thread(timeline.deletions.drain) == 1
        assert layer_names(objects) == named(timeline)


@in_event_loop
async def test_what_could_not_be_deleted_is_tried_again_in_the_background(tmp_path: Path) -> None:
    steps, objects = Steps(), MemoryObjectStore()
    async with storage_context(tmp_path, store=FaultyObjectStore(objects, steps)) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(timeline, START + 8, 1)
        running = asyncio.create_task(timeline.run())
        failed, repeated = threading.Event(), threading.Event()
        steps.before["delete", layer.name] = failed.set
        steps.failing.add("delete")
        await remove(timeline, layer)
        assert await asyncio.to_thread(failed.wait, 10)
        assert layer.name in layer_names(objects)
        steps.before["delete", layer.name] = repeated.set
        steps.failing.clear()
        assert await asyncio.to_thread(repeated.wait, 10)
        await timeline.in_thread(timeline.deletions.drain)  # after the one under way
        assert layer_names(objects) == named(timeline)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@in_event_loop
async def test_an_overtaken_generation_deletes_nothing(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as old_context,
        storage_context(tmp_path / "new", store=objects) as new_context,
    ):
        tenant = await attach(old_context)
        old = await tenant.create_timeline(new_main(), IMPORTED)
        layer = await flushed(old, START + 8, 1)
        new = (await attach(new_context, generation=2)).timeline(MAIN)
        await remove(old, layer)
        with pytest.raises(OvertakenError):
            await old.in_thread(old.deletions.drain)
        assert len(old.deletions) == 0
        with pytest.raises(OvertakenError):
            await tenant.delete_timeline(MAIN)
        assert new.get_value(SIZE, Lsn(START + 8)) == b"\1\0\0\0"
        assert new.get_value(MAP_KEY, Lsn(START + 8)) == b"the first map"
        assert named(new) <= layer_names(objects)


@pytest.mark.parametrize("when", [("get", "index-00000001-00000002"), ("put", "index-00000002-00000001")])
@in_event_loop
async def test_a_generation_that_attaches_meanwhile_sees_what_it_may_not_need(
    tmp_path: Path, when: tuple[str, str]
) -> None:
    """The older one removes and deletes a layer between the newer one's reading and its claim."""
    steps, objects = Steps(), MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as old_context,
        storage_context(tmp_path / "new", store=FaultyObjectStore(objects, steps)) as new_context,
    ):
        old = await (await attach(old_context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(old, START + 8, 1)
        assert f"{timeline_prefix(TENANT, MAIN)}/index-00000001-00000002" in objects.objects

        def overtake() -> None:
            old.commits.commit_layers(old.manifest, [], removed=[layer])
            assert old.deletions.drain() == 1

        steps.before[when] = overtake
        new = (await attach(new_context, generation=2)).timeline(MAIN)
        assert not steps.before
        assert named(new) == named(old) == layer_names(objects)


@pytest.mark.parametrize("generation", [2, 3])
@in_event_loop
async def test_a_claim_left_halfway_is_checked_again(tmp_path: Path, generation: int) -> None:
    """The newer one dies after its claim, before it has looked for what the older one did meanwhile; then it
    comes again, or another.
    """
    steps, objects = Steps(), MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as old_context,
        storage_context(tmp_path / "new", store=FaultyObjectStore(objects, steps)) as new_context,
    ):
        old = await (await attach(old_context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(old, START + 8, 1)

        def overtake_then_die() -> None:
            old.commits.commit_layers(old.manifest, [], removed=[layer])
            old.deletions.drain()
            steps.before["list", MAIN] = lambda: steps.failing.add("list")

        steps.before["put", "index-00000002-00000001"] = overtake_then_die
        with pytest.raises(ObjectStoreError):
            await attach(new_context, generation=2)
        assert f"{timeline_prefix(TENANT, MAIN)}/index-00000002-00000001" in objects.objects
        steps.failing.clear()
        new = (await attach(new_context, generation=generation)).timeline(MAIN)
        assert named(new) == named(old) == layer_names(objects)


@in_event_loop
async def test_a_claim_that_has_removed_something_is_not_made_again(tmp_path: Path) -> None:
    """The older one's flush ends right before its layer goes; then the newer one attaches anew."""
    steps, objects = Steps(), MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as old_context,
        storage_context(tmp_path / "new", store=FaultyObjectStore(objects, steps)) as new_context,
    ):
        old = await (await attach(old_context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(old, START + 8, 1)
        manifest_name = f"{timeline_prefix(TENANT, MAIN)}/index-00000001-00000002"
        manifest = objects.objects.pop(manifest_name)
        steps.before["delete", layer.name] = partial(objects.put, manifest_name, manifest)
        for _ in range(2):
            tenant = await attach(new_context, generation=2)
            assert not steps.before
            new = tenant.timeline(MAIN)
            assert named(new) == layer_names(objects)
            assert new.last_record_lsn == START  # and WAL comes again
            await tenant.close()


@in_event_loop
async def test_a_claim_that_is_settled_late_removes_nothing_of_a_newer_one(tmp_path: Path) -> None:
    """The older one's flush ends after the slow one has looked, and a third has all of it before the slow one
    settles its claim.
    """
    steps, objects = Steps(), MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as old_context,
        storage_context(tmp_path / "slow", store=FaultyObjectStore(objects, steps)) as slow_context,
    ):
        old = await (await attach(old_context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(old, START + 8, 1)
        manifest_name = f"{timeline_prefix(TENANT, MAIN)}/index-00000001-00000002"
        manifest = objects.objects.pop(manifest_name)
        found = []

        def end_flush_and_claim() -> None:
            objects.put(manifest_name, manifest)
            found.append(claim_newest(objects, TENANT, MAIN, 3))

        steps.before["put", "index-00000002-00000002"] = end_flush_and_claim
        with pytest.raises(OvertakenError):
            await attach(slow_context, generation=2)
        assert [layer in each.manifest.layers for each in found if each] == [True]
        assert layer.name in layer_names(objects)


@pytest.mark.parametrize("generation", [2, 3])
@in_event_loop
async def test_who_serves_is_not_changed_by_an_older_one_that_writes_on(
    tmp_path: Path, generation: int
) -> None:
    """The newer one has branched from what it serves, and written nothing else, when it stops."""
    objects = MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as old_context,
        storage_context(tmp_path / "new", store=objects) as new_context,
    ):
        old = await (await attach(old_context)).create_timeline(new_main(), IMPORTED)
        layer = await flushed(old, START + 8, 1)
        tenant = await attach(new_context, generation=2)
        branch = TimelineId("33" * 16)
        await tenant.branch_timeline(branch, MAIN, lsn=Lsn(START + 8), prev_record_lsn=START)
        await tenant.close()
        await flushed(old, START + 16, 2)
        await remove(old, layer)
        tenant = await attach(new_context, generation=generation)
        assert layer.name in named(tenant.timeline(MAIN))
        assert tenant.timeline(branch).get_value(SIZE, Lsn(START + 8)) == b"\1\0\0\0"


@in_event_loop
async def test_the_next_generation_removes_what_a_crash_left(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        tenant = await attach(context, generation=3)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        layer = await flushed(timeline, START + 8, 1)
        await remove(timeline, layer)
        objects.objects[LAYERS + "not-ours"] = b""
        await tenant.close()
        tenant = await attach(context, generation=3)
        assert layer.name in layer_names(objects)  # its own: a flush under way could be about to name it
        await tenant.close()
        tenant = await attach(context, generation=4)
        assert layer_names(objects) == named(tenant.timeline(MAIN)) | {"not-ours"}


@in_event_loop
async def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion_queue, "ENTRIES_MAX", 2)
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        await check_bound(context, objects)


async def check_bound(context: StorageContext, objects: MemoryObjectStore) -> None:
    timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
    for number in range(1, 4):
        await flushed(timeline, START + 8 * number, number)
    deltas = [layer for layer in timeline.manifest.layers if layer.end_lsn > START]
    await timeline.in_thread(partial(timeline.commits.commit_layers, timeline.manifest, [], removed=deltas))
    assert (len(timeline.deletions), timeline.deletions.dropped_count) == (2, 1)
    assert await timeline.in_thread(timeline.deletions.drain) == 2
    assert len(layer_names(objects) - named(timeline)) == 1
