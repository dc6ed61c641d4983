"""What other native modules use of `wal_scanner`: records one by one, without the GIL."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef struct RecordView:
    const uint8_t* data  # the record, or its header alone; valid until the next call
    uint32_t size
    bint is_whole  # all of it is there, not just the header
    bint was_taken  # a `RecordTaker` got what follows the header
    uint64_t start_lsn
    uint64_t end_lsn


cdef class RecordTaker:
    cdef bint begin(self, const uint8_t* header) noexcept nogil
    cdef void take(self, const uint8_t* part, uint32_t size) noexcept nogil


cdef class WalScanner:
    cdef uint64_t lsn  # of the next byte to consume
    cdef uint64_t record_start
    cdef readonly uint64_t last_record_start
    cdef readonly uint64_t last_record_end
    cdef readonly uint64_t record_count
    cdef uint64_t segment_size
    cdef uint16_t magic
    cdef bint checks_crc
    cdef bint keeps_records

    cdef const uint8_t* chunk
    cdef size_t chunk_size
    cdef size_t chunk_position

    cdef uint8_t[40] header
    cdef uint32_t header_fill

    cdef uint8_t* record  # what has come of a record that no single page of the chunk holds
    cdef size_t record_capacity
    cdef uint32_t record_fill
    cdef bint is_skimmed  # only the header is kept
    cdef RecordTaker taker  # or None
    cdef bint has_taker
    cdef bint is_taken  # the taker gets what is not kept
    cdef uint32_t record_crc  # of what was not kept
    cdef uint64_t skip_to  # end of the segment that a switch record closes, 0 without one

    cdef int error
    cdef uint64_t error_lsn
    cdef uint64_t error_found
    cdef uint64_t error_wanted
    cdef str error_text

    cdef bint take(self, const uint8_t* data, size_t size) noexcept nogil
    cdef void begin(self, const uint8_t* chunk, size_t size) noexcept nogil
    cdef int next_record(self, RecordView* view) noexcept nogil
    cdef int fail(self, int error, uint64_t lsn, uint64_t found, uint64_t wanted) noexcept nogil
    cdef uint32_t wanted_size(self) noexcept nogil
    cdef int take_part(self, const uint8_t* part, uint32_t size) noexcept nogil
    cdef bint is_long_for_nothing(self) noexcept nogil
    cdef int reserve(self, size_t size) noexcept nogil
    cdef int page_header(self) noexcept nogil
    cdef int check_page_header(self) noexcept nogil
    cdef int check_record(self, const uint8_t* data, uint32_t total) noexcept nogil
    cdef int finish(self, const uint8_t* data, uint32_t total, RecordView* view) noexcept nogil
    cdef void give_to(self, RecordTaker taker)
    cdef int raise_error(self) except -1
