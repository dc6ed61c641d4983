"""Small changes to a page that no resource manager's redo makes, and what each does to the page.

PostgreSQL's redo changes SLRU pages and visibility maps on the side, while it redoes records about
something else; ingest writes these changes down as NATIVE values, and the read path applies them
without a redo worker. All little-endian; every payload begins with ``u8 op``::

    CLOG_STATUS   u8 op, u8 status, u16 count, count x u16 index of the xid in its page
    OFFSETS       u8 op, u8 0, u16 count, count x (u16 entry, u16 0, u32 member offset)
    MEMBERS       u8 op, u8 0, u16 count, count x (u16 member in page, u8 status, u8 0, u32 xid)
    COMMIT_TIMES  u8 op, u8 0, u16 count, i64 time, u16 origin, count x u16 entry
    VM_SET        u8 op, u8 bits, u16 0, u32 heap block
    VM_CLEAR      u8 op, u8 sets LSN, u16 count, count x (u32 heap block, u8 bits, 3 zeros)
    VM_TRUNCATE   u8 op, u8 bit offset, u16 byte offset: clears all bits from there on
    CLOG_STATUS_SET   u8 op, u8 status, u16 count, 4096 bytes: a bit for each xid of the page, lowest first
    COMMIT_TIMES_SET  u8 op, u8 0, u16 count, i64 time, u16 origin, 103 bytes: a bit for each entry

A transaction of thousands of subtransactions writes the sets, which are shorter than a list of theirs; their
count is that of the bits that are set.

Pages come out byte for byte as PostgreSQL's redo leaves them; visibility map pages get the record's LSN
from VM_SET and, where the record refers to the map's page, from VM_CLEAR; SLRU pages have no LSN.
Sources: TransactionIdSetStatusBit, RecordNewMultiXact (as of the minor releases of 2025, which also
write the next multixact's offset), TransactionIdSetCommitTs, visibilitymap.c.

Not here: which records cause them (`_native/wal_decoder.pyx`). Native twin: `_native/native_apply.pyx`.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum

from excimer.base.errors import CorruptionError
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.pgformat.slru import (
    COMMIT_TIME_SIZE_BYTES,
    COMMIT_TIMES_PER_PAGE,
    MEMBER_GROUP_SIZE_BYTES,
    MEMBERS_PER_GROUP,
    MEMBERS_PER_PAGE,
    OFFSETS_PER_PAGE,
    XACTS_PER_PAGE,
)

PAGE_HEADER_SIZE_BYTES = 24
HEAP_BLOCKS_PER_VM_PAGE = (BLOCK_SIZE_BYTES - PAGE_HEADER_SIZE_BYTES) * 4
VM_ALL_VISIBLE = 0x01
VM_ALL_FROZEN = 0x02
VM_BITS = 0x03

_HEAD = struct.Struct("<BBH")
_OFFSET = struct.Struct("<HHI")
_MEMBER = struct.Struct("<HBxI")
_COMMIT_TIME = struct.Struct("<qH")
_XACT_SET_SIZE_BYTES = XACTS_PER_PAGE // 8
_COMMIT_TIME_SET_SIZE_BYTES = (COMMIT_TIMES_PER_PAGE + 7) // 8
_VM_CLEAR = struct.Struct("<IB3x")
_U32 = struct.Struct("<I")
_EMPTY_PAGE_HEADER = struct.Struct("<QHHHHHHI")
_LAYOUT_VERSION = 4


class NativeOp(IntEnum):
    CLOG_STATUS = 1
    OFFSETS = 2
    MEMBERS = 3
    COMMIT_TIMES = 4
    VM_SET = 5
    VM_CLEAR = 6
    VM_TRUNCATE = 7
    CLOG_STATUS_SET = 8
    COMMIT_TIMES_SET = 9


class XactStatus(IntEnum):
    IN_PROGRESS = 0
    COMMITTED = 1
    ABORTED = 2
    SUB_COMMITTED = 3


class InvalidNativeRecordError(CorruptionError):
    """A NATIVE value's bytes are not a record of this module."""


def encode_clog_status(status: XactStatus, xids: Sequence[int]) -> bytes:
    """For xids of one page."""
    indexes = [xid % XACTS_PER_PAGE for xid in xids]
    return struct.pack(f"<BBH{len(xids)}H", NativeOp.CLOG_STATUS, status, len(xids), *indexes)


def encode_clog_status_set(status: XactStatus, xids: Sequence[int]) -> bytes:
    """As `encode_clog_status`, with a bit for each xid of the page."""
    indexes = {xid % XACTS_PER_PAGE for xid in xids}
    return _HEAD.pack(NativeOp.CLOG_STATUS_SET, status, len(indexes)) + _pack_set(
        indexes, _XACT_SET_SIZE_BYTES
    )


