"""Grows a `PackedBatch` (`excimer.storage.format.values`): entries and payloads, without the GIL.

Running out of memory is remembered and raised when the batch is taken, so that callers in the
middle of a record need not look.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove

from excimer._native.little_endian cimport put_u32, put_u64, u64
from excimer.base.keys import parse_key
from excimer.storage.format.values import PackedBatch

cdef enum:
    ENTRY_SIZE = 40
    INITIAL_SIZE = 1 << 16
    CAPACITY_KEPT = 32 << 20


cdef inline void put_big_endian(uint8_t* data, uint32_t value) noexcept nogil:
    data[0] = value >> 24
    data[1] = value >> 16 & 0xFF
    data[2] = value >> 8 & 0xFF
    data[3] = value & 0xFF


cdef class BatchBuilder:
    def __dealloc__(self):
        free(self.entries)
        free(self.data)

    @property
    def value_count(self):
        return self.entries_size // ENTRY_SIZE

    def add(self, bytes key, uint64_t lsn, uint8_t kind, bint starts_chain, bytes payload):
        """One value from Python."""
        cdef StorageKey packed
        cdef size_t offset = self.data_size
        cdef size_t size = PyBytes_GET_SIZE(payload)
        cdef uint8_t* place = self.add_data(size)
        fields = parse_key(key)
        packed.kind, packed.fork = fields.kind, fields.fork
        packed.spc, packed.db, packed.rel, packed.block = fields.spc, fields.db, fields.rel, fields.block
        if place != NULL:
            memcpy(place, PyBytes_AS_STRING(payload), size)
        self.add_entry(&packed, kind, STARTS_CHAIN if starts_chain else 0, lsn, offset, <uint32_t> size)

    def take(self):
        """The values of all whole records; those of a record under way stay for the next batch.

        Raises MemoryError if any value was lost.
        """
        cdef size_t at
        if self.is_out_of_memory:
            raise MemoryError("no memory for a batch of values")
        batch = PackedBatch(
            PyBytes_FromStringAndSize(<char*> self.entries, self.whole_entries_size),
            PyBytes_FromStringAndSize(<char*> self.data, self.whole_data_size),
        )
        self.entries_size -= self.whole_entries_size
        self.data_size -= self.whole_data_size
        if self.entries_size:
            memmove(self.entries, self.entries + self.whole_entries_size, self.entries_size)
        if self.data_size:
            memmove(self.data, self.data + self.whole_data_size, self.data_size)
        for at in range(32, self.entries_size, ENTRY_SIZE):
            put_u64(self.entries + at, u64(self.entries + at) - self.whole_data_size)
        self.whole_entries_size = 0
        self.whole_data_size = 0
        self.give_back()
        return batch

    cdef void give_back(self) noexcept nogil:
        """Memory that only a batch of extreme size needed."""
        if self.entries_capacity > CAPACITY_KEPT and self.entries_size == 0:
            free(self.entries)
            self.entries = NULL
            self.entries_capacity = 0
        if self.data_capacity > CAPACITY_KEPT and self.data_size == 0:
            free(self.data)
            self.data = NULL
            self.data_capacity = 0

    cdef void end_record(self) noexcept nogil:
        """All values so far belong to whole records."""
        self.whole_entries_size = self.entries_size
        self.whole_data_size = self.data_size

    cdef void add_entry(
        self, const StorageKey* key, uint8_t kind, uint8_t flags, uint64_t lsn, uint64_t offset, uint32_t size
    ) noexcept nogil:
        cdef size_t capacity
        cdef uint8_t* grown
        cdef uint8_t* entry
        if self.entries_size + ENTRY_SIZE > self.entries_capacity:
            capacity = 2 * self.entries_capacity if self.entries_capacity else INITIAL_SIZE
            grown = <uint8_t*> realloc(self.entries, capacity)
            if grown == NULL:
                self.is_out_of_memory = True
                return
            self.entries = grown
            self.entries_capacity = capacity
        entry = self.entries + self.entries_size
        self.entries_size += ENTRY_SIZE
        entry[0] = key.kind
        put_big_endian(entry + 1, key.spc)
        put_big_endian(entry + 5, key.db)
        put_big_endian(entry + 9, key.rel)
        entry[13] = key.fork
        put_big_endian(entry + 14, key.block)
        entry[18] = kind
        entry[19] = flags
        put_u32(entry + 20, size)
        put_u64(entry + 24, lsn)
        put_u64(entry + 32, offset)

    cdef uint8_t* add_data(self, size_t size) noexcept nogil:
        """Room for `size` bytes at `data_size` as it was; NULL when memory is out."""
        cdef size_t capacity
        cdef uint8_t* grown
        if self.data_size + size > self.data_capacity:
            capacity = 2 * (self.data_size + size)
            if capacity < INITIAL_SIZE:
                capacity = INITIAL_SIZE
            grown = <uint8_t*> realloc(self.data, capacity)
            if grown == NULL:
                self.is_out_of_memory = True
                return NULL
            self.data = grown
            self.data_capacity = capacity
        self.data_size += size
        return self.data + self.data_size - size
