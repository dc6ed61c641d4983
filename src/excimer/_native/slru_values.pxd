"""What other native modules use of `slru_values`."""

from libc.stdint cimport uint8_t, uint32_t

from excimer._native.change_set cimport ChangeSet, Touch
from excimer._native.little_endian cimport u32
from excimer._native.xact_parts cimport XactParts

cdef enum:
    XACTS_PER_PAGE = 32768
    OFFSETS_PER_PAGE = 2048
    MEMBERS_PER_PAGE = 1636
    COMMIT_TIMES_PER_PAGE = 819

cdef void put_xact_page(ChangeSet changes, const Touch* touch, const XactParts* xact) noexcept nogil
cdef void put_multixact(ChangeSet changes, const Touch* touch, const uint8_t* main_data) noexcept nogil


cdef inline uint32_t xact_id(const XactParts* xact, uint32_t index) noexcept nogil:
    """The `index`-th xid that a commit or abort ends: the transaction's, then its subtransactions'."""
    return xact.xid if index == 0 else u32(xact.subxacts + 4 * (index - 1))


cdef inline uint32_t next_multi(uint32_t multi) noexcept nogil:
    return 1 if multi == 0xFFFFFFFFu else multi + 1
