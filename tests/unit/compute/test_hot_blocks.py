"""Lists of hot blocks: what is in them, that no bytes do harm, and how they are fetched beside PostgreSQL."""

import asyncio
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.compute.arena import Arena, ArenaFile, ArenaSettings, build_arena
from excimer.compute.hot_collection import collect_hot_blocks
from excimer.compute.hot_prefetch import BLOCKS_MAX, RUNS_MAX, SHARED_BLOCKS_MAX, Outcome, prefetch_hot_blocks
from excimer.pgformat.hot_blocks import (
    HOT_BLOCKS_MAX,
    HotBlocks,
    HotFile,
    pack_hot_blocks,
    unpack_hot_blocks,
)
from excimer.service.tasks import SystemClock

TENANT, TIMELINE = TenantId("1" * 32), TimelineId("2" * 32)
TABLE, GROWN = "base/5/16384", "base/5/16400"


def hot(*levels: list[HotFile]) -> HotBlocks:
    return HotBlocks(timeline_id=TIMELINE, levels=list(levels))


def test_a_list_is_as_it_was() -> None:
    made = hot([HotFile("global/1262", [0, 1])], [], [HotFile("base/5/16384_vm.1", [3, 4, 9, 1])])
    assert unpack_hot_blocks(pack_hot_blocks(made)) == made
    assert made.blocks == 6


def test_an_empty_list_is_none() -> None:
    assert pack_hot_blocks(hot([], [])) == b""
    assert unpack_hot_blocks(b"") is None


@pytest.mark.parametrize(
    "file",
    [
        HotFile("../5/16384", [0, 1]),
        HotFile("base/5/../1", [0, 1]),
        HotFile("base/5/16384 0 1\nbase", [0, 1]),
        HotFile("pg_xact/0000", [0, 1]),
        HotFile(TABLE, [0, 0]),
        HotFile(TABLE, [0]),
        HotFile(TABLE, [-1, 5]),
        HotFile(TABLE, [5, 5, 9, 1]),
        HotFile(TABLE, [131072, 1]),
    ],
)
def test_what_is_no_list_is_not_used(file: HotFile) -> None:
    assert unpack_hot_blocks(pack_hot_blocks(hot([HotFile(TABLE, [0, 1])], [file]))) is None