def encode_offsets(entries: Sequence[tuple[int, int]]) -> bytes:
    """(multixact, its first member's offset) for multixacts of one page."""
    head = _HEAD.pack(NativeOp.OFFSETS, 0, len(entries))
    return head + b"".join(_OFFSET.pack(multi % OFFSETS_PER_PAGE, 0, offset) for multi, offset in entries)


def encode_members(members: Sequence[tuple[int, int, int]]) -> bytes:
    """(member offset, xid, status) for members of one page."""
    head = _HEAD.pack(NativeOp.MEMBERS, 0, len(members))
    return head + b"".join(
        _MEMBER.pack(offset % MEMBERS_PER_PAGE, status, xid) for offset, xid, status in members
    )


def encode_commit_times(time: int, origin: int, xids: Sequence[int]) -> bytes:
    """For xids of one page."""
    indexes = [xid % COMMIT_TIMES_PER_PAGE for xid in xids]
    head = _HEAD.pack(NativeOp.COMMIT_TIMES, 0, len(xids)) + _COMMIT_TIME.pack(time, origin)
    return head + struct.pack(f"<{len(xids)}H", *indexes)


def encode_commit_times_set(time: int, origin: int, xids: Sequence[int]) -> bytes:
    """As `encode_commit_times`, with a bit for each entry of the page."""
    indexes = {xid % COMMIT_TIMES_PER_PAGE for xid in xids}
    head = _HEAD.pack(NativeOp.COMMIT_TIMES_SET, 0, len(indexes)) + _COMMIT_TIME.pack(time, origin)
    return head + _pack_set(indexes, _COMMIT_TIME_SET_SIZE_BYTES)


def encode_vm_set(heap_block: int, bits: int) -> bytes:
    return _HEAD.pack(NativeOp.VM_SET, bits, 0) + _U32.pack(heap_block)


def encode_vm_clear(clears: Sequence[tuple[int, int]], *, sets_lsn: bool) -> bytes:
    """(heap block, bits to clear) for heap blocks of one map page."""
    return _HEAD.pack(NativeOp.VM_CLEAR, sets_lsn, len(clears)) + b"".join(
        _VM_CLEAR.pack(block, bits) for block, bits in clears
    )


