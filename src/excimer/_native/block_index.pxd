"""Shared declarations of `block_index.pyx`, for native code that walks layers."""

cdef class BlockIndex:
    cdef readonly bytes raw
    cdef readonly int count
    cdef const unsigned char* entries

    cdef int first_at_or_above(self, const unsigned char* key) noexcept nogil
    cdef bint offers(
        self, int number, unsigned long long low_lsn, unsigned long long high_lsn
    ) noexcept nogil