def test_more_than_a_list_may_have_is_not_used() -> None:
    files = [HotFile(f"{TABLE}.{number}", [0, 131072]) for number in range(1, HOT_BLOCKS_MAX // 131072 + 2)]
    assert unpack_hot_blocks(pack_hot_blocks(hot(files[:-1]))) is not None
    assert unpack_hot_blocks(pack_hot_blocks(hot(files))) is None


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
def test_no_bytes_do_harm(data: bytes, at: int, value: int) -> None:
    assert unpack_hot_blocks(data) is None
    good = pack_hot_blocks(hot([HotFile(TABLE, [0, 7])]))
    assert unpack_hot_blocks(good[: at % len(good)]) is None
    torn = bytearray(good)
    torn[at % len(good)] = value
    assert unpack_hot_blocks(bytes(torn)) in (None, unpack_hot_blocks(good))


# What is hot


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    data_dir = tmp_path / "data"
    (data_dir / "base" / "5").mkdir(parents=True)
    (data_dir / "global").mkdir()
    files = [ArenaFile(TABLE, 40), ArenaFile("base/5/16390", 8)]
    settings = ArenaSettings("127.0.0.1:1", TENANT, TIMELINE, "")
    return build_arena(tmp_path / "arena", files=files, settings=settings, data_dir=data_dir)


def test_levels(arena: Arena, tmp_path: Path) -> None:
    """Shared buffers come first, then what is in the local files; what is not here is not hot."""
    page = bytes(BLOCK_SIZE_BYTES)
    arena.place_pages([(TABLE, 0, page * 10), (TABLE, 20, page * 3)])
    (arena.data_dir / GROWN).write_bytes(page * 2)
    (arena.data_dir / "base/5/16384_fsm").write_bytes(page)
    (arena.data_dir / "base/5/pg_filenode.map").write_bytes(page)
    buffers = tmp_path / "buffers"
    entries = [
        (1663, 5, 16384, 0, 4, 5),
        (1663, 5, 16384, 0, 5, 3),
        (1663, 5, 16384, 0, 30, 1),
        (1663, 5, 16384, 1, 0, 5),  # a free space map
        (1663, 5, 16390, 0, 0, 5),  # nobody has made the file
        (1663, 5, 16400, 0, 77, 5),  # past its end
        (4711, 5, 16400, 0, 0, 5),  # another tablespace
    ]
    buffers.write_bytes(b"".join(struct.pack("<6I", *entry) for entry in entries) + b"torn")
    found = collect_hot_blocks(arena.data_dir, arena, buffers, TIMELINE)
    assert found.levels == [
        [HotFile(TABLE, [4, 2])],
        [HotFile(TABLE, [30, 1])],
        [HotFile(GROWN, [0, 2]), HotFile(TABLE, [0, 4, 6, 4, 20, 3])],
    ]
    without = collect_hot_blocks(arena.data_dir, arena, tmp_path / "none", TIMELINE)
    assert without.levels == [[], [], [HotFile(GROWN, [0, 2]), HotFile(TABLE, [0, 10, 20, 3])]]
    assert unpack_hot_blocks(pack_hot_blocks(found)) == found


# Fetching them


class Endpoint:
    """A cache that grows by what is fetched, and a PostgreSQL that misses when it is told to."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.misses = 0
        self.used_bytes = 0
        self.free = True
        self.answers: Callable[[int], int] = lambda blocks: blocks
        self.on_fetch: Callable[[], None] = lambda: None

    def foreground_misses(self) -> int:
        return self.misses

    def bytes_in_use(self) -> int:
        return self.used_bytes

    def has_disk(self) -> bool:
        return self.free

    def blocks(self) -> list[int]:
        """Of each request, how many."""
        return [sum(map(int, line.split()[2::2])) for line in self.lines]

    async def fetch(self, line: bytes) -> int:
        self.lines.append(line.decode().removesuffix("\n"))
        self.on_fetch()
        blocks = self.answers(self.blocks()[-1])
        self.used_bytes += max(blocks, 0) * BLOCK_SIZE_BYTES
        return blocks

    def run(self, made: HotBlocks, bound_bytes: int = 0, bytes_max: int = 1 << 40) -> Outcome:
        fetching = prefetch_hot_blocks(
            made,
            self.fetch,
            self,
            bound_bytes=lambda: bound_bytes,
            bytes_max=bytes_max,
            clock=SystemClock(),
        )
        return asyncio.run(fetching)


def test_the_most_used_come_first_and_near_ones_together() -> None:
    endpoint = Endpoint()
    outcome = endpoint.run(hot([HotFile(GROWN, [7, 1])], [HotFile(TABLE, [0, 1, 3, 1, 100, 300])]))
    assert endpoint.lines == [
        f"{GROWN} 7 1",
        f"{TABLE} 0 4 100 124",
        f"{TABLE} 224 128",
        f"{TABLE} 352 48",
    ]
    assert outcome == Outcome(1 + 4 + 300, "all of it is here")


def test_a_request_is_one_line_and_bounded() -> None:
    endpoint = Endpoint()
    runs = [each for block in range(0, 131072 - 1, 20) for each in (block, 1)]
    endpoint.run(hot([HotFile(TABLE, runs)]))
    assert max(map(len, endpoint.lines)) < 4096
    assert max(len(line.split()) for line in endpoint.lines) == 1 + 2 * RUNS_MAX
    assert sum(endpoint.blocks()) == len(runs) // 2


def test_postgresql_goes_first() -> None:
    endpoint = Endpoint()

    def miss() -> None:
        endpoint.misses += len(endpoint.lines) in (2, 3)

    endpoint.on_fetch = miss
    endpoint.run(hot([HotFile(TABLE, [0, 1000])]))
    assert endpoint.blocks()[:5] == [BLOCKS_MAX, BLOCKS_MAX, SHARED_BLOCKS_MAX, SHARED_BLOCKS_MAX, BLOCKS_MAX]


def test_it_ends_before_the_cache_is_full() -> None:
    """So that nothing is evicted for it: eviction begins at the bound."""
    bound_bytes = 16 << 20
    endpoint = Endpoint()
    outcome = endpoint.run(hot([HotFile(TABLE, [0, 100_000])]), bound_bytes)
    assert outcome.why == "the cache has no more room"
    assert 0 < endpoint.used_bytes < bound_bytes
    full = Endpoint()
    full.used_bytes = bound_bytes
    assert full.run(hot([HotFile(TABLE, [0, 1])]), bound_bytes).fetched_blocks == 0


def test_it_fetches_no_more_than_it_may() -> None:
    endpoint = Endpoint()
    outcome = endpoint.run(hot([HotFile(TABLE, [0, 100_000])]), bytes_max=8 << 20)
    assert outcome == Outcome(1024, "no more may be fetched")


def test_it_leaves_the_last_of_the_disk_to_others() -> None:
    endpoint = Endpoint()
    endpoint.free = False
    assert endpoint.run(hot([HotFile(TABLE, [0, 1])])) == Outcome(0, "the disk has little room")
    assert endpoint.lines == []


def test_it_gives_up_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("excimer.compute.hot_prefetch.RETRY_S", 0.0)
    endpoint = Endpoint()
    endpoint.answers = lambda blocks: -1
    assert endpoint.run(hot([HotFile(TABLE, [0, 100_000])])).why == "the page server does not answer"
    assert len(endpoint.lines) < 20