def encode_vm_truncate(heap_blocks: int) -> bytes:
    """Clears what the map's page says of heap blocks at and beyond `heap_blocks`."""
    within = heap_blocks % HEAP_BLOCKS_PER_VM_PAGE
    return _HEAD.pack(NativeOp.VM_TRUNCATE, within % 4 * 2, within // 4)


def _pack_set(indexes: set[int], size_bytes: int) -> bytes:
    return sum(1 << index for index in indexes).to_bytes(size_bytes, "little")


def _unpack_set(bits: bytes, count: int, limit: int) -> list[int]:
    """Indexes of the bits that are set: `count` of them, all below `limit`."""
    indexes = [8 * at + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1]
    if len(indexes) != count:
        raise InvalidNativeRecordError(f"native record has a set of {len(indexes)} that says {count}")
    for index in indexes[-1:]:
        _check_place(index, limit)
    return indexes


def apply_native(page: bytearray, payload: bytes, lsn: int) -> None:
    """Changes an 8192-byte page in place; `lsn` is the end of the record behind the payload.

    Raises `InvalidNativeRecordError`, and then leaves the page as it was, when the payload is damaged.
    """
    if len(payload) < _HEAD.size or len(page) != BLOCK_SIZE_BYTES:
        raise InvalidNativeRecordError(f"native record of {len(payload)} bytes for a page of {len(page)}")
    op, small, count = _HEAD.unpack_from(payload)
    if op not in _APPLY:
        raise InvalidNativeRecordError(f"native record has unknown operation {op}")
    changed = bytearray(page)
    _APPLY[NativeOp(op)](changed, small, count, payload[_HEAD.size :], lsn)
    page[:] = changed


def _check_length(body: bytes, expected: int) -> None:
    if len(body) != expected:
        raise InvalidNativeRecordError(f"native record has {len(body)} bytes where {expected} belong")


def _check_place(place: int, limit: int) -> int:
    if place >= limit:
        raise InvalidNativeRecordError(f"native record means entry {place} of a page of {limit}")
    return place


def _apply_clog_status(page: bytearray, status: int, count: int, body: bytes, lsn: int) -> None:
    _check_length(body, 2 * count)
    for (index,) in struct.iter_unpack("<H", body):
        _set_status(page, _check_place(index, XACTS_PER_PAGE), status)


def _apply_clog_status_set(page: bytearray, status: int, count: int, body: bytes, lsn: int) -> None:
    _check_length(body, _XACT_SET_SIZE_BYTES)
    for index in _unpack_set(body, count, XACTS_PER_PAGE):
        _set_status(page, index, status)


def _set_status(page: bytearray, index: int, status: int) -> None:
    place, shift = index // 4, index % 4 * 2
    current = page[place] >> shift & 3
    if status != XactStatus.SUB_COMMITTED or current != XactStatus.COMMITTED:
        page[place] = page[place] & ~(3 << shift) | (status & 3) << shift


def _apply_offsets(page: bytearray, small: int, count: int, body: bytes, lsn: int) -> None:
    _check_length(body, _OFFSET.size * count)
    for entry, _, offset in _OFFSET.iter_unpack(body):
        _U32.pack_into(page, _check_place(entry, OFFSETS_PER_PAGE) * 4, offset)


def _apply_members(page: bytearray, small: int, count: int, body: bytes, lsn: int) -> None:
    _check_length(body, _MEMBER.size * count)
    for member, status, xid in _MEMBER.iter_unpack(body):
        group, slot = divmod(_check_place(member, MEMBERS_PER_PAGE), MEMBERS_PER_GROUP)
        place = group * MEMBER_GROUP_SIZE_BYTES
        _U32.pack_into(page, place + MEMBERS_PER_GROUP + slot * 4, xid)
        page[place + slot] = status


def _apply_commit_times(page: bytearray, small: int, count: int, body: bytes, lsn: int) -> None:
    _check_length(body, _COMMIT_TIME.size + 2 * count)
    time, origin = _COMMIT_TIME.unpack_from(body)
    for (entry,) in struct.iter_unpack("<H", body[_COMMIT_TIME.size :]):
        place = _check_place(entry, COMMIT_TIMES_PER_PAGE) * COMMIT_TIME_SIZE_BYTES
        _COMMIT_TIME.pack_into(page, place, time, origin)


def _apply_commit_times_set(page: bytearray, small: int, count: int, body: bytes, lsn: int) -> None:
    _check_length(body, _COMMIT_TIME.size + _COMMIT_TIME_SET_SIZE_BYTES)
    for entry in _unpack_set(body[_COMMIT_TIME.size :], count, COMMIT_TIMES_PER_PAGE):
        place = entry * COMMIT_TIME_SIZE_BYTES
        page[place : place + COMMIT_TIME_SIZE_BYTES] = body[: _COMMIT_TIME.size]


def _apply_vm_set(page: bytearray, bits: int, count: int, body: bytes, lsn: int) -> None:
    _check_length(body, _U32.size)
    (heap_block,) = _U32.unpack(body)
    _init_if_new(page)
    place, shift = _vm_place(heap_block)
    if (page[place] >> shift) & VM_BITS != bits:
        page[place] |= (bits & VM_BITS) << shift
        _set_lsn(page, lsn)


def _apply_vm_clear(page: bytearray, sets_lsn: int, count: int, body: bytes, lsn: int) -> None:
    _check_length(body, _VM_CLEAR.size * count)
    for heap_block, bits in _VM_CLEAR.iter_unpack(body):
        place, shift = _vm_place(heap_block)
        page[place] &= ~((bits & VM_BITS) << shift)
    if sets_lsn:
        _set_lsn(page, lsn)


def _apply_vm_truncate(page: bytearray, bit_offset: int, byte_offset: int, body: bytes, lsn: int) -> None:
    _check_length(body, 0)
    _check_place(bit_offset, 8)
    _init_if_new(page)
    place = PAGE_HEADER_SIZE_BYTES + _check_place(byte_offset, BLOCK_SIZE_BYTES - PAGE_HEADER_SIZE_BYTES)
    page[place] &= (1 << bit_offset) - 1
    page[place + 1 :] = bytes(BLOCK_SIZE_BYTES - place - 1)


def _set_lsn(page: bytearray, lsn: int) -> None:
    struct.pack_into("<II", page, 0, lsn >> 32, lsn & 0xFFFFFFFF)


def _init_if_new(page: bytearray) -> None:
    """PageInit, when pd_upper says that nobody has (PageIsNew)."""
    if page[14] or page[15]:
        return
    end = BLOCK_SIZE_BYTES
    page[:] = bytes(end)
    _EMPTY_PAGE_HEADER.pack_into(page, 0, 0, 0, 0, PAGE_HEADER_SIZE_BYTES, end, end, end | _LAYOUT_VERSION, 0)


def _vm_place(heap_block: int) -> tuple[int, int]:
    within = heap_block % HEAP_BLOCKS_PER_VM_PAGE
    return PAGE_HEADER_SIZE_BYTES + within // 4, within % 4 * 2


_APPLY = {
    NativeOp.CLOG_STATUS: _apply_clog_status,
    NativeOp.OFFSETS: _apply_offsets,
    NativeOp.MEMBERS: _apply_members,
    NativeOp.COMMIT_TIMES: _apply_commit_times,
    NativeOp.VM_SET: _apply_vm_set,
    NativeOp.VM_CLEAR: _apply_vm_clear,
    NativeOp.VM_TRUNCATE: _apply_vm_truncate,
    NativeOp.CLOG_STATUS_SET: _apply_clog_status_set,
    NativeOp.COMMIT_TIMES_SET: _apply_commit_times_set,
}
