"""Merging layers: the values stay the same to the last one, in order, and no key is in two files."""

import random
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native.layer_merge import LayerMerge
from excimer._native.page_chains import MalformedValueError
from excimer.base.keys import KeyKind, Relation, make_key, relation_block_key
from excimer.base.lsn import Lsn
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.layer_block import pack_value, unpack_block
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.values import Value, ValueKind
from tests.kit.storage_oracle import IMPORTED
from tests.kit.storage_world import START, attach, in_event_loop, new_main, put, storage_context

BLOCK_READY = -1
FINISHED = -2
KINDS = [kind for kind in ValueKind if kind is not ValueKind.PAGE_IMAGE]
KEYS = [
    *(relation_block_key(Relation(1663, 5, 16384), 0, number) for number in range(6)),
    *(relation_block_key(Relation(1663, 5, 16385), 0, number) for number in (0, 2**32 - 1)),
    make_key(KeyKind.RELATION_MAP, 1663, 5),
]


def random_history(chance: random.Random, count: int, lsn: int = START) -> list[Value]:
    """Values with growing LSNs, a few keys, every kind: empty ones among them."""
    values: list[Value] = []
    for _ in range(count):
        lsn += chance.randrange(0, 3) if values else 1
        kind = chance.choice(KINDS)
        empty = kind in (ValueKind.TOMBSTONE, ValueKind.ZERO_PAGE)
        payload = b"" if empty else chance.randbytes(chance.choice([0, 10, 200]))
        values.append(Value(chance.choice(KEYS), lsn, kind, empty or chance.random() < 0.3, payload))
    return list({(value.key, value.lsn): value for value in values}.values())


def in_order(values: list[Value]) -> list[Value]:
    """The order of a layer: the definition of what a merge yields."""
    return sorted(values, key=lambda value: (value.key, -value.lsn))


def blocks_of(chance: random.Random, values: list[Value]) -> list[bytes]:
    """Sorted values, cut anywhere."""
    blocks = []
    at = 0
    ordered = in_order(values)
    while at < len(ordered):
        count = chance.randrange(1, 6)
        blocks.append(b"".join(map(pack_value, ordered[at : at + count])))
        at += count
    return blocks


def drive(merge: LayerMerge, sources: list[list[bytes]], ends: random.Random) -> list[list[Value]]:
    """The merge's blocks, unpacked and checked against what it says of them."""
    blocks = []
    end_at_key = False
    while (outcome := merge.step(end_at_key)) != FINISHED:
        if outcome != BLOCK_READY:
            merge.feed(outcome, sources[outcome].pop(0) if sources[outcome] else b"")
            continue
        raw, first_key, last_key, low_lsn, high_lsn, count = merge.take_block()
        values = list(unpack_block(raw))
        lsns = [value.lsn for value in values]
        assert (first_key, last_key) == (values[0].key, values[-1].key)
        assert (low_lsn, high_lsn, count) == (min(lsns), max(lsns), len(values))
        blocks.append(values)
        end_at_key = ends.random() < 0.3
    assert merge.at_key_boundary
    return blocks


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 60),
    cuts=st.integers(0, 5),
    target=st.sampled_from([1, 100, 500, 10_000]),
)
def test_native_is_what_sorting_would_be(seed: int, count: int, cuts: int, target: int) -> None:
    chance = random.Random(seed)
    values = random_history(chance, count)
    lsns = sorted({START, *(value.lsn for value in values)})
    bounds = sorted({lsns[0], lsns[-1], *(chance.choice(lsns) for _ in range(cuts))})
    ranges = list(pairwise(bounds))
    sources = [blocks_of(chance, [each for each in values if low < each.lsn <= high]) for low, high in ranges]
    merge = LayerMerge(ranges, target)
    blocks = drive(merge, sources, chance)
    assert [value for block in blocks for value in block] == in_order(values)
    assert merge.value_count == len(values)
    assert merge.key_count == len({value.key for value in values})
    assert all(sum(32 + len(each.payload) for each in block) <= max(target, 232) for block in blocks)


