"""What other native modules use of `record_parts`."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef enum:
    BLOCKS_MAX = 33


cdef struct BlockPart:
    uint8_t block_id
    uint8_t fork
    uint8_t will_init
    uint8_t has_image
    uint8_t is_applied
    uint8_t compression
    uint16_t hole_offset
    uint16_t hole_size
    uint16_t image_size
    uint16_t data_size
    uint32_t spc
    uint32_t db
    uint32_t rel
    uint32_t block
    const uint8_t* image
    const uint8_t* data


cdef struct RecordParts:
    uint32_t size
    uint32_t xid
    uint8_t info
    uint8_t rmgr
    uint16_t origin
    uint32_t toplevel_xid
    uint32_t main_size
    const uint8_t* main_data
    int block_count
    BlockPart[33] blocks


cdef int split_record(const uint8_t* data, uint32_t size, int pg_version, RecordParts* parts) noexcept nogil
