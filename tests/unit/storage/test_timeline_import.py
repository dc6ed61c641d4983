"""Timelines made in pieces: images in any order, WAL behind them, and all or nothing of it."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES, Relation, relation_block_key, relation_size_key
from excimer.base.lsn import Lsn
from excimer.io.object_store import MemoryObjectStore
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.errors import LsnTooOldError, TimelineExistsError
from excimer.storage.engine.image_sorter import ImageSorter
from excimer.storage.engine.timeline_import import TimelineImport
from tests.kit.storage_world import (
    MAIN,
    START,
    attach,
    image_of,
    in_event_loop,
    new_main,
    put,
    record_value,
    storage_context,
)

LAYER_SIZE_BYTES = 12 * BLOCK_SIZE_BYTES
SMALL = StorageSettings(image_layer_size_bytes=LAYER_SIZE_BYTES)
SIZES = {16384: 3, 16385: 70, 16386: 1, 16387: 0, 16388: 12, 16389: 25, 16390: 5, 16391: 9, 16392: 2}


def table(rel: int) -> Relation:
    return Relation(1663, 5, rel)


def page(rel: int, block: int) -> bytes:
    return image_of(f"{rel} {block}".encode())


def images(order: list[int]) -> list[tuple[bytes, bytes]]:
    blocks = [
        (relation_block_key(table(rel), 0, block), page(rel, block))
        for rel in order
        for block in range(SIZES[rel])
    ]
    sizes = [(relation_size_key(table(rel), 0), size.to_bytes(4, "little")) for rel, size in SIZES.items()]
    return blocks + sizes


async def add_all(made: TimelineImport, order: list[int]) -> None:
    for key, data in images(order):
        made.add_image(key, data)
    await made.finish_images()


@in_event_loop
async def test_images_in_any_order_become_layers_that_do_not_overlap(tmp_path: Path) -> None:
    for seed in range(5):
        store = MemoryObjectStore()
        async with storage_context(tmp_path / str(seed), store=store, settings=SMALL) as context:
            tenant = await attach(context)
            made = await tenant.begin_import(new_main())
            order = random.Random(seed).sample(list(SIZES), len(SIZES))
            await add_all(made, order)
            timeline = await tenant.finish_import(made, START)
            for rel, size in SIZES.items():
                for block in range(size):
                    found = await timeline.get_pages(relation_block_key(table(rel), 0, block), 1, START)
                    assert found == page(rel, block)
            layers = sorted(timeline.manifest.layers, key=lambda layer: layer.first_key)
            for layer, following in itertools.pairwise(layers):
                assert layer.last_key < following.first_key
            assert {layer.covers_after_lsn for layer in layers} == {0}
            assert len(layers) > 6
            assert not list(timeline.home.local_dir.glob("import-run-*"))


@in_event_loop
async def test_memory_stays_bounded(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=SMALL) as context:
        made = await (await attach(context)).begin_import(new_main())
        sorter = ImageSorter(made.timeline.home, START, 1, keep_local=False)
        held = 0
        for key, data in images(sorted(SIZES)):
            sorter.add(key, data)
            held = max(held, len(sorter._sequence) + len(sorter._small))
        assert held <= 2 * LAYER_SIZE_BYTES // BLOCK_SIZE_BYTES
        sorter.finish()
        await made.timeline.close()


@in_event_loop
async def test_a_key_with_two_images_is_refused(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=SMALL) as context:
        tenant = await attach(context)
        made = await tenant.begin_import(new_main())
        for _ in range(2):
            made.add_image(relation_block_key(table(16384), 0, 0), page(16384, 0))
        with pytest.raises(ValueError, match="16384 main 0 has two images"):
            await made.finish_images()
        await tenant.abort_import(made)


@in_event_loop
async def test_wal_follows_the_images_and_nothing_below_the_readable_lsn_is_shown(tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, flush_size_bytes=4096)
    async with storage_context(tmp_path, settings=settings) as context:
        tenant = await attach(context)
        made = await tenant.begin_import(new_main())
        await add_all(made, sorted(SIZES))
        key = relation_block_key(table(16384), 0, 1)
        for lsn in range(0x1010, 0x1100, 0x10):
            put(made.timeline, [record_value(key, lsn, b"change" * 50)])
            await made.make_room()
        assert len(made.timeline.manifest.layers) > 10
        assert MAIN not in tenant.timelines
        timeline = await tenant.finish_import(made, Lsn(0x1080))
        newest = await timeline.get_pages(key, 1, timeline.last_record_lsn)
        with pytest.raises(LsnTooOldError):
            await timeline.get_pages(key, 1, Lsn(0x1070))
        assert timeline.retention.cutoff_lsn == 0x1080, "nothing is held below either"
        again = (await attach(context, generation=2)).timeline(MAIN)
        assert (again.oldest_lsn, again.last_record_lsn) == (0x1080, 0x10F0)
        assert await again.get_pages(key, 1, again.last_record_lsn) == newest
        await timeline.close()


@in_event_loop
async def test_a_newer_generation_ends_an_import_for_good(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with storage_context(tmp_path, store=store, settings=SMALL) as context:
        older = await attach(context, generation=1)
        made = await older.begin_import(new_main())
        await add_all(made, sorted(SIZES))
        newer = await attach(context, generation=2)
        await older.finish_import(made, START)
        assert MAIN not in newer.timelines
        assert MAIN not in (await attach(context, generation=2)).timelines
        assert MAIN not in (await attach(context, generation=3)).timelines
        await made.timeline.close()


@in_event_loop
async def test_given_up_or_crashed_nothing_of_it_is_left(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with storage_context(tmp_path, store=store, settings=SMALL) as context:
        tenant = await attach(context)
        for crashes in (False, True):
            before = set(store.objects)
            made = await tenant.begin_import(new_main())
            await add_all(made, sorted(SIZES))
            put(made.timeline, [record_value(relation_block_key(table(16384), 0, 1), 0x1010, b"x")])
            await made.timeline.flush()
            assert len(set(store.objects) - before) > 5
            if crashes:
                await made.timeline.close()
                tenant = await attach(context)
            else:
                await tenant.abort_import(made)
            assert set(store.objects) == before
            assert not list(made.timeline.home.local_dir.glob("*"))
            assert MAIN not in tenant.timelines
        made = await tenant.begin_import(new_main())
        await add_all(made, sorted(SIZES))
        await tenant.finish_import(made, START)
        with pytest.raises(TimelineExistsError):
            await tenant.begin_import(new_main())
