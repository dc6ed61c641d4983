"""Databases coming and going.

CREATE DATABASE logs one of two things: that it made an empty directory and will log every page
(WAL_LOG, from 15 on), or that it copied another database's files as they were at that moment (FILE_COPY).
A copy is made of pages at the LSN before the record, since records in the original's history name
the original's relations and cannot be replayed onto the copy's.

Memory: a copy is one batch, as large as the database's non-zero pages, because a batch in
between would leave the timeline's last LSN inside a record.

Not here: the pages that WAL_LOG logs; they are records like any other.
"""

import struct
from typing import TYPE_CHECKING

from excimer.base.keys import BLOCK_SIZE_BYTES, KeyFields, KeyKind, make_key, parse_key
from excimer.base.lsn import Lsn
from excimer.pgformat.wal_record import DecodedRecord, WalRecord
from excimer.storage.format.relation_size import size_blocks
from excimer.storage.format.values import ValueKind

if TYPE_CHECKING:
    from excimer.pageserver.ingest import WalIngest

INFO_MASK = 0xF0
CREATE_FILE_COPY = 0x00
READ_BLOCKS = 128
"""Blocks read at once while a database is copied."""

_FILE_COPY = struct.Struct("<IIII")
_WAL_LOG = struct.Struct("<II")
_DROP = struct.Struct("<Ii")
_ZERO_PAGE = bytes(BLOCK_SIZE_BYTES)


def apply_database_record(ingest: "WalIngest", record: WalRecord, decoded: DecodedRecord) -> bool:
    """False: there is no such record."""
    info = decoded.header.info & INFO_MASK
    create_wal_log, drop = (None, 0x10) if ingest.timeline.pg_version < 15 else (0x10, 0x20)
    if info == CREATE_FILE_COPY:
        db, spc, source_db, source_spc = _FILE_COPY.unpack_from(decoded.main_data)
        _copy_database(ingest, record.end_lsn, (source_spc, source_db), (spc, db))
    elif info == create_wal_log:
        db, spc = _WAL_LOG.unpack_from(decoded.main_data)
        _create_database(ingest, record.end_lsn, spc, db)
    elif info == drop:
        db, count = _DROP.unpack_from(decoded.main_data)
        for (spc,) in struct.iter_unpack("<I", decoded.main_data[_DROP.size : _DROP.size + 4 * count]):
            _drop_database(ingest, record.end_lsn, spc, db)
    else:
        return False
    return True


def _create_database(ingest: "WalIngest", lsn: Lsn, spc: int, db: int) -> None:
    content = f"{ingest.timeline.pg_version}\n".encode()
    ingest.put_value(make_key(KeyKind.DATABASE, spc, db), lsn, ValueKind.IMAGE, content)


def _copy_database(ingest: "WalIngest", lsn: Lsn, source: tuple[int, int], target: tuple[int, int]) -> None:
    ingest.put()
    timeline = ingest.timeline
    for kind in (KeyKind.DATABASE, KeyKind.RELATION_MAP):
        value = timeline.get_value(make_key(kind, *source), timeline.last_record_lsn)
        if value is not None:
            ingest.put_value(make_key(kind, *target), lsn, ValueKind.IMAGE, value)
    for key, value in _size_keys(ingest, *source):
        fields = parse_key(key)
        size = size_blocks(value)
        ingest.put_size(_moved(fields, target), lsn, size)
        for block in range(0, size, READ_BLOCKS):
            _copy_blocks(ingest, lsn, fields, target, block, min(size - block, READ_BLOCKS))


def _copy_blocks(
    ingest: "WalIngest", lsn: Lsn, fields: KeyFields, target: tuple[int, int], start: int, count: int
) -> None:
    first = fields._replace(kind=KeyKind.RELATION_BLOCK, block=start)
    pages = ingest.read_pages(make_key(*first), count, ingest.timeline.last_record_lsn)
    for index in range(count):
        page = pages[index * BLOCK_SIZE_BYTES : (index + 1) * BLOCK_SIZE_BYTES]
        key = _moved(first._replace(block=start + index), target)
        if page != _ZERO_PAGE:  # a block without a value is one
            ingest.put_value(key, lsn, ValueKind.IMAGE, page)


def _drop_database(ingest: "WalIngest", lsn: Lsn, spc: int, db: int) -> None:
    ingest.put()
    for key, _ in _size_keys(ingest, spc, db):
        ingest.put_size(key, lsn, None)
    for kind in (KeyKind.DATABASE, KeyKind.RELATION_MAP):
        ingest.put_value(make_key(kind, spc, db), lsn, ValueKind.TOMBSTONE)


def _size_keys(ingest: "WalIngest", spc: int, db: int) -> list[tuple[bytes, bytes]]:
    start = make_key(KeyKind.RELATION_SIZE, spc, db)
    end = make_key(KeyKind.RELATION_SIZE, spc, db, 0xFFFFFFFF, 0xFF, 0xFFFFFFFF)
    return ingest.timeline.scan(start, end, ingest.timeline.last_record_lsn)


def _moved(fields: KeyFields, target: tuple[int, int]) -> bytes:
    spc, db = target
    return make_key(*fields._replace(spc=spc, db=db))
