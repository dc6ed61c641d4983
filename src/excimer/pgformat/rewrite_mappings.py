"""Where rows of a catalog went when it was rewritten, for who decodes what was before: pg_logical/mappings.

PostgreSQL writes these files while VACUUM FULL or CLUSTER rewrites a catalog, and logs them, so that redo
makes them again. This reads the records and says what is in which file.

::

    0           4    8     12      16       24       28      32          40
    +-----------+----+-----+-------+--------+--------+-------+-----------+------------------------
    | mapped xid| db | rel | (pad) | offset | count  | (pad) | start LSN | count * 36 bytes
    +-----------+----+-----+-------+--------+--------+-------+-----------+------------------------

Source: xl_heap_rewrite_mapping and heap_xlog_logical_rewrite, rewriteheap.c, the same from 14 to 18.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, record_start
from excimer.pgformat.wal_reader import WalReader
from excimer.pgformat.wal_record import RECORD_HEADER_SIZE_BYTES, Rmgr, decode_record, unpack_record_header
from excimer.pgformat.wal_segment import InvalidWalError

_MAPPING: Final = struct.Struct("<IIIxxxxQIxxxxQ")
_ENTRY_BYTES: Final = 36
_KIND: Final = bytes((0x00, Rmgr.HEAP2))
"""The record's info and resource manager, which lie at a multiple of 8."""
_KIND_OFFSET: Final = 16
_RECORD_BYTES_MAX: Final = 1 << 20
"""PostgreSQL writes them by thousands of entries."""
_STEP_BYTES: Final = 64 << 10

ReadWal = Callable[[int, int], bytes]
"""So many bytes from an LSN on, or what there is of them."""


class MappingPart(NamedTuple):
    path: str
    offset: int
    data: bytes


def find_mappings(
    read: ReadWal, start_lsn: int, end_lsn: int, pg_version: int, segment_size: int
) -> Iterator[MappingPart]:
    """In the order in which they were written. `start_lsn`: a page. Blocks as `read` does.

    Nearly all WAL is only searched for two bytes, a gigabyte a second; what looks like such a record is read.
    """
    for page in range(start_lsn, end_lsn, _STEP_BYTES):
        data = read(page, min(_STEP_BYTES, end_lsn - page))
        at = data.find(_KIND)
        while at >= 0:
            if at % 8 == 0:
                part = _read_part(read, page + at, end_lsn, pg_version, segment_size)
                if part is not None:
                    yield part
            at = data.find(_KIND, at + 1)


def _read_part(
    read: ReadWal, kind_lsn: int, end_lsn: int, pg_version: int, segment_size: int
) -> MappingPart | None:
    """Of the record that has its kind there; None: there is no such record."""
    page = kind_lsn - kind_lsn % WAL_PAGE_SIZE_BYTES
    before = kind_lsn - record_start(page, segment_size)
    if before < 0:
        return None
    lsn = kind_lsn - _KIND_OFFSET if before >= _KIND_OFFSET else page - (_KIND_OFFSET - before)
    reader = WalReader(lsn, pg_version, segment_size)
    try:
        for position in range(lsn, min(lsn + _RECORD_BYTES_MAX, end_lsn), WAL_PAGE_SIZE_BYTES):
            records = reader.feed(read(position, min(WAL_PAGE_SIZE_BYTES, end_lsn - position)))
            if records:
                return _parse(records[0].data, pg_version)
    except InvalidWalError:
        pass
    return None


def _parse(record: bytes, pg_version: int) -> MappingPart | None:
    header = unpack_record_header(record)
    if (
        header.rmgr != Rmgr.HEAP2
        or header.info != 0
        or len(record) < RECORD_HEADER_SIZE_BYTES + _MAPPING.size
    ):
        return None
    data = decode_record(record, pg_version).main_data
    xid, database, relation, offset, count, lsn = _MAPPING.unpack_from(data)
    name = f"map-{database:x}-{relation:x}-{lsn >> 32:X}_{lsn & 0xFFFFFFFF:X}-{xid:x}-{header.xid:x}"
    end = _MAPPING.size + count * _ENTRY_BYTES
    return MappingPart(f"pg_logical/mappings/{name}", offset, bytes(data[_MAPPING.size : end]))
