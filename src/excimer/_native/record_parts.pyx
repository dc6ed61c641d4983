"""Takes one WAL record apart, without the GIL and without copying.

The definition is `excimer.pgformat.wal_record.decode_record`.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from excimer._native.little_endian cimport u16, u32

from excimer.pgformat.wal_record import MalformedRecordError

cdef enum:
    PAGE_SIZE = 8192
    HEADER_SIZE = 24
    BLOCK_ID_MAX = 32
    DATA_SHORT = 255
    DATA_LONG = 254
    ORIGIN = 253
    TOPLEVEL_XID = 252
    FORK_MASK = 0x0F
    HAS_IMAGE = 0x10
    HAS_DATA = 0x20
    WILL_INIT = 0x40
    SAME_RELATION = 0x80
    IMAGE_HAS_HOLE = 0x01


cdef int split_record(const uint8_t* data, uint32_t size, int pg_version, RecordParts* parts) noexcept nogil:
    """0, or -1 when the record's lengths do not add up. `data` has at least its header and `size` bytes."""
    cdef const uint8_t* at = data + HEADER_SIZE
    cdef const uint8_t* end = data + size
    cdef size_t data_size = 0
    cdef int index
    cdef uint8_t block_id
    parts.size = size
    parts.xid = u32(data + 4)
    parts.info = data[16]
    parts.rmgr = data[17]
    parts.origin = 0
    parts.toplevel_xid = 0
    parts.main_size = 0
    parts.block_count = 0
    while <size_t> (end - at) > data_size:
        block_id = at[0]
        if block_id == DATA_SHORT:
            if end - at < 2:
                return -1
            parts.main_size = at[1]
            data_size += parts.main_size
            at += 2
            break
        if block_id == DATA_LONG:
            if end - at < 5:
                return -1
            parts.main_size = u32(at + 1)
            data_size += parts.main_size
            at += 5
            break
        if block_id == ORIGIN:
            if end - at < 3:
                return -1
            parts.origin = u16(at + 1)
            at += 3
        elif block_id == TOPLEVEL_XID:
            if end - at < 5:
                return -1
            parts.toplevel_xid = u32(at + 1)
            at += 5
        elif block_id <= BLOCK_ID_MAX:
            at = split_block(at, end, pg_version, parts)
            if at == NULL:
                return -1
            data_size += parts.blocks[parts.block_count - 1].data_size
            data_size += parts.blocks[parts.block_count - 1].image_size
        else:
            return -1
    if <size_t> (end - at) != data_size:
        return -1
    for index in range(parts.block_count):
        parts.blocks[index].image = at
        at += parts.blocks[index].image_size
        parts.blocks[index].data = at
        at += parts.blocks[index].data_size
    parts.main_data = at
    return 0


cdef const uint8_t* split_block(
    const uint8_t* at, const uint8_t* end, int pg_version, RecordParts* parts
) noexcept nogil:
    """Reads one block header; where the next header starts, NULL when it is malformed."""
    cdef BlockPart* block = &parts.blocks[parts.block_count]
    cdef BlockPart* before = block - 1
    cdef uint8_t flags
    memset(block, 0, sizeof(BlockPart))
    if end - at < 4:
        return NULL
    block.block_id = at[0]
    if parts.block_count and block.block_id <= before.block_id:
        return NULL
    flags = at[1]
    block.fork = flags & FORK_MASK
    block.will_init = (flags & WILL_INIT) != 0
    block.data_size = u16(at + 2)
    if ((flags & HAS_DATA) != 0) != (block.data_size != 0):
        return NULL
    at += 4
    if flags & HAS_IMAGE:
        at = split_image(at, end, pg_version, block)
        if at == NULL:
            return NULL
    if flags & SAME_RELATION:
        if parts.block_count == 0:
            return NULL
        block.spc, block.db, block.rel = before.spc, before.db, before.rel
    else:
        if end - at < 12:
            return NULL
        block.spc, block.db, block.rel = u32(at), u32(at + 4), u32(at + 8)
        at += 12
    if end - at < 4:
        return NULL
    block.block = u32(at)
    parts.block_count += 1
    return at + 4


cdef const uint8_t* split_image(
    const uint8_t* at, const uint8_t* end, int pg_version, BlockPart* block
) noexcept nogil:
    cdef uint8_t info
    cdef int hole_size
    if end - at < 5:
        return NULL
    block.has_image = 1
    block.image_size = u16(at)
    block.hole_offset = u16(at + 2)
    info = at[4]
    at += 5
    if pg_version < 15:
        block.compression = 1 if info & 0x02 else 0
        block.is_applied = (info & 0x04) != 0
    else:
        block.is_applied = (info & 0x02) != 0
        if info & 0x1C == 0:
            block.compression = 0
        elif info & 0x1C == 0x04:
            block.compression = 1
        elif info & 0x1C == 0x08:
            block.compression = 2
        elif info & 0x1C == 0x10:
            block.compression = 3
        else:
            return NULL
    if block.compression == 0:
        hole_size = PAGE_SIZE - <int> block.image_size
    elif info & IMAGE_HAS_HOLE:
        if end - at < 2:
            return NULL
        hole_size = u16(at)
        at += 2
    else:
        hole_size = 0
    if hole_size < 0 or ((info & IMAGE_HAS_HOLE) != 0) != (hole_size > 0):
        return NULL
    if not info & IMAGE_HAS_HOLE and block.hole_offset:
        return NULL
    if block.image_size == 0 or block.image_size > PAGE_SIZE or block.hole_offset + hole_size > PAGE_SIZE:
        return NULL
    block.hole_size = <uint16_t> hole_size
    return at


def describe_record(bytes data, int pg_version):
    """(blocks, main data, origin, top xid), as `decode_record` has them. Raises `MalformedRecordError`."""
    cdef RecordParts parts
    cdef BlockPart* block
    cdef const uint8_t* record = <const uint8_t*> PyBytes_AS_STRING(data)
    if split_record(record, <uint32_t> PyBytes_GET_SIZE(data), pg_version, &parts) < 0:
        raise MalformedRecordError("record's length is not the sum of its parts")
    blocks = []
    for index in range(parts.block_count):
        block = &parts.blocks[index]
        image = None
        if block.has_image:
            image = (
                block.compression,
                block.hole_offset,
                block.hole_size,
                bool(block.is_applied),
                (<const char*> block.image)[: block.image_size],
            )
        place = (block.spc, block.db, block.rel), block.fork, block.block
        blocks.append(
            (
                block.block_id,
                *place,
                bool(block.will_init),
                image,
                (<const char*> block.data)[: block.data_size],
            )
        )
    main_data = (<const char*> parts.main_data)[: parts.main_size]
    return tuple(blocks), main_data, parts.origin, parts.toplevel_xid
