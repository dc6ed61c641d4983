"""Reads on the event loop find what reads in worker threads find; the parts they are made of match twins."""

import asyncio
import random
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native.block_cache import BlockCache
from excimer._native.block_index import BlockIndex
from excimer._native.memory_layer import MemoryLayer
from excimer.base.errors import ExcimerError
from excimer.base.ids import TimelineId
from excimer.base.keys import KEY_SIZE_BYTES, Fork, relation_size_key
from excimer.base.keys import relation_block_key as block_key
from excimer.base.lsn import Lsn
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.layer_stack import LayerStack
from excimer.storage.engine.page_reads import TRIED_VALUES_MAX, PageRead, try_collect_chains
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.walk_memory import WalkMemory
from excimer.storage.format.layer_file import _INDEX_ENTRY, BlockPlace, LayerIndex, LayerKind
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.values import Value, ValueKind, pack_batch
from excimer.storage.plan.layer_map import LayerMap
from excimer.storage.plan.read_path import plan_read
from tests.kit.storage_oracle import FORKS, IMPORTED, RELATIONS, TimelineOracle
from tests.kit.storage_world import (
    MAIN,
    START,
    attach,
    expected_page,
    new_main,
    size_value,
    storage_context,
)
from tests.kit.storage_world import put as put_values

SMALL = StorageSettings(block_size_bytes=700, image_layer_size_bytes=30_000)
SEEDS = 6
ROUNDS = 4
READS = 60

# The parts


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_the_packed_index_finds_what_a_list_of_entries_finds(data: st.DataObject) -> None:
    keys = st.integers(0, 40).map(lambda number: number.to_bytes(KEY_SIZE_BYTES, "big"))
    lsns = st.integers(0, 20)
    bounds = sorted(data.draw(st.lists(keys, min_size=0, max_size=24)))
    places = []
    for first, last in zip(bounds[::2], bounds[1::2], strict=False):
        low, high = sorted((data.draw(lsns), data.draw(lsns)))
        places.append(BlockPlace(first, last, 1, 72, low, high, 10, 20))
    raw = b"".join(_INDEX_ENTRY.pack(*place) for place in places)
    first_key, last_key = sorted((data.draw(keys), data.draw(keys)))
    low_lsn, high_lsn = sorted((data.draw(lsns), data.draw(lsns)))
    expected = []
    for number in range(bisect_left([place.last_key for place in places], first_key), len(places)):
        place = places[number]
        if place.first_key > last_key:
            break
        if place.lowest_lsn <= high_lsn and place.highest_lsn > low_lsn:
            expected.append(number)
    assert BlockIndex(raw).find_blocks(first_key, last_key, low_lsn, high_lsn) == expected
    assert list(LayerIndex(raw).places) == places
    assert LayerIndex(raw).places[1:3] == places[1:3]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 400)), max_size=300))
@settings(deadline=None, max_examples=100)
def test_the_cache_forgets_what_was_used_longest_ago(steps: list[tuple[bool, int, int]]) -> None:
    limit = 20_000
    cache = BlockCache(limit)
    model: OrderedDict[tuple[int, int], bytes] = OrderedDict()
    for is_read, layer, number in steps:
        name = layer, number
        if is_read:
            found = model.get(name)
            if found is not None:
                model.move_to_end(name)
            assert cache.try_get(layer, number) == found
        else:
            # A block's content follows from its name; one in eight is larger than most of the cache.
            block = bytes([number % 256]) * (1 + number % 8 * 100 + (number % 8 == 7) * 15_000)
            cache.add(layer, number, block)
            model.setdefault(name, block)
            model.move_to_end(name)
            while sum(map(len, model.values())) > limit:
                model.popitem(last=False)
        assert (len(cache), cache.size_bytes) == (len(model), sum(map(len, model.values())))
    for (layer, number), block in model.items():
        assert cache.try_get(layer, number) == block
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


def some_key(chance: random.Random) -> bytes:
    return chance.randrange(14).to_bytes(KEY_SIZE_BYTES, "big")


