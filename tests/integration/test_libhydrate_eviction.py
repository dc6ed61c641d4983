"""Which blocks are evicted and which never, by the real evictor on a directory of the real library.

A page here is a tag, repeated, or made by hand: its LSN is its first eight bytes, the upper half first.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import Lsn
from tests.kit.hydrate_driver import FILES, Driver, LazyDirectory, tag, tags

PATH = "base/5/1000"
BLOCKS = FILES[PATH]
NEW_PATH = "base/5/7000"
END = 0x10_0000_0000
"""Of WAL: all pages made here are older."""
LSN = 0x1_0000_0000
OLDEST_XID = 1000
ALL = 1 << 40


class Cache:
    """The directory, and an evictor of it."""

    def __init__(self, root: Path) -> None:
        self.lazy = LazyDirectory(root, evicts=True)
        self.evictor = self.lazy.arena.make_evictor(self.lazy.arena_path, clean_only=False)
        self.driver: Driver = self.lazy.driver()

    def close(self) -> None:
        self.evictor.close()
        self.lazy.close()

    def sweep(self, ingested_lsn: int = END, wanted: int = ALL) -> int:
        return self.evictor.sweep(wanted, ingested_lsn, True)[0]

    def settle(self, ingested_lsn: int = END, end_lsn: int = END) -> int:
        """As often as the hand must come round until all that may go is gone; how many went."""
        gone = 0
        for _ in range(4):
            gone += self.sweep(ingested_lsn)
            self.evictor.settle(end_lsn, OLDEST_XID)
        return gone

    def present(self, path: str = PATH) -> list[bool]:
        return self.lazy.arena.present_blocks(path)

    def write(self, block: int, page: bytes, path: str = PATH) -> None:
        """As PostgreSQL does; the page's bytes take the tag's place."""
        fd = self.driver.open(path)
        assert self.driver.call(f"pwrite {fd} {block} 1 1") == "ok 8192"
        self.driver.call(f"close {fd}")
        with (self.lazy.data_dir / path).open("r+b") as file:
            file.seek(block * BLOCK_SIZE_BYTES)
            file.write(page)

    def allocated(self, path: str = PATH) -> int:
        return os.stat(self.lazy.data_dir / path).st_blocks * 512 // BLOCK_SIZE_BYTES


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path)
    yield made
    made.close()


def page_of(lsn: int = LSN, special: bytes = b"", items: bytes = b"", tuples: bytes = b"") -> bytes:
    """A page of PostgreSQL: header, line pointers, tuples before the special space."""
    special_at = BLOCK_SIZE_BYTES - len(special)
    header = struct.pack(
        "<IIHHHHHHI", lsn >> 32, lsn & 0xFFFFFFFF, 0, 0, 24 + len(items), special_at, special_at, 0x2004, 0
    )
    body = bytearray(BLOCK_SIZE_BYTES)
    body[: 24 + len(items)] = header + items
    body[special_at - len(tuples) : special_at] = tuples
    body[special_at:] = special
    return bytes(body)


def heap_page(xmin: int, xmax: int = 0, cid: int = 0, infomask: int = 0x0800, position: int = 1) -> bytes:
    """With one row; `infomask` is HEAP_XMAX_INVALID by default."""
    row = struct.pack("<IIIHHHHHB", xmin, xmax, cid, 0, 0, position, 1, infomask, 24) + b"\0"
    at = BLOCK_SIZE_BYTES - len(row)
    return page_of(items=struct.pack("<I", at | 1 << 15 | len(row) << 17), tuples=row)


def btree_page(cycle: int) -> bytes:
    return page_of(special=struct.pack("<IIIHH", 0, 0, 0, 1, cycle))


def test_what_was_only_read_goes_and_comes_again(cache: Cache) -> None:
    fd = cache.driver.open(PATH)
    assert cache.driver.read(fd, 10, 20) == tags(PATH, 10, 30)
    assert cache.sweep() == 20
    assert not any(cache.present())
    assert cache.allocated() == 0
    assert cache.driver.read(fd, 10, 20) == tags(PATH, 10, 30)
    assert cache.lazy.arena.statistics().evicted == 20


def test_what_is_read_again_has_a_second_chance(cache: Cache) -> None:
    fd = cache.driver.open(PATH)
    cache.driver.read(fd, 10, 20)
    cache.driver.read(fd, 15, 5)
    assert cache.sweep() == 15
    assert [block for block, here in enumerate(cache.present()) if here] == list(range(15, 20))
    assert cache.sweep() == 5


def test_only_as_much_goes_as_is_wanted(cache: Cache) -> None:
    fd = cache.driver.open(PATH)
    cache.driver.read(fd, 0, 600)
    gone = cache.sweep(wanted=100)
    assert 100 <= gone < 300
    assert cache.present().count(True) == 600 - gone


def test_what_was_written_goes_when_its_wal_is_ingested(cache: Cache) -> None:
    cache.write(7, page_of())
    assert cache.settle(ingested_lsn=END - 1) == 0
    assert cache.present()[7]
    assert cache.settle() == 1
    fd = cache.driver.open(PATH)
    cache.driver.read(fd, 7)
    assert cache.lazy.server.requests[-1].not_modified_since == max(
        END, cache.lazy.arena.settings.not_modified_since
    )


def test_nothing_goes_before_postgres_was_asked(cache: Cache) -> None:
    """Its page LSN is ingested; but an all-visible bit may have been set since."""
    cache.write(7, page_of())
    assert [cache.sweep() for _ in range(5)] == [0] * 5


def test_a_block_that_is_written_again_waits_for_its_next_epoch(cache: Cache) -> None:
    cache.write(7, page_of())
    cache.sweep()
    cache.evictor.settle(END - 8192, OLDEST_XID)
    cache.write(7, page_of())
    assert cache.sweep(ingested_lsn=END - 8192) == 0
    cache.evictor.settle(END, OLDEST_XID)
    assert cache.sweep(ingested_lsn=END - 8192) == 0
    assert cache.sweep(ingested_lsn=END) == 1


@pytest.mark.parametrize(
    "page",
    [
        bytes(BLOCK_SIZE_BYTES),
        page_of(lsn=1),
        page_of(lsn=1000),
        page_of(lsn=END + 1),
        page_of(special=struct.pack("<Q", 0x1717)),
        btree_page(cycle=1),
        btree_page(cycle=0xFF7F),
        heap_page(xmin=OLDEST_XID, cid=1),
        heap_page(xmin=OLDEST_XID + 5, cid=0, infomask=0x0820),
        heap_page(xmin=3, xmax=OLDEST_XID, cid=2, infomask=0x0100),
        heap_page(xmin=3, xmax=7, cid=2, infomask=0x1100),
        heap_page(xmin=OLDEST_XID, position=0xFFFE),
    ],
    ids=[
        *("zeros", "built without WAL", "no WAL", "not of this epoch", "sequence", "btree split in VACUUM"),
        *("the last cycle", "command of an insertion", "combo command", "command of a deletion"),
        *("deleted by a multixact", "on trial"),
    ],
)
def test_what_no_wal_says_stays(cache: Cache, page: bytes) -> None:
    cache.write(7, page)
    assert cache.settle() == 0
    assert cache.present()[7]


@pytest.mark.parametrize(
    "page",
    [
        btree_page(cycle=0),
        page_of(special=struct.pack("<IIIHH", 0, 0, 0, 1, 0xFF81)),
        heap_page(xmin=OLDEST_XID, cid=0),
        heap_page(xmin=OLDEST_XID - 1, cid=7),
        heap_page(xmin=OLDEST_XID + 5, cid=7, infomask=0x0900),
        heap_page(xmin=OLDEST_XID + 5, cid=7, infomask=0x0B00),
        heap_page(xmin=3, xmax=OLDEST_XID + 5, cid=7, infomask=0x0900),
        heap_page(xmin=3, xmax=7, cid=7, infomask=0x1180),
    ],
    ids=[
        *("btree", "GiST", "first command of a transaction", "of one that has ended", "committed", "frozen"),
        *("never deleted", "locked by a multixact"),
    ],
)
def test_what_wal_says_goes(cache: Cache, page: bytes) -> None:
    cache.write(7, page)
    assert cache.settle() == 1
    assert not cache.present()[7]


def test_free_space_maps_slrus_and_shared_catalogs_stay(cache: Cache) -> None:
    paths = ["base/5/1000_fsm", "pg_xact/0000", "global/1262"]
    for path in paths:
        cache.driver.read(cache.driver.open(path), 0, 3)
    assert cache.settle() == 0
    assert all(all(cache.present(path)[:3]) for path in paths)


def test_an_unlogged_relation_stays(cache: Cache) -> None:
    (cache.lazy.data_dir / "base/5/1000_init").write_bytes(bytes(BLOCK_SIZE_BYTES))
    cache.driver.read(cache.driver.open(PATH), 0, 5)
    cache.write(7, page_of())
    assert cache.settle() == 0


def test_blocks_that_the_file_has_grown_by_go_too(cache: Cache) -> None:
    for block in range(BLOCKS, BLOCKS + 10):
        cache.write(block, page_of())
    assert cache.settle() == 10
    assert cache.allocated() == 0
    assert cache.present()[BLOCKS - 1 : BLOCKS + 10] == [False] * 11
    assert cache.present("base/5/1001") == [False] * FILES["base/5/1001"]


def test_files_that_postgres_makes_are_known_and_go_too(cache: Cache) -> None:
    fd = cache.driver.open(NEW_PATH, "wcx")
    for block in range(5):
        assert cache.driver.call(f"pwrite {fd} {block} 1 {LSN >> 32}") == "ok 8192"
    assert cache.lazy.arena.statistics().adopted == 1
    for block in range(5):
        cache.write(block, page_of(), NEW_PATH)
    assert cache.settle() == 5
    (cache.lazy.pages_dir / NEW_PATH).write_bytes(struct.pack("<Q", 77) * 1024 * 5)
    assert cache.driver.read(fd, 0, 5) == [77] * 5
    other = cache.lazy.driver()
    assert other.read(other.open(NEW_PATH), 4) == [77]


def test_a_file_that_is_copied_stays(cache: Cache) -> None:
    """CREATE DATABASE writes WAL of it only when all is copied; its pages have the LSNs of others."""
    source, target = cache.driver.open(PATH), cache.driver.open(NEW_PATH, "wcx")
    assert cache.driver.call(f"copy {source} {target} 16").startswith("ok ")
    cache.write(0, page_of(), NEW_PATH)
    assert cache.settle() == 16
    assert cache.allocated(NEW_PATH) == 16
    assert cache.allocated(PATH) == 0


def test_a_cut_and_regrown_file_has_local_zeros(cache: Cache) -> None:
    fd = cache.driver.open(PATH)
    cache.driver.read(fd, 0, 600)
    assert cache.sweep() == 600
    assert cache.driver.call(f"ftruncate {fd} 590") == "ok 0"
    assert cache.driver.call(f"ftruncate {fd} 610") == "ok 0"
    assert cache.driver.read(fd, 588, 22) == [tag(PATH, 588), tag(PATH, 589), *[0] * 20]
    assert cache.settle() == 2
    assert cache.driver.read(fd, 590, 20) == [0] * 20


def test_what_is_written_after_an_eviction_is_what_is_read(cache: Cache) -> None:
    fd = cache.driver.open(PATH)
    cache.driver.read(fd, 5)
    assert cache.sweep() == 1
    assert cache.driver.call(f"pwrite {fd} 5 1 99") == "ok 8192"
    assert cache.sweep() == 0
    assert cache.driver.read(fd, 5) == [99]


def test_part_of_an_evicted_block_is_written_over_the_rest(cache: Cache) -> None:
    fd = cache.driver.open(PATH)
    cache.driver.read(fd, 5)
    assert cache.sweep() == 1
    assert cache.driver.call(f"write_bytes {fd} {5 * 8192} 512 99") == "ok 512"
    assert cache.driver.read(fd, 5) == [-1]
    assert cache.present()[5]


def test_a_static_endpoints_writes_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.evictor.close()
    cache.evictor = cache.lazy.arena.make_evictor(cache.lazy.arena_path, clean_only=True)
    cache.driver.read(cache.driver.open(PATH), 0, 5)
    cache.write(7, page_of())
    assert cache.settle() == 5
    assert cache.present()[7]
    cache.close()


def test_what_was_written_while_nothing_was_bounded_is_not_trusted(tmp_path: Path) -> None:
    lazy = LazyDirectory(tmp_path)
    driver = lazy.driver()
    fd = driver.open(PATH)
    assert driver.call(f"pwrite {fd} 7 1 5") == "ok 8192"
    lazy.arena.renew(evicts=True)
    evictor = lazy.arena.make_evictor(lazy.arena_path, clean_only=False)
    assert [evictor.sweep(ALL, END, True)[0] for _ in range(3)] == [0] * 3
    evictor.close()
    lazy.close()


def test_an_arena_without_a_bound_has_no_evictor(tmp_path: Path) -> None:
    lazy = LazyDirectory(tmp_path)
    with pytest.raises(ValueError, match="not begun so"):
        lazy.arena.make_evictor(lazy.arena_path, clean_only=False)
    lazy.close()


def test_lsns_of_lazy_pages_are_lower_than_what_is_asked_for(cache: Cache) -> None:
    assert Lsn(END) < cache.lazy.arena.settings.not_modified_since
