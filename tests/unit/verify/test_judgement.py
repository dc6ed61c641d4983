"""Two copies of a block: which differences count."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, Relation, Slru, relation_block_key, slru_block_key
from excimer.verify.judgement import is_between, judge_block, stamps_lsn

HEAP = relation_block_key(Relation(1663, 5, 20000), Fork.MAIN, 7)
MAP = relation_block_key(Relation(1663, 5, 20000), Fork.VM, 0)
INDEX = relation_block_key(Relation(1663, 5, 20001), Fork.MAIN, 3)


def page_of(lsn: int, *, special: bytes = b"", body: bytes = b"") -> bytes:
    """An initialised page: header, body at its upper end, special space."""
    end = BLOCK_SIZE_BYTES - len(special)
    upper = end - len(body)
    header = struct.pack("<IIHHHHHHI", lsn >> 32, lsn & 0xFFFFFFFF, 0, 0, 24, upper, end, 0x2004, 0)
    return header + bytes(upper - 24) + body + special


def says(key: bytes, here: bytes, served: bytes, *, hints_are_logged: bool = False) -> str | None:
    told = judge_block(key, here, served, hints_are_logged=hints_are_logged)
    return None if told is None else told.reason


def test_the_first_byte_that_counts_is_told() -> None:
    here, served = page_of(100, body=b"abcdefgh"), page_of(100, body=b"abXdeXgh")
    told = judge_block(HEAP, here, served, hints_are_logged=False)
    assert told is not None
    assert told.reason == "2 bytes differ from byte 8186 on"
    assert (told.offset, told.here, told.served) == (8186, b"cdefgh", b"XdeXgh")


def test_the_lsn_of_equal_pages_counts() -> None:
    assert says(HEAP, page_of(100), page_of(100)) is None
    assert says(HEAP, page_of(100), page_of(99)) == "pd_lsn is 0/64 here and 0/63 at the pageserver"
    assert says(HEAP, page_of(100), page_of(101)) is not None


def test_with_checksums_a_hint_may_have_left_its_lsn_here_only() -> None:
    assert says(HEAP, page_of(100), page_of(99), hints_are_logged=True) is None
    assert says(HEAP, page_of(100), page_of(101), hints_are_logged=True) is not None


def test_pages_built_without_lsn_have_none_to_compare() -> None:
    gist = struct.pack("<QIHH", 0, 0, 1, 0xFF81)
    assert says(INDEX, page_of(1, special=gist), page_of(500, special=gist)) is None
    assert says(INDEX, page_of(2, special=gist), page_of(500, special=gist)) is not None
    spgist = struct.pack("<HHHH", 0, 0, 0, 0xFF82)
    root = relation_block_key(Relation(1663, 5, 20001), Fork.MAIN, 0)
    assert says(root, page_of(9, special=spgist), page_of(500, special=spgist)) is None
    assert says(INDEX, page_of(9, special=spgist), page_of(500, special=spgist)) is not None


def test_pages_of_two_kinds_are_told_by_their_names() -> None:
    btree = struct.pack("<IIIHH", 0, 0, 0, 1, 0)
    told = says(INDEX, page_of(5, special=btree), page_of(5))
    assert told == "the page here is of a btree, the pageserver's of a heap"
    assert says(HEAP, bytes(BLOCK_SIZE_BYTES), page_of(5)) == (
        "the page here is of a new, the pageserver's of a heap"
    )


def sequence(last_value: int, log_cnt: int, is_called: int = 1) -> bytes:
    head = struct.pack("<II4x6xHHB", 2, 0, 3, 0x0B00, 24).ljust(24, b"\0")
    row = head + struct.pack("<qqB", last_value, log_cnt, is_called)
    start = BLOCK_SIZE_BYTES - 8 - 48
    pointer = struct.pack("<I", start | 1 << 15 | len(row) << 17)
    header = struct.pack("<IIHHHHHHI", 0, 9, 0, 0, 28, start, BLOCK_SIZE_BYTES - 8, 0x2004, 0)
    page = header + pointer
    return page + bytes(start - len(page)) + row.ljust(48, b"\0") + struct.pack("<II", 0x1717, 0)


@pytest.mark.parametrize(
    ("here", "served", "agrees"),
    [
        ((8, 25), (33, 0), True),
        ((8, 25), (8 + 5 * 25, 0), True),
        ((-8, 25), (-33, 0), True),
        ((33, 0), (33, 0), True),
        ((8, 25), (34, 0), False),
        ((8, 25), (8, 0), False),
        ((8, 0), (33, 0), False),
        ((8, 25), (33, 1), False),
        ((8, 25, 0), (33, 0, 1), False),
    ],
)
def test_a_sequence_is_ahead_in_wal_by_whole_increments(
    here: tuple[int, ...], served: tuple[int, ...], agrees: bool
) -> None:
    key = relation_block_key(Relation(1663, 5, 20001), Fork.MAIN, 0)
    assert (says(key, sequence(*here), sequence(*served)) is None) is agrees


def a_map(*bits: int) -> bytes:
    return page_of(50)[:24] + bytes(bits) + bytes(BLOCK_SIZE_BYTES - 24 - len(bits))


def test_a_map_is_its_bits() -> None:
    assert says(MAP, a_map(), bytes(BLOCK_SIZE_BYTES)) is None
    assert says(MAP, a_map(3), a_map()[:4] + b"\1" + a_map(3)[5:]) is None
    assert says(MAP, a_map(3), a_map(1)) == "1 byte differs from byte 24 on"


def test_only_a_map_copied_with_its_database_may_lack_bits_at_the_pageserver() -> None:
    def key(db: int, rel: int) -> bytes:
        return relation_block_key(Relation(1663, db, rel), Fork.VM, 0)

    assert says(key(20000, 2600), a_map(3), a_map()) is None
    assert says(key(20000, 19999), a_map(3), a_map(1)) is None
    assert says(key(20000, 20001), a_map(3), a_map()) is not None, "made in that database"
    assert says(key(20000, 2600), a_map(1), a_map(3)) is not None, "a bit too many at the pageserver"
    assert says(key(5, 2600), a_map(3), a_map()) is not None, "initdb's database"


def test_commit_times_are_compared_as_they_are_logged() -> None:
    key = slru_block_key(Slru.COMMIT_TS, 0, 1)

    def page(*entries: tuple[int, int]) -> bytes:
        return b"".join(struct.pack("<qH", *entry) for entry in entries).ljust(BLOCK_SIZE_BYTES, b"\0")

    assert says(key, page((77, 3), (8, 0)), page((0, 3), (8, 0))) is None
    assert says(key, page((77, 3)), page((0, 2))) is not None
    assert says(key, page((77, 0)), page((0, 0))) is not None
    assert says(key, page((77, 3)), page((78, 3))) is not None
    assert says(slru_block_key(Slru.XACT, 0, 1), page((77, 3)), page((0, 3))) is not None


@given(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_what_lies_between_two_moments_has_each_bit_of_one_of_them(
    first: bytes, second: bytes, chosen: int
) -> None:
    one, two = (int.from_bytes(each, "little") for each in (first, second))
    mixed = (one & chosen | two & ~chosen).to_bytes(4, "little")
    assert is_between(mixed, first, second)
    for bit in range(32):
        changed = (int.from_bytes(mixed, "little") ^ 1 << bit).to_bytes(4, "little")
        assert is_between(changed, first, second) is bool((one ^ two) >> bit & 1)


def test_which_pages_say_when_they_were_changed() -> None:
    assert stamps_lsn(HEAP)
    assert not stamps_lsn(MAP)
    assert not stamps_lsn(slru_block_key(0, 0, 0))
