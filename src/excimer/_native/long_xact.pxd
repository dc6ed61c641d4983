"""What other native modules use of `long_xact`."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from excimer._native.change_set cimport ChangeSet
from excimer._native.wal_scanner cimport RecordTaker
from excimer._native.xact_parts cimport XactParts
from excimer._native.xid_set cimport XidSet


cdef class LongXact(RecordTaker):
    cdef int pg_version
    cdef uint32_t size_min
    cdef XactParts xact  # its relations are those below, and it has no subtransactions
    cdef bint is_prepare
    cdef XidSet xids  # of the subtransactions
    cdef uint32_t last_xid  # the last subtransaction in the order of the record
    cdef uint32_t newest_xid
    cdef uint32_t subxact_count
    cdef uint8_t* kept  # relations that are dropped, or a prepared transaction's state file
    cdef size_t kept_size
    cdef size_t kept_capacity
    cdef uint32_t state_file_crc
    cdef const char* failure
    cdef bint is_out_of_memory

    cdef uint8_t info
    cdef uint32_t rest  # bytes of the record that have not come
    cdef uint32_t main_size
    cdef uint32_t flags
    cdef int step
    cdef uint32_t item_size
    cdef uint64_t items_left
    cdef uint8_t[72] item
    cdef uint32_t item_fill

    cdef bint begin(self, const uint8_t* header) noexcept nogil
    cdef void take(self, const uint8_t* part, uint32_t size) noexcept nogil
    cdef uint32_t take_some(self, const uint8_t* part, uint32_t size) noexcept nogil
    cdef uint32_t skip_name(self, const uint8_t* part, uint32_t size) noexcept nogil
    cdef void use(self, const uint8_t* items, uint32_t count) noexcept nogil
    cdef void use_subxacts(self, const uint8_t* items, uint32_t count) noexcept nogil
    cdef void use_part_header(self, const uint8_t* item) noexcept nogil
    cdef void use_prepare_head(self, const uint8_t* item) noexcept nogil
    cdef void set_step(self, int step, uint32_t item_size, uint64_t count) noexcept nogil
    cdef void next_step(self) noexcept nogil
    cdef void keep(self, const uint8_t* part, size_t size) noexcept nogil
    cdef const char* finish(self) noexcept nogil
    cdef void forget(self) noexcept nogil
    cdef void collect(self, ChangeSet changes, bint with_commit_times) noexcept nogil
    cdef void put_pages(self, ChangeSet changes, bint with_commit_times) noexcept nogil
    cdef void put_prepared(self, ChangeSet changes) noexcept nogil
