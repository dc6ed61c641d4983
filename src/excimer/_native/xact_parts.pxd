"""What other native modules use of `xact_parts`."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from excimer._native.record_parts cimport RecordParts


cdef enum:  # operations of the transaction manager
    OPMASK = 0x70
    COMMIT = 0x00
    PREPARE = 0x10
    ABORT = 0x20
    COMMIT_PREPARED = 0x30
    ABORT_PREPARED = 0x40

cdef enum:  # what a commit or abort has, in `info` and in its flags
    HAS_INFO = 0x80
    HAS_DBINFO = 0x001
    HAS_SUBXACTS = 0x002
    HAS_RELATIONS = 0x004
    HAS_INVALS = 0x008
    HAS_TWOPHASE = 0x010
    HAS_ORIGIN = 0x020
    HAS_GID = 0x080
    HAS_DROPPED_STATS = 0x100


cdef struct XactParts:
    uint32_t xid  # that ends: of a prepared transaction the prepared one
    uint8_t is_commit
    uint8_t is_prepared
    uint16_t origin
    int64_t time
    int64_t commit_time  # what commit timestamps record: the origin's time if there is an origin
    uint8_t has_origin
    uint64_t origin_lsn  # end of the transaction at its origin
    uint32_t subxact_count
    const uint8_t* subxacts
    uint32_t relation_count
    const uint8_t* relations


cdef int split_xact(const RecordParts* record, int pg_version, XactParts* xact) noexcept nogil
