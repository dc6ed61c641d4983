"""Layers of our own generation that nobody names go, and only when nobody can come to name them."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from excimer.base.lsn import Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine import deletion_queue, leftovers
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.manifest_store import OvertakenError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.manifest import pack_manifest
from tests.faults.test_layer_deletion import LAYERS, Steps, flushed, layer_names, named, remove
from tests.kit.storage_oracle import IMPORTED
from tests.kit.storage_world import MAIN, START, attach, in_event_loop, new_main, storage_context
from tests.unit.storage.test_retention import CHILD
from tests.unit.storage.test_timeline import SIZE

MERGING = StorageSettings(compaction_threshold=2, image_creation_threshold=100)


async def attached_again(tenant: TenantStorage, context: StorageContext) -> Timeline:
    """By a process with the same generation."""
    await tenant.close()
    return (await attach(context, tenant.generation)).timeline(MAIN)


async def with_a_leftover(context: StorageContext) -> tuple[TenantStorage, str]:
    """A process ends between a manifest without a layer and its deletion."""
    tenant = await attach(context)
    timeline = await tenant.create_timeline(new_main(), IMPORTED)
    layer = await flushed(timeline, START + 8, 1)
    await remove(timeline, layer)
    return tenant, layer.name


@in_event_loop
async def test_what_a_crash_left_goes_after_a_manifest_of_our_own(tmp_path: Path) -> None:
    steps, objects = Steps(), MemoryObjectStore()
    async with storage_context(tmp_path, store=FaultyObjectStore(objects, steps)) as context:
        tenant, left = await with_a_leftover(context)
        objects.objects[LAYERS + "not-ours"] = b""
        newer = left[: left.rindex("-") - 8] + "00000002" + left[-9:]
        objects.objects[LAYERS + newer] = b""
        timeline = await attached_again(tenant, context)
        assert timeline.leftovers.is_suspected
        steps.done.clear()
        assert await timeline.leftovers.sweep()
        assert layer_names(objects) == named(timeline) | {"not-ours", newer}
        first, *rest = [step for step in steps.done if step[0] != "delete" or step[1] == left]
        assert first == ("put", "index-00000001-00000004")
        assert rest == [("list", MAIN), ("size", "index-00000002-00000001"), ("delete", left)]
        assert context.counters.leftover_layers == 1


@in_event_loop
async def test_nothing_is_listed_while_nothing_is_suspected(tmp_path: Path) -> None:
    steps, objects = Steps(), MemoryObjectStore()
    async with storage_context(tmp_path, store=FaultyObjectStore(objects, steps)) as context:
        tenant = await attach(context)
        await flushed(await tenant.create_timeline(new_main(), IMPORTED), START + 8, 1)
        timeline = await attached_again(tenant, context)
        steps.done.clear()
        assert await timeline.leftovers.sweep()
        running = asyncio.create_task(timeline.run())
        await flushed(timeline, START + 16, 2)
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert "list" not in {operation for operation, _ in steps.done}


@pytest.mark.parametrize("wins", [False, True])
@in_event_loop
async def test_a_manifest_that_the_process_before_sent_is_not_robbed(tmp_path: Path, wins: bool) -> None:
    """It names the leftover, and arrives after we have attached: before our first manifest or after it."""
    steps, objects = Steps(), MemoryObjectStore()
    async with storage_context(tmp_path, store=FaultyObjectStore(objects, steps)) as context:
        tenant = await attach(context)
        former = await tenant.create_timeline(new_main(), IMPORTED)
        before = former.manifest
        layer = await flushed(former, START + 8, 1)
        sent = pack_manifest(former.manifest)
        del objects.objects[f"{LAYERS.removesuffix('layers/')}index-00000001-00000002"]
        timeline = await attached_again(tenant, context)
        assert timeline.manifest == before
        arrive = partial(objects.put, f"{LAYERS.removesuffix('layers/')}index-00000001-00000002", sent)
        if wins:
            steps.before["put", "index-00000001-00000002"] = arrive
            with pytest.raises(OvertakenError):
                await timeline.leftovers.sweep()
            assert layer.name in layer_names(objects)
        else:
            assert await timeline.leftovers.sweep()
            assert layer_names(objects) == named(timeline)
            with pytest.raises(Exception, match="exists"):
                arrive()


@in_event_loop
async def test_a_manifest_whose_answer_was_lost_is_settled_first(tmp_path: Path) -> None:
    """It may be there and name what the last confirmed one does not."""
    steps, objects = Steps(), MemoryObjectStore()
    store = FaultyObjectStore(objects, steps, lose_answer=True)
    async with storage_context(tmp_path, store=store) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        steps.failing.add("put")
        with pytest.raises(ObjectStoreError):
            await flushed(timeline, START + 8, 1)
        timeline.leftovers.suspect()
        with pytest.raises(ObjectStoreError):  # the newest is not known yet
            await timeline.leftovers.sweep()
        assert layer_names(objects) > named(timeline)
        steps.failing.clear()
        assert await timeline.leftovers.sweep()
        assert layer_names(objects) == named(timeline)
        await timeline.flush()
        assert layer_names(objects) == named(timeline)
        timeline = await attached_again(tenant, context)
        assert timeline.get_value(SIZE, Lsn(START + 8)) == b"\1\0\0\0"


@in_event_loop
async def test_a_merge_that_fails_is_cleared_up_in_the_background(tmp_path: Path) -> None:
    steps, objects = Steps(), MemoryObjectStore()
    store = FaultyObjectStore(objects, steps)
    async with storage_context(tmp_path, store=store, settings=MERGING) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        for number in range(1, 4):
            await flushed(timeline, START + 8 * number, number)
        before = layer_names(objects)
        steps.failing.add("put")  # its layers arrive, the manifest does not
        with pytest.raises(ObjectStoreError):
            await timeline.compact()
        left = layer_names(objects) - before
        assert left
        assert timeline.leftovers.is_suspected
        steps.failing.clear()
        running = asyncio.create_task(timeline.leftovers.run_when_suspected())
        async with asyncio.timeout(10):
            await running
        assert layer_names(objects) == named(timeline) == before
        assert not {*left} & {path.name for path in timeline.home.local_dir.iterdir()}
        while await timeline.compact():
            pass
        assert not timeline.leftovers.is_suspected
        assert timeline.get_value(SIZE, Lsn(START + 24)) == b"\3\0\0\0"


async def hindered(context: StorageContext, hinder: Callable[[Timeline], Callable[[], object]]) -> None:
    """A sweep that cannot be now is one later."""
    tenant, _ = await with_a_leftover(context)
    timeline = await attached_again(tenant, context)
    before = layer_names(context.store)  # type: ignore[arg-type]
    let_go = hinder(timeline)
    assert not await timeline.leftovers.sweep()
    assert layer_names(context.store) == before  # type: ignore[arg-type]
    assert timeline.leftovers.is_suspected
    let_go()
    assert await timeline.leftovers.sweep()
    assert layer_names(context.store) == named(timeline) < before  # type: ignore[arg-type]


@in_event_loop
async def test_who_uploads_without_the_locks_is_waited_for(tmp_path: Path) -> None:
    def upload(timeline: Timeline) -> Callable[[], object]:
        uploading = timeline.leftovers.left_alone()
        uploading.__enter__()
        return lambda: uploading.__exit__(None, None, None)

    async with storage_context(tmp_path, store=MemoryObjectStore()) as context:
        await hindered(context, upload)


@in_event_loop
async def test_readers_of_an_older_map_are_waited_for(tmp_path: Path) -> None:
    def read(timeline: Timeline) -> Callable[[], object]:
        readers = [timeline.stack]
        timeline.commits.commit_layers(timeline.manifest, [])
        return readers.clear

    async with storage_context(tmp_path, store=MemoryObjectStore()) as context:
        await hindered(context, read)


@in_event_loop
async def test_an_import_under_way_is_waited_for(tmp_path: Path) -> None:
    """Its layers lie in object storage before a manifest names them; they are not leftovers."""
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        tenant = await attach(context)
        made = await tenant.begin_import(new_main())
        timeline = made.timeline
        for key, data in IMPORTED:
            made.add_image(key, data)
        await made.finish_images()
        layer = await flushed(timeline, START + 8, 1)
        left = layer.name.replace(f"{START + 8:016x}", f"{START + 16:016x}")
        objects.put(LAYERS + left, b"of a piece that failed")
        timeline.leftovers.suspect()
        assert not await timeline.leftovers.sweep()
        assert timeline.leftovers.is_suspected
        assert layer_names(objects) == named(timeline) | {left}
        timeline = await tenant.finish_import(made, Lsn(START + 8))
        timeline.leftovers.suspect()
        assert await timeline.leftovers.sweep()
        assert layer_names(objects) == named(timeline)
        assert timeline.get_value(SIZE, Lsn(START + 8)) == b"\1\0\0\0"


@in_event_loop
async def test_an_overtaken_generation_removes_nothing(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with (
        storage_context(tmp_path / "old", store=objects) as old_context,
        storage_context(tmp_path / "new", store=objects) as new_context,
    ):
        tenant, _ = await with_a_leftover(old_context)
        old = await attached_again(tenant, old_context)
        new = (await attach(new_context, generation=2)).timeline(MAIN)
        await flushed(new, START + 16, 2)
        before = layer_names(objects)
        old.leftovers.suspect()
        with pytest.raises(OvertakenError):
            await old.leftovers.sweep()
        assert layer_names(objects) == before


@in_event_loop
async def test_a_full_deletion_queue_and_many_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion_queue, "ENTRIES_MAX", 2)
    monkeypatch.setattr(leftovers, "BATCH_MAX", 1)
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        layers = [await flushed(timeline, START + 8 * number, number) for number in range(1, 6)]
        await timeline.in_thread(
            partial(timeline.commits.commit_layers, timeline.manifest, [], removed=layers)
        )
        await asyncio.sleep(0)
        assert timeline.leftovers.is_suspected
        assert await timeline.leftovers.sweep()
        assert len(layer_names(objects) - named(timeline)) == 2  # what the queue is going to delete
        assert await timeline.in_thread(timeline.deletions.drain) == 2
        assert layer_names(objects) == named(timeline)
        assert context.counters.leftover_layers == 3


@in_event_loop
async def test_copies_of_a_detachment_under_way_are_left_alone(tmp_path: Path) -> None:
    steps, objects, swept = Steps(), MemoryObjectStore(), []
    async with storage_context(tmp_path, store=FaultyObjectStore(objects, steps)) as context:
        tenant = await attach(context)
        main = await tenant.create_timeline(new_main(), IMPORTED)
        layer = await flushed(main, START + 8, 1)
        child = await tenant.branch_timeline(CHILD, MAIN)
        loop = asyncio.get_running_loop()

        def sweep() -> None:
            loop.call_soon_threadsafe(child.leftovers.suspect)
            sweeping = asyncio.run_coroutine_threadsafe(child.leftovers.sweep(), loop)
            swept.append(sweeping.result(10))

        steps.before["copy", layer.name] = sweep
        assert await tenant.detach_ancestor(CHILD) == []
        assert swept == [False]
        assert await child.leftovers.sweep()
        assert child.get_value(SIZE, Lsn(START + 8)) == b"\1\0\0\0"
