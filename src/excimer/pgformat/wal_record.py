"""One WAL record: its header, block references and main data, for PostgreSQL 14 to 18.

::

    0         4      8          16     17     18    20     24
    +---------+------+----------+------+------+-----+------+------------------+-----------+------+
    | tot_len | xid  | xl_prev  | info | rmid | pad | crc  | block and data   | images and| main |
    |         |      |          |      |      |     |      | headers          | block data| data |
    +---------+------+----------+------+------+-----+------+------------------+-----------+------+

The CRC-32C covers everything from byte 24, then bytes 0 to 19. Each block reference is
``u8 id, u8 flags and fork, u16 data length, [image header], [relation], u32 block``; ids 252 to 255
announce the top transaction, the replication origin and the main data, long or short.
Source: src/include/access/xlogrecord.h, DecodeXLogRecord.

Not here: where records lie in WAL pages (`wal_reader`), what they mean to a page store
(`excimer.pageserver.ingest`). Native twin: `_native/wal_decoder.pyx`.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

import google_crc32c

from excimer.base.keys import BLOCK_SIZE_BYTES, Relation
from excimer.base.lsn import Lsn

RECORD_HEADER_SIZE_BYTES = 24
RECORD_SIZE_BYTES_MAX = 0x3FFFFFFF
"""MaxAllocSize: no PostgreSQL of any version can read a longer one."""

BLOCK_ID_MAX = 32
BLOCK_ID_DATA_SHORT = 255
BLOCK_ID_DATA_LONG = 254
BLOCK_ID_ORIGIN = 253
BLOCK_ID_TOPLEVEL_XID = 252

FORK_MASK = 0x0F
HAS_IMAGE = 0x10
HAS_DATA = 0x20
WILL_INIT = 0x40
SAME_RELATION = 0x80

IMAGE_HAS_HOLE = 0x01

_HEADER = struct.Struct("<IIQBB2xI")
_BLOCK = struct.Struct("<BH")
_IMAGE = struct.Struct("<HHB")
_RELATION = struct.Struct("<III")


class Rmgr(IntEnum):
    """Resource managers: who knows how to redo a record. 128 and above are extensions'."""

    XLOG = 0
    XACT = 1
    SMGR = 2
    CLOG = 3
    DBASE = 4
    TBLSPC = 5
    MULTIXACT = 6
    RELMAP = 7
    STANDBY = 8
    HEAP2 = 9
    HEAP = 10
    BTREE = 11
    HASH = 12
    GIN = 13
    GIST = 14
    SEQ = 15
    SPGIST = 16
    BRIN = 17
    COMMIT_TS = 18
    REPLORIGIN = 19
    GENERIC = 20
    LOGICALMSG = 21


RMGR_CUSTOM_MIN = 128


class Compression(IntEnum):
    NONE = 0
    PGLZ = 1
    LZ4 = 2
    ZSTD = 3


class MalformedRecordError(ValueError):
    """A record with a right CRC whose inside contradicts itself; readers add the LSN."""


class RecordHeader(NamedTuple):
    total_bytes: int
    xid: int
    previous_lsn: int
    info: int
    rmgr: int
    crc: int


class BlockImage(NamedTuple):
    """A full-page image: the page without its hole, perhaps compressed."""

    compression: Compression
    hole_offset: int
    hole_bytes: int
    is_applied: bool
    """False for images that only serve wal_consistency_checking."""
    data: bytes


class BlockReference(NamedTuple):
    block_id: int
    relation: Relation
    fork: int
    block: int
    will_init: bool
    image: BlockImage | None
    data: bytes


class DecodedRecord(NamedTuple):
    header: RecordHeader
    blocks: tuple[BlockReference, ...]
    main_data: bytes
    origin: int
    toplevel_xid: int


class WalRecord(NamedTuple):
    """A record with its place. `end_lsn` is aligned to 8; a segment switch ends at its segment's end."""

    start_lsn: Lsn
    end_lsn: Lsn
    data: bytes


def unpack_record_header(data: bytes) -> RecordHeader:
    return RecordHeader(*_HEADER.unpack_from(data))


def record_crc(data: bytes) -> int:
    """CRC-32C of a whole record."""
    body_crc = google_crc32c.value(data[RECORD_HEADER_SIZE_BYTES:])
    return int(google_crc32c.extend(body_crc, data[:20]))


def image_compression(info: int, pg_version: int) -> Compression:
    """How bimg_info says that an image is compressed. Raises `MalformedRecordError` on contradictions."""
    if pg_version < 15:
        return Compression.PGLZ if info & 0x02 else Compression.NONE
    methods = {0x00: Compression.NONE, 0x04: Compression.PGLZ, 0x08: Compression.LZ4, 0x10: Compression.ZSTD}
    try:
        return methods[info & 0x1C]
    except KeyError:
        raise MalformedRecordError(f"image flags {info:#x} name two compressions") from None