def some_layers(chance: random.Random) -> list[LayerDescription]:
    layers: list[LayerDescription] = []
    for lsn in range(10, 10 * chance.randrange(1, 8), 10):
        bounds = sorted({some_key(chance) for _ in range(6)})
        kind = chance.choice(list(LayerKind))
        is_image = kind is LayerKind.IMAGE
        covers = chance.choice([None, 0, lsn - 10]) if is_image else None
        layers += [
            LayerDescription(
                kind=kind,
                start_lsn=lsn if is_image else lsn - 10,
                end_lsn=lsn,
                first_key=first.hex(),
                last_key=last.hex(),
                generation=1,
                fingerprint=len(layers),
                size_bytes=1,
                index_offset=0,
                value_count=1,
                covers_after_lsn=covers,
            )
            for first, last in zip(bounds[::2], bounds[1::2], strict=False)
        ]
    return layers


def some_stack(chance: random.Random) -> LayerStack:
    layers = some_layers(chance)
    files = {layer.name: cast(DiskLayer, object()) for layer in layers}
    disk = LayerMap.from_descriptions(layers)
    return LayerStack(open=MemoryLayer(0), frozen=(), disk=disk, files=files)


def test_a_remembered_plan_is_the_plan() -> None:
    """Over a map, a map after it and the first again: nothing is remembered of another."""
    for seed in range(100):
        chance = random.Random(seed)
        memory = WalkMemory()
        stacks = [some_stack(chance), some_stack(chance)]
        for stack in [stacks[0], stacks[1], stacks[0]]:
            for _ in range(20):
                first_key, last_key = sorted((some_key(chance), some_key(chance)))
                lsn = chance.randrange(80)
                expected = plan_read(stack.disk, first_key, last_key, 0, lsn)
                plan = memory.plan(stack, first_key, last_key, lsn)
                assert plan.continues_in_ancestor == expected.continues_in_ancestor
                assert plan.steps == [
                    (stack.files[visit.layer.description.name], visit.low_lsn, visit.high_lsn)
                    for visit in expected.visits
                ]


# The whole


class Tally:
    """How many reads were answered at once: a test in which none was would prove nothing."""

    def __init__(self) -> None:
        self.at_once = 0
        self.by_redo = 0
        self.in_all = 0


async def outcome(reading: Awaitable[bytes]) -> bytes | str:
    try:
        return await reading
    except ExcimerError as error:
        return f"{type(error).__name__}: {error}"


async def fast(timeline: Timeline, key: bytes, count: int, lsn: Lsn, tally: Tally) -> bytes:
    read = PageRead(timeline, key, count, lsn)
    pages = read.try_pages()
    tally.in_all += 1
    if pages is not None:
        tally.at_once += 1
        return pages
    tally.by_redo += read._redo is not None
    return await read.run()


async def compare(timeline: Timeline, oracle: TimelineOracle, chance: random.Random, tally: Tally) -> None:
    relation, fork = chance.choice(RELATIONS), chance.choice(FORKS)
    first, count = chance.randrange(8), chance.randrange(1, 6)
    lsns = [oracle.last_lsn, *oracle.ends[-40:]]
    lsn = Lsn(chance.choice(lsns))
    key = block_key(relation, fork, first)
    if chance.random() < 0.5:  # the slow one leaves behind what the fast one needs
        slow = await outcome(PageRead(timeline, key, count, lsn).run())
        assert await outcome(fast(timeline, key, count, lsn, tally)) == slow
    else:
        found = await outcome(fast(timeline, key, count, lsn, tally))
        slow = await outcome(PageRead(timeline, key, count, lsn).run())
        assert await outcome(fast(timeline, key, count, lsn, tally)) == slow == found
    size = oracle.size(relation, fork, lsn)
    if size is not None and first + count <= size:
        assert slow == b"".join(
            oracle.page(block_key(relation, fork, first + at), lsn) for at in range(count)
        )


async def put(timeline: Timeline, oracle: TimelineOracle, chance: random.Random) -> None:
    before = oracle.last_lsn
    oracle.next_values(chance, chance.randrange(1, 40))
    for values, end_lsn in oracle.batches_after(before, 10):
        timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))


