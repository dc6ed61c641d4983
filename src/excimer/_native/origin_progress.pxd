"""What other native modules use of `origin_progress`."""

from libc.stdint cimport uint16_t, uint64_t


cdef struct Origin:
    uint16_t id
    uint64_t remote_lsn


cdef class OriginProgress:
    cdef Origin* origins
    cdef size_t count
    cdef size_t capacity

    cdef Origin* find(self, uint16_t origin) noexcept nogil
    cdef int advance(self, uint16_t origin, uint64_t remote_lsn) noexcept nogil