def image_is_applied(info: int, pg_version: int) -> bool:
    return bool(info & (0x04 if pg_version < 15 else 0x02))


class _Cursor:
    """Reads headers from the front while counting the data that must follow them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = RECORD_HEADER_SIZE_BYTES
        self.data_bytes = 0

    def take(self, layout: struct.Struct) -> tuple[int, ...]:
        if self.position + layout.size > len(self.data):
            raise MalformedRecordError("record is shorter than its headers say")
        fields = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return fields

    @property
    def has_headers(self) -> bool:
        return len(self.data) - self.position > self.data_bytes


class _BlockHeader(NamedTuple):
    block_id: int
    flags: int
    data_bytes: int
    image: tuple[Compression, int, int, bool, int] | None
    relation: Relation
    block: int


_U8 = struct.Struct("<B")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")


def decode_record(data: bytes, pg_version: int) -> DecodedRecord:
    """Takes a record apart. Raises `MalformedRecordError` when its lengths do not add up."""
    header = unpack_record_header(data)
    cursor = _Cursor(data)
    blocks: list[_BlockHeader] = []
    origin = toplevel_xid = main_bytes = 0
    while cursor.has_headers:
        (block_id,) = cursor.take(_U8)
        if block_id in (BLOCK_ID_DATA_SHORT, BLOCK_ID_DATA_LONG):
            (main_bytes,) = cursor.take(_U8 if block_id == BLOCK_ID_DATA_SHORT else _U32)
            cursor.data_bytes += main_bytes
            break
        if block_id == BLOCK_ID_ORIGIN:
            (origin,) = cursor.take(_U16)
        elif block_id == BLOCK_ID_TOPLEVEL_XID:
            (toplevel_xid,) = cursor.take(_U32)
        elif block_id <= BLOCK_ID_MAX:
            blocks.append(_take_block_header(cursor, block_id, blocks, pg_version))
        else:
            raise MalformedRecordError(f"block id {block_id} is not valid")
    if len(data) - cursor.position != cursor.data_bytes:
        raise MalformedRecordError("record's length is not the sum of its parts")
    references, position = _place_data(data, cursor.position, blocks)
    return DecodedRecord(header, references, data[position : position + main_bytes], origin, toplevel_xid)


def _take_block_header(
    cursor: _Cursor, block_id: int, before: list[_BlockHeader], pg_version: int
) -> _BlockHeader:
    if before and block_id <= before[-1].block_id:
        raise MalformedRecordError(f"block id {block_id} is out of order")
    flags, data_bytes = cursor.take(_BLOCK)
    if bool(flags & HAS_DATA) != bool(data_bytes):
        raise MalformedRecordError("a block's data flag and data length contradict each other")
    cursor.data_bytes += data_bytes
    image = _take_image_header(cursor, pg_version) if flags & HAS_IMAGE else None
    if not flags & SAME_RELATION:
        relation = Relation(*cursor.take(_RELATION))
    elif before:
        relation = before[-1].relation
    else:
        raise MalformedRecordError("first block refers to a previous block's relation")
    (block,) = cursor.take(_U32)
    return _BlockHeader(block_id, flags, data_bytes, image, relation, block)


def _take_image_header(cursor: _Cursor, pg_version: int) -> tuple[Compression, int, int, bool, int]:
    image_bytes, hole_offset, info = cursor.take(_IMAGE)
    cursor.data_bytes += image_bytes
    compression = image_compression(info, pg_version)
    has_hole = bool(info & IMAGE_HAS_HOLE)
    if compression is Compression.NONE:
        hole_bytes = BLOCK_SIZE_BYTES - image_bytes
    else:
        hole_bytes = cursor.take(_U16)[0] if has_hole else 0
    if has_hole != (hole_bytes > 0) or (not has_hole and hole_offset):
        raise MalformedRecordError("an image's hole flag and hole contradict each other")
    if not 0 < image_bytes <= BLOCK_SIZE_BYTES or hole_offset + hole_bytes > BLOCK_SIZE_BYTES:
        raise MalformedRecordError("an image does not fit into a page")
    return compression, hole_offset, hole_bytes, image_is_applied(info, pg_version), image_bytes


def _place_data(
    data: bytes, position: int, blocks: list[_BlockHeader]
) -> tuple[tuple[BlockReference, ...], int]:
    references = []
    for block in blocks:
        image = None
        if block.image is not None:
            compression, hole_offset, hole_bytes, is_applied, size = block.image
            image = BlockImage(
                compression, hole_offset, hole_bytes, is_applied, data[position : position + size]
            )
            position += size
        references.append(
            BlockReference(
                block.block_id,
                block.relation,
                block.flags & FORK_MASK,
                block.block,
                bool(block.flags & WILL_INIT),
                image,
                data[position : position + block.data_bytes],
            )
        )
        position += block.data_bytes
    return tuple(references), position
