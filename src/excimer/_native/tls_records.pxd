"""What `openssl` uses of `tls_records`, without the GIL."""

from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    IV_SIZE = 12


cdef struct Direction:
    void* cipher
    uint8_t[IV_SIZE] iv
    uint64_t sequence


cdef struct Buffer:  # of which [begin, end) is used
    uint8_t* data
    size_t begin
    size_t end
    size_t capacity


cdef const char* find_ciphers(const char* path)


cdef class TlsRecords:
    cdef Direction reading
    cdef Direction writing
    cdef object suite
    cdef object read_secret
    cdef object write_secret
    cdef bint is_client
    cdef size_t record_size_max
    cdef uint64_t records_per_key
    cdef Buffer input
    cdef Buffer output
    cdef uint8_t* plain  # a record that its reader has no room for
    cdef size_t plain_begin
    cdef size_t plain_end
    cdef object message  # of the handshake, as far as it has come
    cdef bint has_part
    cdef bint is_ended
    cdef const char* problem
    cdef int alert  # of the peer, that was the problem

    cdef void feed(self, const uint8_t* data, size_t size) noexcept nogil
    cdef bint has_input(self) noexcept nogil
    cdef ssize_t read_some(self, uint8_t* buffer, size_t size) noexcept nogil
    cdef bint write_all(self, const uint8_t* data, size_t size) noexcept nogil
    cdef void put_output(self, const uint8_t* data, size_t size) noexcept nogil
    cdef size_t take_some_output(self, uint8_t* buffer, size_t size) noexcept nogil
    cdef object failure(self)
    cdef size_t whole_record(self) noexcept nogil
    cdef ssize_t open_record(self, size_t length, uint8_t* target, uint8_t* kind) noexcept nogil
    cdef bint seal(self, uint8_t kind, const uint8_t* content, size_t size) noexcept nogil
    cdef void fail(self, int alert, const char* problem) noexcept nogil
    cdef bint take_other(self, uint8_t kind, const uint8_t* content, size_t size) noexcept with gil
    cdef int take_message(self, bytes message) except -1
    cdef bint renew_writing(self) noexcept with gil
