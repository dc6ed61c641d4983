"""What `channel` and `commit_path` use of `openssl`, without the GIL."""

from libc.stdint cimport uint8_t

from excimer._native.tls_records cimport TlsRecords

cdef enum:
    SECRET_SIZE_MAX = 48


cdef struct TrafficSecret:
    uint8_t[SECRET_SIZE_MAX] data
    size_t size


cdef struct TrafficSecrets:
    TrafficSecret client
    TrafficSecret server


cdef class TlsContext:
    cdef void* context
    cdef readonly bint is_server
    cdef object records_per_key


cdef class TlsConnection:
    cdef void* ssl  # for the handshake; then NULL, with its two BIOs
    cdef void* incoming
    cdef void* outgoing
    cdef TlsContext context
    cdef TrafficSecrets secrets  # between the handshake's end and the first record
    cdef TlsRecords records
    cdef bint is_ready

    cdef void feed(self, const uint8_t* data, size_t size) noexcept nogil
    cdef bint has_input(self) noexcept nogil
    cdef ssize_t read_some(self, uint8_t* buffer, size_t size) noexcept nogil
    cdef bint write_all(self, const uint8_t* data, size_t size) noexcept nogil
    cdef size_t take_some_output(self, uint8_t* buffer, size_t size) noexcept nogil
    cdef object failure(self)
