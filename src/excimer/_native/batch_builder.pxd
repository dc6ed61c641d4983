"""What other native modules use of `batch_builder`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    VALUE_IMAGE = 1
    VALUE_WAL_RECORD = 2
    VALUE_NATIVE = 3
    VALUE_TOMBSTONE = 4
    VALUE_ZERO_PAGE = 5
    VALUE_PAGE_IMAGE = 6
    STARTS_CHAIN = 1


cdef struct StorageKey:
    uint8_t kind
    uint8_t fork
    uint32_t spc
    uint32_t db
    uint32_t rel
    uint32_t block


cdef class BatchBuilder:
    cdef uint8_t* entries
    cdef size_t entries_size
    cdef size_t entries_capacity
    cdef uint8_t* data
    cdef size_t data_size
    cdef size_t data_capacity
    cdef size_t whole_entries_size  # of records that are whole
    cdef size_t whole_data_size
    cdef bint is_out_of_memory

    cdef void add_entry(
        self, const StorageKey* key, uint8_t kind, uint8_t flags, uint64_t lsn, uint64_t offset, uint32_t size
    ) noexcept nogil
    cdef void end_record(self) noexcept nogil
    cdef void give_back(self) noexcept nogil
    cdef uint8_t* add_data(self, size_t size) noexcept nogil
