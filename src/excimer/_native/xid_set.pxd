"""What other native modules use of `xid_set`."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t

from excimer._native.change_set cimport ChangeSet


cdef struct XidPage:
    uint8_t* data  # positions in ascending order, or a bit for each xid
    uint16_t count
    uint16_t capacity  # of positions
    uint8_t is_bitmap


cdef struct CommitTimes:
    int64_t time
    uint16_t origin


cdef class XidSet:
    cdef XidPage* pages
    cdef bint is_out_of_memory

    cdef void clear(self) noexcept nogil
    cdef void add(self, uint32_t xid) noexcept nogil
    cdef int make_room(self, XidPage* page) noexcept nogil
    cdef int become_bitmap(self, XidPage* page) noexcept nogil
    cdef void touch(self, ChangeSet changes, bint with_commit_times) noexcept nogil
    cdef void put_status(self, ChangeSet changes, uint8_t status) noexcept nogil
    cdef void put_commit_times(self, ChangeSet changes, const CommitTimes* said) noexcept nogil
