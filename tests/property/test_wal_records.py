"""Taking records apart: the native and the Python way agree, on whole records and on damaged ones."""

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native.record_parts import describe_record
from excimer._native.xact_parts import describe_transaction_end
from excimer.base.keys import Slru
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.checkpoint_state import CheckpointState, ClusterSettings, stored_next_xid
from excimer.pgformat.slru import (
    is_segment_obsolete,
    member_segments,
    page_precedes,
    xid_precedes,
)
from excimer.pgformat.transaction_records import decode_transaction_end
from excimer.pgformat.wal_record import DecodedRecord, MalformedRecordError, decode_record
from excimer.pgformat.wal_segment import parse_segment_name, segment_name

VERSIONS = st.sampled_from([14, 15, 16, 17, 18])
U8 = st.integers(0, 255)
U32 = st.integers(0, 2**32 - 1)


@st.composite
def image_headers(draw: st.DrawFn, pg_version: int) -> tuple[bytes, bytes]:
    """A full-page image's header and content, sometimes contradicting themselves."""
    size = draw(st.sampled_from([1, 100, 8000, 8192, 8193, 0]))
    compressed = draw(st.sampled_from([0, 0x02 if pg_version < 15 else 0x04, 0x08, 0x10, 0x14]))
    hole = draw(st.sampled_from([0, 0, 92, 192, 8092]))
    apply = 0x04 if pg_version < 15 else 0x02
    info = (1 if hole else 0) | compressed | draw(st.sampled_from([0, apply]))
    header = struct.pack("<HHB", size, draw(st.sampled_from([0, 24, 60, 8100])) if hole else 0, info)
    is_compressed = info & (0x02 if pg_version < 15 else 0x1C)
    return header + (struct.pack("<H", hole) if hole and is_compressed else b""), bytes(size)


@st.composite
def raw_records(draw: st.DrawFn) -> tuple[bytes, int]:
    """A record laid out as PostgreSQL does, or nearly so."""
    version = draw(VERSIONS)
    headers, contents = b"", b""
    for block_id in range(draw(st.integers(0, 4))):
        data = draw(st.binary(max_size=30))
        same = bool(block_id and draw(st.booleans()))
        flags = draw(st.integers(0, 3)) | draw(st.sampled_from([0, 0x40]))
        flags |= (0x20 if data else 0) | (0x80 if same else 0)
        image_header, image = b"", b""
        if draw(st.booleans()):
            image_header, image = draw(image_headers(version))
            flags |= 0x10
        headers += struct.pack("<BBH", block_id, flags, len(data)) + image_header
        headers += b"" if same else struct.pack("<III", 1663, 5, draw(U32))
        headers += struct.pack("<I", draw(U32))
        contents += image + data
    if draw(st.booleans()):
        headers += struct.pack("<BH", 253, draw(st.integers(0, 65535)))
    if draw(st.booleans()):
        headers += struct.pack("<BI", 252, draw(U32))
    main_data = draw(st.binary(max_size=300))
    if main_data:
        short = len(main_data) < 256
        headers += struct.pack("<BB" if short else "<BI", 255 if short else 254, len(main_data))
    body = headers + contents + main_data
    head = struct.pack("<IIQBB2xI", 24 + len(body), draw(U32), 0, draw(U8), draw(U8), 0)
    return head + body, version


def described(decoded: DecodedRecord) -> tuple[object, ...]:
    blocks = tuple(
        (b.block_id, tuple(b.relation), b.fork, b.block, b.will_init, b.image and tuple(b.image), b.data)
        for b in decoded.blocks
    )
    return blocks, decoded.main_data, decoded.origin, decoded.toplevel_xid


def agree(data: bytes, version: int) -> DecodedRecord | None:
    try:
        decoded = decode_record(data, version)
    except MalformedRecordError:
        with pytest.raises(MalformedRecordError):
            describe_record(data, version)
        return None
    assert describe_record(data, version) == described(decoded)
    return decoded


@settings(max_examples=300)
@given(raw_records())
def test_records_are_taken_apart_alike(record: tuple[bytes, int]) -> None:
    agree(*record)


@settings(max_examples=300)
@given(raw_records(), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), U8), min_size=1, max_size=3))
def test_damaged_records_are_refused_alike(
    record: tuple[bytes, int], damage: list[tuple[float, int]]
) -> None:
    data = bytearray(record[0])
    for place, value in damage:
        data[24 + int(place * (len(data) - 24)) if len(data) > 24 else 16] = value
    agree(bytes(data), record[1])


def test_a_whole_record() -> None:
    body = struct.pack("<BBHIIII", 0, 0x60, 3, 1663, 5, 16384, 7) + b"\xff\x02" + b"abc" + b"mn"
    data = struct.pack("<IIQBB2xI", 24 + len(body), 99, 0, 0x80, 10, 0) + body
    decoded = agree(data, 18)
    assert decoded is not None
    (block,) = decoded.blocks
    assert (block.relation.rel, block.block, block.will_init, block.data) == (16384, 7, True, b"abc")
    assert (decoded.header.xid, decoded.main_data) == (99, b"mn")


