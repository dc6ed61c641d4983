"""The native scanner and the Python reader agree on every stream: cut anywhere, damaged anywhere."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native.wal_scanner import WalScanner
from excimer.pgformat.wal_reader import WalReader
from excimer.pgformat.wal_segment import InvalidWalError
from tests.kit.wal_builder import WalBuilder

SEGMENT = 1 << 16
SIZES = st.lists(
    st.one_of(st.integers(0, 300), st.integers(7_900, 8_300), st.integers(0, 30_000)), max_size=12
)
STARTS = st.sampled_from([SEGMENT, SEGMENT * 3 - 8, SEGMENT + 8192, SEGMENT + 4096, SEGMENT * 2 - 32])


def build(start_lsn: int, sizes: list[int], seed: int, switch_at: int) -> WalBuilder:
    chance = random.Random(seed)
    wal = WalBuilder(start_lsn, 18, SEGMENT, previous_lsn=start_lsn - 64)
    for index, size in enumerate(sizes):
        if index == switch_at:
            wal.add(0, 0x40)
        wal.add(10, 0, chance.randbytes(size), xid=3)
    return wal


def cut(data: bytes, cuts: list[float]) -> list[bytes]:
    edges = sorted({0, len(data), *(int(cut * len(data)) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def compare(start_lsn: int, chunks: list[bytes]) -> None:
    """Feeds both with the same chunks and checks that they say the same after each."""
    reader = WalReader(start_lsn, 18, SEGMENT, start_lsn - 64)
    scanner = WalScanner(start_lsn, 18, SEGMENT, previous_lsn=start_lsn - 64)
    count = 0
    for chunk in chunks:
        expected = found = None
        try:
            count += len(reader.feed(chunk))
        except InvalidWalError as error:
            expected = error
        try:
            scanner.feed(chunk)
        except InvalidWalError as error:
            found = error
        assert (found is None) == (expected is None), (found, expected)
        assert scanner.last_record_end == reader.last_record_end
        assert scanner.last_record_start == reader.last_record_start
        if expected is not None and found is not None:
            assert (found.lsn, str(found)) == (expected.lsn, str(expected))
            with pytest.raises(InvalidWalError):
                scanner.feed(b"\0")
            return
        assert scanner.position == reader.position
        assert scanner.record_count == count


@given(STARTS, SIZES, st.integers(0, 99), st.integers(0, 20), st.lists(st.floats(0, 1), max_size=30))
def test_every_record_is_found_however_the_stream_is_cut(
    start_lsn: int, sizes: list[int], seed: int, switch_at: int, cuts: list[float]
) -> None:
    wal = build(start_lsn, sizes, seed, switch_at)
    chunks = cut(bytes(wal.stream), cuts)
    compare(start_lsn, chunks)
    scanner = WalScanner(start_lsn, 18, SEGMENT, previous_lsn=start_lsn - 64)
    for chunk in chunks:
        scanner.feed(chunk)
    assert scanner.record_count == len(wal.ends)
    assert scanner.last_record_end == (wal.ends[-1] if wal.ends else start_lsn)
    assert scanner.last_record_start == (wal.starts[-1] if wal.starts else start_lsn - 64)


@settings(max_examples=300)
@given(
    STARTS,
    SIZES,
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.lists(st.floats(0, 1), max_size=10),
)
def test_damaged_streams_are_refused_alike(
    start_lsn: int, sizes: list[int], damage: list[tuple[float, int]], cuts: list[float]
) -> None:
    stream = build(start_lsn, [*sizes, 40], 1, 3).stream
    for place, value in damage:
        stream[int(place * len(stream))] = value
    compare(start_lsn, cut(bytes(stream), cuts))


@settings(max_examples=60)
@given(STARTS, st.binary(max_size=20_000), st.lists(st.floats(0, 1), max_size=5))
def test_random_bytes_are_refused_alike(start_lsn: int, stream: bytes, cuts: list[float]) -> None:
    compare(start_lsn, cut(stream, cuts))


@pytest.mark.parametrize("chunk_bytes", [1, 3, 8, 24, 8192, 10_000])
def test_byte_by_byte(chunk_bytes: int) -> None:
    stream = bytes(build(SEGMENT * 2 - 32, [0, 1, 9_000, 17, 70_000], 5, 2).stream)
    compare(SEGMENT * 2 - 32, [stream[at : at + chunk_bytes] for at in range(0, len(stream), chunk_bytes)])


def test_a_flipped_bit_in_a_record_is_found() -> None:
    wal = build(SEGMENT, [100, 5_000, 12_000], 1, 9)
    wal.stream[wal.starts[1] - SEGMENT + 2_000] ^= 0x10
    scanner = WalScanner(SEGMENT, 18, SEGMENT)
    with pytest.raises(InvalidWalError, match="checksum is wrong") as caught:
        scanner.feed(bytes(wal.stream))
    assert caught.value.lsn == wal.starts[1]
    assert scanner.last_record_end == wal.ends[0]
    WalScanner(SEGMENT, 18, SEGMENT, check_crc=False).feed(bytes(wal.stream))


def test_zeros_end_the_wal() -> None:
    wal = build(SEGMENT, [100], 1, 9)
    scanner = WalScanner(SEGMENT, 18, SEGMENT)
    with pytest.raises(InvalidWalError, match="record length 0"):
        scanner.feed(bytes(wal.stream) + bytes(64))
    assert scanner.last_record_end == wal.ends[0]


@pytest.mark.parametrize("keep_records", [False, True])
@pytest.mark.parametrize(("rmgr", "info"), [(21, 0x00), (1, 0x60), (8, 0x20), (10, 0x30)])
def test_a_long_record_that_changes_no_page_is_not_held(rmgr: int, info: int, keep_records: bool) -> None:
    wal = WalBuilder(SEGMENT, 18, SEGMENT)
    wal.add(10, 0, bytes(100), xid=3)
    wal.add(rmgr, info, bytes(range(256)) * 12_000, xid=3)
    wal.add(10, 0, bytes(100), xid=3)
    scanner = WalScanner(SEGMENT, 18, SEGMENT, keep_records=keep_records)
    for at in range(0, len(wal.stream), 100_000):
        scanner.feed(bytes(wal.stream[at : at + 100_000]))
        assert scanner.held_size_bytes <= 2 * 8192
    assert scanner.last_record_end == wal.ends[-1]
    assert scanner.record_count == 3


def test_a_flipped_bit_in_a_record_that_is_not_held_is_found() -> None:
    wal = WalBuilder(SEGMENT, 18, SEGMENT)
    wal.add(21, 0, bytes(3 << 20), xid=3)
    wal.stream[(2 << 20) + 100] ^= 0x01
    scanner = WalScanner(SEGMENT, 18, SEGMENT)
    scanner.feed(bytes(wal.stream[: 1 << 20]))
    with pytest.raises(InvalidWalError, match="checksum is wrong"):
        scanner.feed(bytes(wal.stream[1 << 20 :]))


def test_memory_of_a_long_record_that_had_to_be_held_is_given_back() -> None:
    wal = WalBuilder(SEGMENT, 18, SEGMENT)
    wal.add(1, 0x00, bytes(3 << 20), xid=3)
    wal.add(10, 0, bytes(100), xid=3)
    scanner = WalScanner(SEGMENT, 18, SEGMENT, keep_records=True)
    scanner.feed(bytes(wal.stream[: 2 << 20]))
    assert 2 << 20 <= scanner.held_size_bytes <= 4 << 20
    scanner.feed(bytes(wal.stream[2 << 20 :]))
    assert scanner.held_size_bytes <= 2 * 8192
