"""What two good copies of one page may differ in: PostgreSQL changes it without a WAL record.

A page that a server has changed and the same page made by replaying its WAL agree in all but hints.
PostgreSQL says for each resource manager which bytes those are (its `rm_mask`, which
`wal_consistency_checking` uses); here each mask sets the same bytes to zero, so that two masked copies can be
compared byte by byte:

* of all: pd_lsn and pd_checksum, which whoever compares looks at by itself;
* hints of the header (prune xid, "page full", "has free lines", "all visible"), and the hole between
  pd_lower and pd_upper;
* heap: hint bits of tuples, command ids, the token of a speculative insertion, padding behind tuples;
* leaves of B-trees, GiST and hash indexes: that an item is known to be dead;
* B-tree, GiST, hash, BRIN: flags and numbers of their own;
* GIN, hash: everything on a page that is deleted or unused.

Beyond PostgreSQL's masks, because it compares a page only when a record touches it:

* SP-GiST's metapage: the cache of pages with room in it is written without a record;
* a sequence: values are logged ahead (`sequence_agrees`).

Not here: the visibility map, whose bits are all logged and whose header nobody keeps (`map_bits`); which LSNs
two copies may have (`excimer.verify`).

Source: bufmask.c, and heap_mask, btree_mask … of heapam_xlog.c, nbtxlog.c, hash_xlog.c, ginxlog.c,
gistxlog.c, spgxlog.c, brin_xlog.c, sequence.c, generic_xlog.c.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.pgformat.page_header import PAGE_HEADER_SIZE_BYTES, PageHeader
from excimer.pgformat.page_kinds import PageKind

_LSN_AND_CHECKSUM_BYTES: Final = 10
_FLAGS_OFFSET: Final = 10
_LOWER_OFFSET: Final = 12
_PRUNE_XID: Final = slice(20, 24)
_ALIGNMENT: Final = 8

_POINTER_SIZE_BYTES: Final = 4
_POINTER_FLAGS: Final = 3 << 15
_NORMAL: Final = 1

_XMIN_FROZEN: Final = 0x0300
_XMAX_HINTS: Final = 0x0C00
_ALL_HINTS: Final = 0xFFF0
_SPECULATIVE_TOKEN: Final = 0xFFFE
_CID_OFFSET, _CTID_OFFSET, _INFOMASK_OFFSET = 8, 12, 20
_TUPLE_HEAD_SIZE_BYTES: Final = 23

_BTREE_LEAF, _BTREE_SPLIT_END, _BTREE_HAS_GARBAGE = 0x01, 0x20, 0x40
_GIST_LEAF, _GIST_FOLLOW_RIGHT, _GIST_HAS_GARBAGE = 0x01, 0x08, 0x10
_HASH_OVERFLOW, _HASH_BUCKET, _HASH_TYPES, _HASH_HAS_DEAD = 0x01, 0x02, 0x0F, 0x80
_GIN_DELETED: Final = 0x04
_BRIN_META, _BRIN_REGULAR, _BRIN_EVACUATE = 0xF091, 0xF093, 0x01
_SPGIST_CACHE: Final = slice(28, 92)
"""Behind the magic number: eight pages, each with its room."""

_SEQUENCE_ROW: Final = struct.Struct("<qqB")


def masked_page(page: bytes, kind: PageKind, block: int) -> bytes:
    """A copy in which all is zero that may differ; the page itself where nothing may."""
    if kind is PageKind.NEW:
        return page
    if kind is PageKind.VISIBILITY_MAP:
        return bytes(PAGE_HEADER_SIZE_BYTES) + map_bits(page)
    copy = bytearray(page)
    copy[:_LSN_AND_CHECKSUM_BYTES] = bytes(_LSN_AND_CHECKSUM_BYTES)
    _MASKS[kind](copy, PageHeader.unpack(page), block)
    return bytes(copy)


def map_bits(page: bytes) -> bytes:
    """Of a visibility map's page: it may be all zeros or have a header before anybody sets a bit, and
    clearing bits stamps no LSN.
    """
    return page[PAGE_HEADER_SIZE_BYTES:]


class SequenceRow(NamedTuple):
    last_value: int
    log_cnt: int
    """How many values beyond `last_value` are logged already."""
    is_called: int


def sequence_row(page: bytes) -> SequenceRow | None:
    """None for a page without a row."""
    start = _sequence_start(page)
    return None if start is None else SequenceRow._make(_SEQUENCE_ROW.unpack_from(page, start))


def sequence_agrees(page: bytes, replayed: bytes) -> bool:
    """Whether a server's page of a sequence and the replayed one tell of one history.

    The record says the last value that may be handed out before the next record; the server's page says
    which was. So they are a whole number of increments apart, one for each value logged ahead.
    """
    ours, logged = sequence_row(page), sequence_row(replayed)
    if ours is None or logged is None:
        return ours == logged
    if ours == logged:
        return True
    distance = logged.last_value - ours.last_value
    is_ahead = logged.log_cnt == 0 < ours.log_cnt and distance != 0 and distance % ours.log_cnt == 0
    return is_ahead and ours.is_called == logged.is_called == 1


def _sequence_start(page: bytes) -> int | None:
    """Where the row's columns begin."""
    (pointer,) = struct.unpack_from("<I", page, PAGE_HEADER_SIZE_BYTES)
    start = pointer & 0x7FFF
    if pointer >> 15 & 3 != _NORMAL or start + _TUPLE_HEAD_SIZE_BYTES > BLOCK_SIZE_BYTES:
        return None
    start += page[start + _TUPLE_HEAD_SIZE_BYTES - 1]
    return start if start + _SEQUENCE_ROW.size <= BLOCK_SIZE_BYTES else None


