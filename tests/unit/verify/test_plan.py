"""Which files are compared, and which blocks at which LSN."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    SEGMENT_BLOCKS,
    Fork,
    Relation,
    relation_block_key,
    slru_block_key,
)
from excimer.base.lsn import Lsn
from excimer.export.layout import PageFile
from excimer.verify.plan import ComparedFile, is_unwritten, plan_batches, plan_files, size_is_wrong

R = Lsn(1000)
RELATION = Relation(1663, 5, 20000)
FILE = ComparedFile("base/5/20000", relation_block_key(RELATION, Fork.MAIN, 0), 10, 10)
ZEROS = bytes(BLOCK_SIZE_BYTES)


def page_at(lsn: int) -> bytes:
    return struct.pack("<II", lsn >> 32, lsn & 0xFFFFFFFF) + bytes(BLOCK_SIZE_BYTES - 8)


def served(path: str, blocks: int, fork: int = Fork.MAIN, first: int = 0) -> PageFile:
    return PageFile(path, relation_block_key(RELATION, fork, first), blocks)


@given(st.lists(st.one_of(st.none(), st.integers(0, 2000)), max_size=30), st.integers(0, 100))
def test_each_block_that_is_here_is_compared_once_and_at_its_own_moment(
    lsns: list[int | None], first: int
) -> None:
    pages = [None if lsn is None else page_at(lsn) for lsn in lsns]
    compared: dict[int, tuple[bytes, int]] = {}
    for batch in plan_batches(FILE, first, pages, R):
        for number, page in enumerate(batch.pages, batch.block):
            assert number not in compared
            compared[number] = (page, batch.lsn)
        assert batch.lsn == R or len(batch.pages) == 1
    expected = {
        first + index: (page_at(lsn), max(lsn, R)) for index, lsn in enumerate(lsns) if lsn is not None
    }
    assert compared == expected


def test_pages_of_an_slru_have_no_lsn_of_their_own() -> None:
    file = ComparedFile("pg_xact/0000", slru_block_key(0, 0, 0), 2, 2)
    (batch,) = plan_batches(file, 0, [b"\xff" * BLOCK_SIZE_BYTES, ZEROS], R)
    assert (batch.lsn, len(batch.pages)) == (R, 2)


def test_what_wal_does_not_carry_is_left_out() -> None:
    here = {
        "base/5/20000": 3,
        "base/5/20000_fsm": 2,
        "base/5/20001": 5,
        "base/5/20001_init": 1,
        "base/5/20001_vm": 1,
        "base/5/20001.1": 4,
        "pg_xact/0000": 1,
    }
    layout = plan_files(here, [served("base/5/20000", 3)], None)
    assert [file.path for file in layout.files] == ["base/5/20000", "base/5/20001_init", "pg_xact/0000"]
    assert (layout.free_space_pages, layout.unlogged_files) == (2, 3)


def test_files_of_either_side_are_compared() -> None:
    layout = plan_files({"base/5/20000": 3}, [served("base/5/20002", 1)], None)
    assert [(file.path, file.here_blocks, file.served_blocks) for file in layout.files] == [
        ("base/5/20000", 3, None),
        ("base/5/20002", None, 1),
    ]
    again = plan_files({"base/5/20000": 3, "base/5/20002": 1}, [], {"base/5/20002": None})
    assert [file.path for file in again.files] == ["base/5/20002"]


def test_sizes() -> None:
    def wrong(here: int | None, theirs: int | None, fork: int = Fork.MAIN, first: int = 0) -> bool:
        return size_is_wrong(
            ComparedFile("base/5/20000", relation_block_key(RELATION, fork, first), here, theirs)
        )

    assert not wrong(5, 5)
    assert not wrong(6, 5), "the last may be too new for WAL"
    assert wrong(4, 5)
    assert wrong(None, 5)
    assert wrong(None, 0)
    assert wrong(0, None)
    assert not wrong(0, None, first=SEGMENT_BLOCKS), "an empty segment behind a full one"
    assert not wrong(1, None, fork=Fork.VM), "a map in which nobody has set a bit"


def test_zeros_at_the_end_are_not_in_wal_yet() -> None:
    file = FILE._replace(here_blocks=12)
    assert is_unwritten(file, 10, ZEROS)
    assert not is_unwritten(file, 9, ZEROS)
    assert not is_unwritten(file, 10, page_at(5))
    a_map = file._replace(key=relation_block_key(RELATION, Fork.VM, 0), served_blocks=None)
    assert is_unwritten(a_map, 0, page_at(5))
    assert not is_unwritten(a_map, 0, page_at(5)[:-1] + b"\1")