async def live(context: StorageContext, seed: int, tally: Tally) -> None:
    """Two timelines, one a branch of the other, written, flushed, compacted and read in between."""
    chance = random.Random(seed)
    tenant = await attach(context)
    main = await tenant.create_timeline(new_main(), IMPORTED)
    oracle = TimelineOracle.imported()
    await put(main, oracle, chance)
    branch_id = TimelineId("44" * 16)
    branch = await tenant.branch_timeline(
        branch_id, MAIN, lsn=Lsn(oracle.last_lsn), prev_record_lsn=Lsn(oracle.last_lsn - 8)
    )
    pairs = [(main, oracle), (branch, TimelineOracle(ancestor=oracle, ancestor_lsn=oracle.last_lsn))]
    for _ in range(ROUNDS):
        for timeline, its_oracle in pairs:
            await put(timeline, its_oracle, chance)
            if chance.random() < 0.7:
                await timeline.flush()
            if chance.random() < 0.5:
                await timeline.compact()
        for _ in range(READS):
            await compare(*chance.choice(pairs), chance, tally)
        if chance.random() < 0.2:
            context.cache.clear()
    await tenant.close()


def test_fast_reads_find_what_slow_ones_find(tmp_path: Path) -> None:
    tally = Tally()

    async def run(seed: int) -> None:
        async with storage_context(tmp_path / str(seed), settings=SMALL) as context:
            await live(context, seed, tally)

    for seed in range(SEEDS):
        asyncio.run(run(seed))
    assert tally.at_once > tally.in_all // 10
    assert tally.by_redo > tally.in_all // 4


@pytest.mark.parametrize("records", [20, TRIED_VALUES_MAX + 1])
@pytest.mark.parametrize("flushed", [False, True])
def test_a_long_chain_is_left_to_a_worker_thread(tmp_path: Path, records: int, flushed: bool) -> None:
    """So that the event loop never applies thousands of records between two requests."""
    key = block_key(RELATIONS[0], Fork.VM, 0)
    lsns = range(START + 8, START + 8 + 8 * records, 8)
    chain = [Value(key, lsn, ValueKind.NATIVE, False, b"%d" % lsn) for lsn in lsns]

    async def run() -> None:
        async with storage_context(tmp_path) as context:
            tenant = await attach(context)
            timeline = await tenant.create_timeline(new_main(), IMPORTED)
            put_values(
                timeline, [size_value(relation_size_key(RELATIONS[0], Fork.VM), chain[0].lsn, 1), *chain]
            )
            if flushed:
                await timeline.flush()
            newest = timeline.last_record_lsn
            assert await timeline.get_pages(key, 1, newest) == expected_page(chain)
            tried = PageRead(timeline, key, 1, newest)
            assert tried.try_pages() == (expected_page(chain) if records == 20 else None)
            assert await PageRead(timeline, key, 1, newest).run() == expected_page(chain)
            await tenant.close()

    asyncio.run(run())


def test_what_is_not_cached_is_not_guessed(tmp_path: Path) -> None:
    """Without the blocks the try gives up; with them it gives the page without any other thread."""

    async def run() -> None:
        async with storage_context(tmp_path, settings=SMALL) as context:
            tenant = await attach(context)
            timeline = await tenant.create_timeline(new_main(), IMPORTED)
            key, lsn = block_key(RELATIONS[0], Fork.MAIN, 3), timeline.last_record_lsn
            first = timeline.start_read(key, 1, lsn)
            assert not isinstance(first, bytes)
            pages = await first()
            assert timeline.start_read(key, 1, lsn) == pages == IMPORTED[4][1]
            context.cache.clear()
            chains = PageRead(timeline, key, 1, lsn)._chains
            assert not try_collect_chains(timeline, key, chains, lsn)
            again: bytes | Callable[[], Awaitable[bytes]] = timeline.start_read(key, 1, lsn)
            assert not isinstance(again, bytes)
            assert await again() == pages
            await tenant.close()

    asyncio.run(run())