def test_a_block_ends_with_its_key_when_asked() -> None:
    chain = [Value(KEYS[0], START + at, ValueKind.NATIVE, False, b"x" * 10) for at in (4, 3, 2, 1)]
    rest = [Value(KEYS[1], START + 1, ValueKind.NATIVE, False, b"y")]
    merge = LayerMerge([(START, START + 9)], 90)
    merge.feed(0, b"".join(map(pack_value, chain + rest)))
    shapes = []
    for _ in range(2):
        assert merge.step(True) == BLOCK_READY
        shapes.append(
            (merge.at_key_boundary, [value.lsn - START for value in unpack_block(merge.take_block()[0])])
        )
    assert shapes == [(False, [4, 3]), (True, [2, 1])]


BAD = {
    "reaches past the end": [pack_value(Value(KEYS[0], START + 1, ValueKind.NATIVE, False, b"abc"))[:-1]],
    "not in order": [
        pack_value(Value(KEYS[1], START + 1, ValueKind.NATIVE, False, b"")),
        pack_value(Value(KEYS[0], START + 1, ValueKind.NATIVE, False, b"")),
    ],
    "outside its layer's LSNs": [pack_value(Value(KEYS[0], START, ValueKind.NATIVE, False, b""))],
}


@pytest.mark.parametrize("reason", BAD)
def test_malformed_sources_are_refused(reason: str) -> None:
    with pytest.raises(MalformedValueError, match=reason):
        drive(LayerMerge([(START, START + 9)], 50), [list(BAD[reason])], random.Random(0))


def test_a_value_in_two_sources_is_refused() -> None:
    block = pack_value(Value(KEYS[0], START + 1, ValueKind.NATIVE, False, b""))
    with pytest.raises(MalformedValueError, match="two layers"):
        drive(LayerMerge([(START, START + 9), (START, START + 9)], 50), [[block], [block]], random.Random(0))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_a_timeline_merges_its_flushes(seed: int) -> None:
    merge_flushes(seed)


@in_event_loop
async def merge_flushes(seed: int) -> None:
    chance = random.Random(seed)
    small = StorageSettings(compaction_threshold=4, compaction_target_size_bytes=1500, block_size_bytes=300)
    with tempfile.TemporaryDirectory() as directory:
        async with storage_context(Path(directory), settings=small) as context:
            timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
            expected: list[Value] = []
            for _ in range(4):
                values = random_history(chance, 40, lsn=timeline.last_record_lsn)
                put(timeline, values)
                expected += values
                await timeline.flush()
            assert await timeline.compact()
            merged = [layer for layer in timeline.manifest.layers if layer.level == 1]
            merged.sort(key=lambda layer: layer.first_key)
            check_cut(timeline, merged, expected)
            assert not await timeline.compact()


def check_cut(timeline: Timeline, merged: list[LayerDescription], expected: list[Value]) -> None:
    assert len(merged) > 1
    assert {(layer.start_lsn, layer.end_lsn) for layer in merged} == {(START, timeline.last_record_lsn)}
    assert (
        sum(layer.size_bytes for layer in timeline.manifest.layers if layer.level == 0) < 20_000
    )  # the import
    found: list[Value] = []
    for layer in merged:
        file = timeline.stack.files[layer.name]
        inside = [
            value
            for block in file.blocks(KEYS[0][:1] + bytes(17), b"\xff" * 18, 0, Lsn(2**63))
            for value in unpack_block(block)
        ]
        assert layer.value_count == len(inside)
        assert layer.key_count == len({value.key for value in inside})
        assert (inside[0].key.hex(), inside[-1].key.hex()) == (layer.first_key, layer.last_key)
        found += inside
    assert found == in_order(expected)
    assert all(one.last_key < following.first_key for one, following in pairwise(merged))
