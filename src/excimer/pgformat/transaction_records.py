"""What the records that end or prepare a transaction say, for PostgreSQL 14 to 18.

A commit or abort is a timestamp followed by the parts that a flag word announces, in this order::

    time 8 [flags 4] [database 8] [subxacts] [dropped relations] [dropped statistics, 15+]
    [cache invalidations] [prepared xid 4 [its name, NUL-terminated]] [origin LSN 8, time 8]

where the lists are a 32-bit count and its items. A PREPARE record is, but for a CRC at its end,
the file that PostgreSQL keeps in pg_twophase.
Source: src/include/access/xact.h, ParseCommitRecord, xl_xact_prepare.

Not here: what ending a transaction changes. Native twin: `_native/xact_parts.pyx`.
"""

import struct
from typing import NamedTuple

import google_crc32c

from excimer.base.keys import Relation
from excimer.pgformat.wal_record import DecodedRecord, MalformedRecordError

XACT_OPMASK = 0x70
XACT_COMMIT = 0x00
XACT_PREPARE = 0x10
XACT_ABORT = 0x20
XACT_COMMIT_PREPARED = 0x30
XACT_ABORT_PREPARED = 0x40
XACT_ASSIGNMENT = 0x50
XACT_INVALIDATIONS = 0x60
XACT_HAS_INFO = 0x80

HAS_DBINFO = 1 << 0
HAS_SUBXACTS = 1 << 1
HAS_RELATIONS = 1 << 2
HAS_INVALS = 1 << 3
HAS_TWOPHASE = 1 << 4
HAS_ORIGIN = 1 << 5
HAS_GID = 1 << 7
HAS_DROPPED_STATS = 1 << 8

_PREPARE_HEAD = struct.Struct("<IIIIqIi")
_PREPARE_SIZE_BYTES = {14: 64, 15: 72, 16: 72, 17: 72, 18: 72}
_PREPARE_NAME_SIZE_OFFSET = {14: 46, 15: 54, 16: 54, 17: 54, 18: 54}
_PREPARE_ORIGIN_OFFSET = {14: 48, 15: 56, 16: 56, 17: 56, 18: 56}


class TransactionEnd(NamedTuple):
    xid: int
    """The transaction that ends; of a prepared one not the xid that the record itself carries."""
    is_commit: bool
    is_prepared: bool
    time: int
    """TimestampTz: microseconds since 2000."""
    commit_time: int
    """What commit timestamps record: the replication origin's time if there is one."""
    origin: int
    """Of the record itself; 0 where the transaction does not come from elsewhere."""
    origin_lsn: int | None
    """End of the transaction at its replication origin; None where the record does not say."""
    subxacts: tuple[int, ...]
    relations: tuple[Relation, ...]


class Prepared(NamedTuple):
    xid: int
    origin_lsn: int
    """End of what was prepared at its replication origin; 0 if it comes from none."""
    subxacts: tuple[int, ...]
    state_file: bytes


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def take(self, size: int) -> bytes:
        if size > len(self._rest):
            raise MalformedRecordError("transaction record is shorter than it says")
        taken = bytes(self._rest[:size])
        self._rest = self._rest[size:]
        return taken

    def number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def array(self, item_bytes: int) -> bytes:
        return self.take(item_bytes * self.number("<I"))

    def text(self) -> bytes:
        end = bytes(self._rest).find(b"\0")
        return self.take(end + 1 if end >= 0 else len(self._rest) + 1)[:-1]


def decode_transaction_end(record: DecodedRecord, pg_version: int) -> TransactionEnd:
    """For the four commit and abort records. Raises `MalformedRecordError`."""
    cursor = _Cursor(record.main_data)
    operation = record.header.info & XACT_OPMASK
    xid = record.header.xid
    time = commit_time = cursor.number("<q")
    flags = cursor.number("<I") if record.header.info & XACT_HAS_INFO else 0
    subxacts = relations = b""
    origin_lsn: int | None = None
    if flags & HAS_DBINFO:
        cursor.take(8)
    if flags & HAS_SUBXACTS:
        subxacts = cursor.array(4)
    if flags & HAS_RELATIONS:
        relations = cursor.array(12)
    if flags & HAS_DROPPED_STATS:
        cursor.array(16 if pg_version >= 18 else 12)
    if flags & HAS_INVALS:
        cursor.array(16)
    if flags & HAS_TWOPHASE:
        xid = cursor.number("<I")
        if flags & HAS_GID:
            cursor.text()
    if flags & HAS_ORIGIN:
        origin_lsn = cursor.number("<Q")
        commit_time = cursor.number("<q")
    return TransactionEnd(
        xid,
        operation in (XACT_COMMIT, XACT_COMMIT_PREPARED),
        operation in (XACT_COMMIT_PREPARED, XACT_ABORT_PREPARED),
        time,
        commit_time,
        record.origin,
        origin_lsn,
        tuple(value for (value,) in struct.iter_unpack("<I", subxacts)),
        tuple(Relation(*fields) for fields in struct.iter_unpack("<III", relations)),
    )


def decode_prepare(main_data: bytes, pg_version: int) -> Prepared:
    """The xids and the state file of a PREPARE record. Raises `MalformedRecordError`."""
    header_bytes = _PREPARE_SIZE_BYTES[pg_version]
    if len(main_data) < header_bytes:
        raise MalformedRecordError("prepare record is shorter than its header")
    _, _, xid, _, _, _, count = _PREPARE_HEAD.unpack_from(main_data)
    (name_bytes,) = struct.unpack_from("<H", main_data, _PREPARE_NAME_SIZE_OFFSET[pg_version])
    (origin_lsn,) = struct.unpack_from("<Q", main_data, _PREPARE_ORIGIN_OFFSET[pg_version])
    start = header_bytes + (name_bytes + 7) // 8 * 8
    subxacts = main_data[start : start + 4 * count]
    if count < 0 or len(subxacts) != 4 * count:
        raise MalformedRecordError("prepare record is shorter than it says")
    crc = struct.pack("<I", google_crc32c.value(main_data))
    return Prepared(xid, origin_lsn, struct.unpack(f"<{count}I", subxacts), main_data + crc)
