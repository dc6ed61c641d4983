"""A value in words, for people who look into a page's history. Never raises on damaged bytes."""

import struct
from collections.abc import Mapping

from excimer.base.lsn import format_lsn
from excimer.pgformat.native_records import NativeOp, XactStatus
from excimer.pgformat.record_names import record_name
from excimer.pgformat.wal_record import RECORD_HEADER_SIZE_BYTES, Compression, unpack_record_header
from excimer.storage.format.values import Value, ValueKind

_U64 = struct.Struct("<Q")
_NATIVE_HEAD = struct.Struct("<BBH")
_IMAGE_HEAD = struct.Struct("<BBHH")

_NATIVE_COUNTS: Mapping[int, str] = {
    NativeOp.OFFSETS: "offsets of {count} multixacts",
    NativeOp.MEMBERS: "{count} multixact members",
    NativeOp.COMMIT_TIMES: "commit times of {count} transactions",
    NativeOp.COMMIT_TIMES_SET: "commit times of {count} transactions",
    NativeOp.VM_CLEAR: "visibility bits of {count} heap blocks cleared",
    NativeOp.VM_SET: "visibility bits of a heap block set",
    NativeOp.VM_TRUNCATE: "visibility map cut off",
}


def describe_value(value: Value, pg_version: int) -> str:
    """``Heap INSERT+INIT, xid 733, record at 0/16B3748``."""
    try:
        return _describe(value, pg_version)
    except (struct.error, ValueError, IndexError) as error:
        return f"{value.kind.name.lower()} that cannot be read: {error}"


def _describe(value: Value, pg_version: int) -> str:
    payload = value.payload
    match value.kind:
        case ValueKind.IMAGE:
            return "image of the whole page"
        case ValueKind.ZERO_PAGE:
            return "page of zeros"
        case ValueKind.TOMBSTONE:
            return "tombstone: the page does not exist from here on"
        case ValueKind.PAGE_IMAGE:
            compression, _, hole_offset, hole_size = _IMAGE_HEAD.unpack_from(payload)
            packed = "" if compression == Compression.NONE else f", {Compression(compression).name.lower()}"
            hole = f", hole of {hole_size} bytes at {hole_offset}" if hole_size else ""
            return f"full-page image{packed}{hole}"
        case ValueKind.NATIVE:
            return _describe_native(payload)
        case ValueKind.WAL_RECORD:
            (start_lsn,) = _U64.unpack_from(payload)
            if len(payload) < _U64.size + RECORD_HEADER_SIZE_BYTES:
                raise ValueError("the record is shorter than its header")
            header = unpack_record_header(payload[_U64.size :])
            name = record_name(header.rmgr, header.info, pg_version)
            return f"{name}, xid {header.xid}, record at {format_lsn(start_lsn)}"


def _describe_native(payload: bytes) -> str:
    operation, argument, count = _NATIVE_HEAD.unpack_from(payload)
    if operation in (NativeOp.CLOG_STATUS, NativeOp.CLOG_STATUS_SET):
        return f"{count} transactions {XactStatus(argument).name.lower().replace('_', ' ')}"
    return _NATIVE_COUNTS[NativeOp(operation)].format(count=count)
