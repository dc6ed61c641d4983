"""The WAL prefix: for any record boundary, records that chain up to it and end exactly there."""

import struct

import google_crc32c
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, align_lsn, record_start
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.control_file import ClusterState, ControlFile, ControlFileError
from excimer.pgformat.wal_prefix import WalPrefix, build_wal_prefix, wal_segment_file_name
from tests.kit.control_files import CHECKPOINT, CONTROL, SEGMENT

FIRST = 3 * SEGMENT


def build(end_lsn: int, prev_lsn: int) -> WalPrefix:
    return build_wal_prefix(
        pg_version=18,
        template=CONTROL,
        checkpoint=CHECKPOINT,
        end_lsn=Lsn(end_lsn),
        prev_lsn=Lsn(prev_lsn),
        now_s=1_700_000_000,
    )


class Reader:
    """A second, independent reading of WAL bytes: reassembles records over page headers."""

    def __init__(self, prefix: WalPrefix) -> None:
        self.bytes: dict[int, int] = {}
        for lsn, data in prefix.chunks:
            for offset, byte in enumerate(data):
                self.bytes[lsn + offset] = byte

    def raw(self, lsn: int, size: int) -> bytes:
        return bytes(self.bytes[lsn + offset] for offset in range(size))

    def record(self, lsn: int) -> tuple[bytes, int]:
        """The record at `lsn` and its end, every page header on the way checked."""
        self.page_header(lsn - lsn % WAL_PAGE_SIZE_BYTES)
        self.page_header(lsn - lsn % SEGMENT)
        (total,) = struct.unpack("<I", self.raw(lsn, 4))
        record = bytearray()
        while len(record) < total:
            if lsn % WAL_PAGE_SIZE_BYTES == 0:
                assert self.page_header(lsn) == total - len(record)
                lsn = record_start(lsn, SEGMENT)
            record.append(self.bytes[lsn])
            lsn += 1
        header, body = bytes(record[:20]), bytes(record[24:])
        assert google_crc32c.value(body + header) == struct.unpack_from("<I", record, 20)[0]
        return bytes(record), align_lsn(lsn)

    def page_header(self, address: int) -> int:
        magic, info, timeline, found, remaining = struct.unpack("<HHIQI", self.raw(address, 20))
        assert (magic, timeline, found) == (0xD118, 1, address)
        assert bool(info & 2) == (address % SEGMENT == 0)
        assert bool(info & 1) == bool(remaining)
        return int(remaining)


def chain(prefix: WalPrefix) -> tuple[int, int, int]:
    """(start of the last record, its kind, its end), having checked the checkpoint before it."""
    reader = Reader(prefix)
    checkpoint, end = reader.record(prefix.checkpoint_lsn)
    assert CheckPoint.unpack(checkpoint[26:]).redo == prefix.checkpoint_lsn
    start = record_start(end, SEGMENT)
    record, end = reader.record(start)
    assert struct.unpack_from("<Q", record, 8)[0] == prefix.checkpoint_lsn
    return start, record[16], end


def is_record_start(lsn: int) -> bool:
    return lsn >= record_start(lsn - lsn % WAL_PAGE_SIZE_BYTES, SEGMENT)


STARTS = st.integers(FIRST // 8, (FIRST + 2 * SEGMENT) // 8).map(lambda n: n * 8).filter(is_record_start)


@given(STARTS, st.integers(24, 30_000))
def test_the_last_record_is_covered_exactly(prev_lsn: int, size: int) -> None:
    end_lsn = prev_lsn
    for _ in range(0, size, 8):
        end_lsn = record_start(end_lsn, SEGMENT) + 8
    start, kind, end = chain(build(end_lsn, prev_lsn))
    assert (start, kind) == (prev_lsn, 0x20)
    assert end == end_lsn


@given(STARTS)
def test_an_unknown_last_record_is_invented(start: int) -> None:
    end_lsn = start + 8
    assert chain(build(end_lsn, 0))[2] == end_lsn


def test_a_switch_record_reaches_to_the_end_of_its_segment() -> None:
    assert chain(build(FIRST + SEGMENT, FIRST + 4096))[:2] == (FIRST + 4096, 0x40)


@pytest.mark.parametrize("end_lsn", [FIRST + 4, FIRST + 8, FIRST + 8192 + 16])
def test_positions_inside_page_headers_are_refused(end_lsn: int) -> None:
    with pytest.raises(ValueError, match="cannot be the end of a WAL record"):
        build(end_lsn, 0)


def test_control_file_points_at_the_fake_checkpoint() -> None:
    prefix = build(FIRST + 4096, 0)
    control = ControlFile.unpack(prefix.control_file, 18)
    assert control.state is ClusterState.IN_PRODUCTION or control.state == ClusterState.IN_PRODUCTION
    assert control.checkpoint_lsn == control.checkpoint.redo == prefix.checkpoint_lsn
    assert msgspec.structs.replace(control.checkpoint, redo=0, time=0) == CHECKPOINT


@given(st.integers(0, 292 * 8 - 1))
def test_a_flipped_bit_of_the_control_file_is_found(bit: int) -> None:
    damaged = bytearray(CONTROL.pack())
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ControlFileError):
        ControlFile.unpack(bytes(damaged), 18)


def test_segment_names_are_postgresqls() -> None:
    assert wal_segment_file_name(0x1_2345_6789, 16 << 20) == "000000010000000100000023"
