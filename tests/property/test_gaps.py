"""Relations that grow by far blocks and are cut: every block is what PostgreSQL's would be, at every LSN.

A model of the relation beside the real ingest and the real engine: flushes, merges, rounds of images and
branches come in between. What a far block costs is said too.
"""

import random
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.errors import RefusedError
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    Fork,
    KeyKind,
    Relation,
    make_key,
    parse_key,
    relation_block_key,
    relation_size_key,
)
from excimer.base.lsn import Lsn
from excimer.pageserver.ingest import WalIngest
from excimer.pgformat.wal_record import Rmgr
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.relation_size import (
    MalformedSizeError,
    RelationSize,
    dead_up_to,
    note_ranges,
    pack_relation_size,
    truncation_notes,
    unpack_relation_size,
)
from excimer.storage.format.values import Value, ValueKind
from tests.kit.storage_world import (
    MAIN,
    START,
    attach,
    in_event_loop,
    new_main,
    put,
    size_value,
    storage_context,
)
from tests.kit.value_timeline import ValueTimeline, make_state
from tests.kit.wal_builder import WalBuilder, build_block
from tests.unit.storage.test_retention import CHILD

REL = Relation(1663, 5, 16384)
SIZE = relation_size_key(REL, Fork.MAIN)
ZEROS = bytes(BLOCK_SIZE_BYTES)
BLOCKS_MAX = 0xFFFFFFFE
SETTINGS = StorageSettings(
    compaction_threshold=2, image_creation_threshold=1, image_layer_size_bytes=8 * BLOCK_SIZE_BYTES
)
SEEDS = range(6)
STEPS = 60


