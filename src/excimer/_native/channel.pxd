"""What `append_path` uses of `channel`, without the GIL."""

from libc.stdint cimport uint8_t

from excimer._native.native_lock cimport NativeLock


cdef class Channel:
    cdef int fd
    cdef NativeLock lock
    cdef object error

    cdef ssize_t receive(self, uint8_t* buffer, size_t size) noexcept nogil
    cdef bint send(self, const uint8_t* data, size_t size) noexcept nogil
    cdef object take_error(self)
    cdef void remember(self, int error_number) noexcept nogil
    cdef ssize_t receive_raw(self, uint8_t* buffer, size_t size) noexcept nogil
    cdef bint send_raw(self, const uint8_t* data, size_t size) noexcept nogil