@st.composite
def transaction_ends(draw: st.DrawFn) -> tuple[bytes, int]:
    version = draw(VERSIONS)
    flags = draw(st.integers(0, 0x1FF))
    if version < 15:
        flags &= 0xFF
    data = struct.pack("<q", draw(st.integers(-(2**63), 2**63 - 1)))
    has_flags = draw(st.booleans())
    if has_flags:
        data += struct.pack("<I", flags)
        counts = st.integers(0, 4)
        sizes = [(0x02, 4), (0x04, 12), (0x100, 16 if version >= 18 else 12), (0x08, 16)]
        data += bytes(8) if flags & 1 else b""
        for flag, size in sizes:
            if flags & flag:
                count = draw(counts)
                items = st.binary(min_size=size * count, max_size=size * count)
                data += struct.pack("<I", count) + draw(items)
        if flags & 0x10:
            data += struct.pack("<I", draw(U32)) + (b"name\0" if flags & 0x80 else b"")
        data += struct.pack("<QQ", draw(U32) << 16, draw(U32)) if flags & 0x20 else b""
    data = data[: len(data) - draw(st.sampled_from([0, 0, 0, 1, 5]))]
    info = draw(st.sampled_from([0x00, 0x20, 0x30, 0x40])) | (0x80 if has_flags else 0)
    body = struct.pack("<BH", 253, 3) + struct.pack("<BI", 254, len(data)) + data
    return struct.pack("<IIQBB2xI", 24 + len(body), draw(U32), 0, info, 1, 0) + body, version


@settings(max_examples=300)
@given(transaction_ends())
def test_transaction_ends_are_taken_apart_alike(record: tuple[bytes, int]) -> None:
    data, version = record
    try:
        expected = decode_transaction_end(decode_record(data, version), version)
    except MalformedRecordError:
        with pytest.raises(MalformedRecordError):
            describe_transaction_end(data, version)
        return
    assert describe_transaction_end(data, version) == (
        *expected[:-1],
        tuple(tuple(relation) for relation in expected.relations),
    )


@given(st.data())
def test_checkpoint_state_round_trip(data: st.DataObject) -> None:
    def drawn(names: tuple[str, ...], booleans: set[str]) -> dict[str, Any]:
        number = st.integers(0, 2**31 - 1)
        return {name: data.draw(st.booleans() if name in booleans else number) for name in names}

    values = drawn(CheckPoint.__struct_fields__, {"full_page_writes"})
    settings_values = drawn(ClusterSettings.__struct_fields__, {"wal_log_hints", "track_commit_timestamp"})
    state = CheckpointState(CheckPoint(**values), ClusterSettings(**settings_values))
    assert CheckpointState.unpack(state.pack()) == state
    assert len(state.pack()) == 120


@pytest.mark.parametrize(
    ("next_xid", "kept"),
    [
        (3, 3),
        (4, 819),
        (819, 819),
        (820, 1638),
        (32_761, 32_768),
        (32_768, 32_768),
        (32_769, 33_579),
        (2**32 - 5, 2**32 + 3),
        (2**32, 2**32 + 3),
        (2**32 + 3, 2**32 + 3),
        (2**32 + 4, 2**32 + 819),
    ],
)
def test_next_xid_is_kept_rounded_up(next_xid: int, kept: int) -> None:
    assert stored_next_xid(next_xid) == kept


@given(st.integers(3, 2**34))
def test_no_page_begins_with_an_xid_that_rounding_skips(next_xid: int) -> None:
    """PostgreSQL logs a new page when it assigns the page's first xid: skipped, no replay would have it."""
    for skipped in range(next_xid, stored_next_xid(next_xid)):
        xid = skipped % 2**32
        assert xid != 3
        assert xid < 3 or (xid % 32_768 and xid % 819), skipped


def test_ids_wrap_around() -> None:
    assert xid_precedes(2**32 - 10, 5)
    assert not xid_precedes(5, 2**32 - 10)
    assert xid_precedes(1, 2**31 + 500), "permanent xids are older than all"
    last = 2**32 // 32768 - 1
    assert page_precedes(Slru.XACT, last, 0)
    assert not page_precedes(Slru.XACT, 0, last)
    assert not page_precedes(Slru.XACT, 7, 7)


def test_segments_go_only_when_all_of_them_is_older() -> None:
    assert not is_segment_obsolete(Slru.XACT, 0, 31)
    assert is_segment_obsolete(Slru.XACT, 0, 32)
    assert not is_segment_obsolete(Slru.XACT, 1, 32)
    assert member_segments(5, 5) == []
    assert member_segments(0, 3 * 1636 * 32) == [0, 1, 2]
    last = (2**32 - 1) // (1636 * 32)
    assert member_segments(2**32 - 1, 1636 * 32) == [last, 0]


@given(st.integers(1, 9), st.integers(0, 2**40), st.sampled_from([1 << 20, 1 << 24, 1 << 30]))
def test_segment_names_round_trip(timeline: int, number: int, size: int) -> None:
    number %= 2**64 // size
    name = segment_name(timeline, number, size)
    assert parse_segment_name(name, size) == (timeline, number)
    assert parse_segment_name(name + ".partial", size) is None