def _mask_header_hints(page: bytearray) -> None:
    page[_FLAGS_OFFSET] &= ~0x07 & 0xFF
    page[_PRUNE_XID] = bytes(4)


def _mask_hole(page: bytearray, header: PageHeader) -> None:
    """Nothing of a page whose pointers are impossible: all of it is compared."""
    if PAGE_HEADER_SIZE_BYTES <= header.lower <= header.upper <= header.special <= BLOCK_SIZE_BYTES:
        page[header.lower : header.upper] = bytes(header.upper - header.lower)


def _mask_content(page: bytearray) -> None:
    """All but the header, and of that where the hole is."""
    page[PAGE_HEADER_SIZE_BYTES:] = bytes(BLOCK_SIZE_BYTES - PAGE_HEADER_SIZE_BYTES)
    page[_LOWER_OFFSET : _LOWER_OFFSET + 4] = bytes(4)


def _pointers(page: bytearray, header: PageHeader) -> tuple[int, ...]:
    count = max(min(header.lower, BLOCK_SIZE_BYTES) - PAGE_HEADER_SIZE_BYTES, 0) // _POINTER_SIZE_BYTES
    return struct.unpack_from(f"<{count}I", page, PAGE_HEADER_SIZE_BYTES)


def _mask_pointer_flags(page: bytearray, header: PageHeader) -> None:
    """That an item is dead is a hint in leaves."""
    kept = ~_POINTER_FLAGS & 0xFFFFFFFF
    pointers = [pointer & kept for pointer in _pointers(page, header)]
    struct.pack_into(f"<{len(pointers)}I", page, PAGE_HEADER_SIZE_BYTES, *pointers)


def _mask_heap(page: bytearray, header: PageHeader, block: int) -> None:
    _mask_header_hints(page)
    _mask_hole(page, header)
    for number, pointer in enumerate(_pointers(page, header), 1):
        start, flags, size = pointer & 0x7FFF, pointer >> 15 & 3, pointer >> 17
        if size == 0 or start + size > BLOCK_SIZE_BYTES:
            continue
        if flags == _NORMAL and size >= _TUPLE_HEAD_SIZE_BYTES:
            _mask_tuple(page, start, block, number)
        end = start + size
        padding = min(-size % _ALIGNMENT, BLOCK_SIZE_BYTES - end)
        page[end : end + padding] = bytes(padding)


