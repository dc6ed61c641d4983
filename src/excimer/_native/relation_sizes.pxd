"""What other native modules use of `relation_sizes`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef struct SizeKey:
    uint32_t spc
    uint32_t db
    uint32_t rel
    uint8_t kind  # of the size's storage key: RELATION_SIZE or SLRU_SIZE
    uint8_t fork


cdef struct SizeSlot:
    SizeKey key
    uint64_t born_lsn  # of relations: storage.format.relation_size
    uint64_t truncated_lsn
    uint32_t blocks
    uint8_t is_used
    uint8_t exists


cdef class RelationSizes:
    cdef SizeSlot* slots
    cdef size_t slot_count  # a power of two
    cdef readonly size_t count

    cdef SizeSlot* find(self, const SizeKey* key) noexcept nogil
    cdef SizeSlot* insert(self, const SizeKey* key) noexcept nogil
    cdef int grow(self) noexcept nogil