def page_of(number: int) -> bytes:
    """A page whose LSN nobody stamps, because it looks new."""
    page = bytearray(struct.pack("<Q", number + 1) * (BLOCK_SIZE_BYTES // 8))
    page[14:16] = b"\0\0"
    return bytes(page)


class Moment(NamedTuple):
    lsn: Lsn
    size: int
    pages: dict[int, bytes]


class Branch:
    """A timeline, its WAL, and the model of its one relation."""

    def __init__(self, timeline: Timeline, moment: Moment, previous_lsn: int) -> None:
        self.timeline = timeline
        self.wal = WalBuilder(moment.lsn, segment_size_bytes=16 << 20, previous_lsn=previous_lsn)
        self.ingest = WalIngest(timeline, read_pages=lambda *_: b"")
        self.size, self.pages = moment.size, dict(moment.pages)
        self.moments = [moment]

    def touch(self, block: int, number: int) -> None:
        image = build_block(0, REL, block, image=page_of(number))
        self._add(Rmgr.BTREE, 0, b"x", blocks=(image,))
        self.pages[block] = page_of(number)
        self.size = max(self.size, block + 1)
        self._remember()

    def truncate(self, blocks: int) -> None:
        self._add(Rmgr.SMGR, 0x20, struct.pack("<IIIII", blocks, *REL, 1))
        self.pages = {block: page for block, page in self.pages.items() if block < blocks}
        self.size = min(self.size, blocks)
        self._remember()

    def _add(self, rmgr: int, info: int, main_data: bytes, **parts: object) -> None:
        at = len(self.wal.stream)
        self.wal.add(rmgr, info, main_data, **parts)  # type: ignore[arg-type]
        self.ingest.ingest(bytes(self.wal.stream[at:]), Lsn(self.wal.start_lsn + at))

    def _remember(self) -> None:
        self.moments.append(Moment(self.timeline.last_record_lsn, self.size, dict(self.pages)))

    async def check(self, chance: random.Random) -> None:
        """Some moments, and of each some blocks that were ever touched, their neighbours, and others."""
        touched = sorted({block for moment in self.moments for block in moment.pages})
        for moment in chance.sample(self.moments, min(8, len(self.moments))):
            assert (self.timeline.size_blocks(relation_block_key(REL, 0, 0), moment.lsn) or 0) == moment.size
            wanted = {
                block + step for block in chance.sample(touched, min(8, len(touched))) for step in (-1, 0)
            }
            wanted |= {chance.randrange(moment.size) for _ in range(3) if moment.size}
            for block in wanted:
                count = chance.randint(1, 5)
                if not 0 <= block <= moment.size - count:
                    continue
                found = await self.timeline.get_pages(relation_block_key(REL, 0, block), count, moment.lsn)
                expected = b"".join(moment.pages.get(block + at, ZEROS) for at in range(count))
                assert found == expected, (block, count, moment.lsn, self.timeline.timeline_id)
            if moment.size < BLOCKS_MAX:
                with pytest.raises(RefusedError):
                    await self.timeline.get_pages(relation_block_key(REL, 0, moment.size), 1, moment.lsn)


def next_step(branch: Branch, chance: random.Random, number: int) -> None:
    kind = chance.random()
    if kind < 0.35 or branch.size >= BLOCKS_MAX - 1:
        branch.touch(chance.randrange(branch.size + 1 if branch.size < BLOCKS_MAX else branch.size), number)
    elif kind < 0.5:
        branch.touch(chance.choice(sorted(branch.pages) or [0]), number)
    elif kind < 0.75:
        reach = chance.choice((3, 40, 300, 70_000, 1 << 24, BLOCKS_MAX))
        branch.touch(min(branch.size + chance.randrange(reach), BLOCKS_MAX - 1), number)
    else:
        touched = sorted(branch.pages) or [0]
        branch.truncate(
            chance.choice((0, chance.choice(touched), chance.choice(touched) + 1, branch.size // 2))
        )


@pytest.mark.parametrize("seed", SEEDS)
@in_event_loop
async def test_every_block_at_every_moment_is_what_the_model_says(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    imported = [(make_key(KeyKind.CHECKPOINT), make_state().pack())]
    async with storage_context(tmp_path, settings=SETTINGS) as context:
        tenant = await attach(context)
        main = Branch(await tenant.create_timeline(new_main(), imported), Moment(START, 0, {}), START - 0x40)
        branches = [main]
        for number in range(STEPS):
            branch = chance.choice(branches)
            next_step(branch, chance, number)
            if chance.random() < 0.2:
                await branch.timeline.flush()
            if chance.random() < 0.1:
                while await branch.timeline.compact():
                    pass
            if number == STEPS // 2:
                at = chance.choice(main.moments[len(main.moments) // 2 :])
                child = await tenant.branch_timeline(CHILD, MAIN, lsn=at.lsn)
                branches.append(Branch(child, at, child.prev_record_lsn))
            if number % 6 == 5:
                await branch.check(chance)
        for branch in branches:
            await branch.timeline.flush()
            while await branch.timeline.compact():
                pass
            await branch.check(chance)


@pytest.mark.parametrize("first", [3, 4, 70, 1 << 20])
@in_event_loop
async def test_what_version_1_has_cut_off_does_not_come_back(tmp_path: Path, first: int) -> None:
    """Its sizes have no LSNs, and its truncations no notes; it wrote zeros when a fork grew again."""
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(
            new_main(), [(make_key(KeyKind.CHECKPOINT), make_state().pack())]
        )
        keys = [relation_block_key(REL, 0, block) for block in range(90)]
        old = [Value(key, START + 8, ValueKind.IMAGE, True, page_of(at)) for at, key in enumerate(keys)]
        put(timeline, [*old, size_value(SIZE, START + 8, 90)])
        put(timeline, [size_value(SIZE, START + 16, 3)])
        pages = {block: page_of(block) for block in range(3)}
        branch = Branch(timeline, Moment(Lsn(START + 16), 3, pages), START + 8)
        for number, block in enumerate((first, 80, 85, first + 100)):
            branch.touch(block, 1000 + number)
        await timeline.flush()
        for moment in branch.moments:
            for block in range(min(moment.size, 200)):
                found = await timeline.get_pages(relation_block_key(REL, 0, block), 1, moment.lsn)
                assert found == moment.pages.get(block, ZEROS), (block, moment.lsn)


def test_a_far_block_costs_the_same_as_a_near_one() -> None:
    """56 bytes of WAL made 40 MiB of values, and 120 bytes 160 MiB."""
    costs = []
    for block in (0, 1, 40, 1 << 20, BLOCKS_MAX):
        timeline = ValueTimeline(START, make_state())
        wal = WalBuilder(START)
        ingest = WalIngest(timeline, read_pages=lambda *_: b"")
        for _ in range(2):
            wal.add(Rmgr.BTREE, 0, b"x", blocks=(build_block(0, REL, block, data=b"y"),))
            wal.add(Rmgr.SMGR, 0x20, struct.pack("<IIIII", 0, *REL, 1))
        ingest.ingest(bytes(wal.stream), START)
        costs.append(sum(40 + len(value.payload) for value in timeline.values))
    assert len(set(costs)) == 1
    assert costs[0] < 20 * len(wal.stream)


# -- notes of truncations, against their definition

BLOCKS = st.one_of(
    st.integers(0, 0xFFFFFFFF), st.integers(0, 2000), st.sampled_from([255, 256, 65536, 1 << 24])
)


@given(st.lists(BLOCKS, max_size=12), BLOCKS, st.integers(1, 40))
def test_notes_say_the_greatest_lsn_of_any_truncation_to_no_more_blocks(
    truncations: list[int], first: int, count: int
) -> None:
    last = min(first + count - 1, 0xFFFFFFFF)
    stored: dict[bytes, bytes] = {}
    for lsn, blocks in enumerate(truncations, 100):
        stored.update(truncation_notes(SIZE, blocks, lsn))
    ranges = note_ranges(SIZE, first, last)
    assert len(ranges) <= 4
    notes = [(key, stored[key]) for start, end in ranges for key in sorted(stored) if start <= key < end]
    assert len(notes) <= 4 * 256 + count
    assert dead_up_to(notes, first, last) == [
        max((lsn for lsn, blocks in enumerate(truncations, 100) if blocks <= block), default=0)
        for block in range(first, last + 1)
    ]
    assert all(parse_key(key).kind == KeyKind.RELATION_TRUNCATION for key in stored)


@given(st.builds(RelationSize, *(st.integers(0, 2**bits - 1) for bits in (32, 64, 64))))
def test_sizes_round_trip_and_those_of_version_1_are_read(size: RelationSize) -> None:
    assert unpack_relation_size(pack_relation_size(size)) == size
    assert unpack_relation_size(size.blocks.to_bytes(4, "little")) == RelationSize(size.blocks)


@pytest.mark.parametrize("length", [0, 3, 5, 19, 21])
def test_a_size_of_another_length_is_corruption(length: int) -> None:
    with pytest.raises(MalformedSizeError):
        unpack_relation_size(bytes(length))