def _mask_tuple(page: bytearray, start: int, block: int, number: int) -> None:
    at = start + _INFOMASK_OFFSET
    (infomask,) = struct.unpack_from("<H", page, at)
    hints = _XMAX_HINTS if infomask & _XMIN_FROZEN == _XMIN_FROZEN else _ALL_HINTS
    struct.pack_into("<H", page, at, infomask & ~hints)
    at = start + _CID_OFFSET
    page[at : at + 4] = bytes(4)
    at = start + _CTID_OFFSET
    if struct.unpack_from("<H", page, at + 4)[0] == _SPECULATIVE_TOKEN:
        struct.pack_into("<HHH", page, at, block >> 16, block & 0xFFFF, number)


def _mask_btree(page: bytearray, header: PageHeader, _block: int) -> None:
    _mask_header_hints(page)
    _mask_hole(page, header)
    at = header.special + 12
    flags, _cycle_id = struct.unpack_from("<HH", page, at)
    if flags & _BTREE_LEAF:
        _mask_pointer_flags(page, header)
    struct.pack_into("<HH", page, at, flags & ~(_BTREE_SPLIT_END | _BTREE_HAS_GARBAGE), 0)


def _mask_hash(page: bytearray, header: PageHeader, _block: int) -> None:
    _mask_header_hints(page)
    _mask_hole(page, header)
    at = header.special + 12
    (flags,) = struct.unpack_from("<H", page, at)
    if not flags & _HASH_TYPES:
        _mask_content(page)
        return
    if flags & _HASH_TYPES in (_HASH_OVERFLOW, _HASH_BUCKET):
        _mask_pointer_flags(page, header)
    struct.pack_into("<H", page, at, flags & ~_HASH_HAS_DEAD)


def _mask_gin(page: bytearray, header: PageHeader, _block: int) -> None:
    _mask_header_hints(page)
    (flags,) = struct.unpack_from("<H", page, header.special + 6)
    if flags & _GIN_DELETED:
        _mask_content(page)
    elif header.lower > PAGE_HEADER_SIZE_BYTES:
        _mask_hole(page, header)


def _mask_gist(page: bytearray, header: PageHeader, _block: int) -> None:
    _mask_header_hints(page)
    _mask_hole(page, header)
    page[header.special : header.special + 8] = bytes(8)  # the node's sequence number is an LSN
    at = header.special + 12
    (flags,) = struct.unpack_from("<H", page, at)
    if flags & _GIST_LEAF:
        _mask_pointer_flags(page, header)
    struct.pack_into("<H", page, at, (flags | _GIST_FOLLOW_RIGHT) & ~_GIST_HAS_GARBAGE)


def _mask_spgist(page: bytearray, header: PageHeader, block: int) -> None:
    _mask_header_hints(page)
    _mask_hole(page, header)
    if block == 0:
        page[_SPGIST_CACHE] = bytes(64)


def _mask_brin(page: bytearray, header: PageHeader, _block: int) -> None:
    _mask_header_hints(page)
    at = header.special + 4
    flags, kind = struct.unpack_from("<HH", page, at)
    if kind == _BRIN_REGULAR or (kind == _BRIN_META and header.lower > PAGE_HEADER_SIZE_BYTES):
        _mask_hole(page, header)
    struct.pack_into("<H", page, at, flags & ~_BRIN_EVACUATE)


def _mask_sequence(page: bytearray, header: PageHeader, _block: int) -> None:
    _mask_hole(page, header)
    start = _sequence_start(bytes(page))
    if start is not None:
        page[start : start + _SEQUENCE_ROW.size] = bytes(_SEQUENCE_ROW.size)


def _mask_generic(page: bytearray, header: PageHeader, _block: int) -> None:
    _mask_hole(page, header)


_MASKS: Final[Mapping[PageKind, Callable[[bytearray, PageHeader, int], None]]] = {
    PageKind.HEAP: _mask_heap,
    PageKind.BTREE: _mask_btree,
    PageKind.HASH: _mask_hash,
    PageKind.GIN: _mask_gin,
    PageKind.GIST: _mask_gist,
    PageKind.SPGIST: _mask_spgist,
    PageKind.BRIN: _mask_brin,
    PageKind.SEQUENCE: _mask_sequence,
    PageKind.GENERIC: _mask_generic,
}
