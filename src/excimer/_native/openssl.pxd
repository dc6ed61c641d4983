"""What `channel` uses of `openssl`, without the GIL."""

from libc.stdint cimport uint8_t, uint64_t


cdef class TlsContext:
    cdef void* context
    cdef readonly bint is_server
    cdef uint64_t records_per_key


cdef class TlsConnection:
    cdef void* ssl
    cdef void* incoming
    cdef void* outgoing
    cdef TlsContext context
    cdef uint64_t record_count  # written with the present key
    cdef bint is_failed

    cdef int take_input(self, bytes data) except -1
    cdef void feed(self, const uint8_t* data, size_t size) noexcept nogil
    cdef bint has_input(self) noexcept nogil
    cdef ssize_t read_some(self, uint8_t* buffer, size_t size) noexcept nogil
    cdef bint write_all(self, const uint8_t* data, size_t size) noexcept nogil
    cdef size_t take_some_output(self, uint8_t* buffer, size_t size) noexcept nogil
    cdef object failure(self)
