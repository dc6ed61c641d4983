"""Takes commit and abort records apart, without the GIL.

The definition is `excimer.pgformat.transaction_records.decode_transaction_end`.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t

from excimer._native.little_endian cimport u32, u64
from excimer._native.record_parts cimport RecordParts, split_record

from excimer.pgformat.wal_record import MalformedRecordError

cdef enum:
    RELATION_SIZE = 12
    INVAL_SIZE = 16


cdef struct Cursor:
    const uint8_t* at
    const uint8_t* end
    bint is_short


cdef const uint8_t* take(Cursor* cursor, size_t size) noexcept nogil:
    cdef const uint8_t* taken = cursor.at
    if <size_t> (cursor.end - cursor.at) < size:
        cursor.is_short = True
        return NULL
    cursor.at += size
    return taken


cdef const uint8_t* take_array(Cursor* cursor, size_t item_size, uint32_t* count) noexcept nogil:
    """A 32-bit count, then as many items."""
    cdef const uint8_t* head = take(cursor, 4)
    if head == NULL:
        return NULL
    count[0] = u32(head)
    return take(cursor, item_size * count[0])


cdef int split_xact(const RecordParts* record, int pg_version, XactParts* xact) noexcept nogil:
    """0, or -1 when the record is shorter than it says."""
    cdef Cursor cursor
    cdef uint32_t flags = 0
    cdef uint32_t ignored
    cdef const uint8_t* part
    cdef uint8_t operation = record.info & OPMASK
    cursor.at = record.main_data
    cursor.end = record.main_data + record.main_size
    cursor.is_short = False
    xact.xid = record.xid
    xact.is_commit = operation == COMMIT or operation == COMMIT_PREPARED
    xact.is_prepared = operation == COMMIT_PREPARED or operation == ABORT_PREPARED
    xact.origin = record.origin
    xact.has_origin = 0
    xact.origin_lsn = 0
    xact.subxact_count = 0
    xact.relation_count = 0
    part = take(&cursor, 8)
    if part != NULL:
        xact.time = <int64_t> u64(part)
        xact.commit_time = xact.time
    if record.info & HAS_INFO:
        part = take(&cursor, 4)
        if part != NULL:
            flags = u32(part)
    if flags & HAS_DBINFO:
        take(&cursor, 8)
    if flags & HAS_SUBXACTS:
        xact.subxacts = take_array(&cursor, 4, &xact.subxact_count)
    if flags & HAS_RELATIONS:
        xact.relations = take_array(&cursor, RELATION_SIZE, &xact.relation_count)
    if flags & HAS_DROPPED_STATS:
        take_array(&cursor, 16 if pg_version >= 18 else 12, &ignored)
    if flags & HAS_INVALS:
        take_array(&cursor, INVAL_SIZE, &ignored)
    if flags & HAS_TWOPHASE:
        part = take(&cursor, 4)
        if part != NULL:
            xact.xid = u32(part)
        if flags & HAS_GID:
            while cursor.at < cursor.end and cursor.at[0]:
                cursor.at += 1
            take(&cursor, 1)
    if flags & HAS_ORIGIN:
        part = take(&cursor, 16)
        if part != NULL:
            xact.has_origin = 1
            xact.origin_lsn = u64(part)
            xact.commit_time = <int64_t> u64(part + 8)
    return -1 if cursor.is_short else 0


def describe_transaction_end(bytes data, int pg_version):
    """For comparing with `decode_transaction_end`. Raises `MalformedRecordError`."""
    cdef RecordParts parts
    cdef XactParts xact
    cdef uint32_t index
    cdef const uint8_t* part
    cdef const uint8_t* record = <const uint8_t*> PyBytes_AS_STRING(data)
    if split_record(record, <uint32_t> PyBytes_GET_SIZE(data), pg_version, &parts) < 0:
        raise MalformedRecordError("record's length is not the sum of its parts")
    if split_xact(&parts, pg_version, &xact) < 0:
        raise MalformedRecordError("transaction record is shorter than it says")
    subxacts, relations = [], []
    for index in range(xact.subxact_count):
        subxacts.append(u32(xact.subxacts + 4 * index))
    for index in range(xact.relation_count):
        part = xact.relations + RELATION_SIZE * index
        relations.append((u32(part), u32(part + 4), u32(part + 8)))
    return (
        xact.xid,
        bool(xact.is_commit),
        bool(xact.is_prepared),
        xact.time,
        xact.commit_time,
        xact.origin,
        xact.origin_lsn if xact.has_origin else None,
        tuple(subxacts),
        tuple(relations),
    )
