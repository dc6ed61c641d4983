"""Sizes in blocks of relation forks and SLRU segments, as ingest knows them: an open-addressed hash table.

Three answers: a size, "does not exist", and "unknown here, ask the timeline". The keys are those
of `excimer.base.keys`: RELATION_SIZE and SLRU_SIZE.

Not here: how sizes come to change (`wal_decoder`), where they are stored.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from excimer.base.keys import parse_key

cdef enum:
    INITIAL_SLOTS = 1024


cdef inline size_t hash_key(const SizeKey* key) noexcept nogil:
    cdef uint64_t mixed = (<uint64_t> key.db << 32 | key.rel) * 0x9E3779B97F4A7C15u
    mixed ^= (<uint64_t> key.spc << 16 | <uint64_t> key.kind << 8 | key.fork) * 0xC2B2AE3D27D4EB4Fu
    return <size_t> (mixed ^ mixed >> 29)


cdef inline bint is_equal(const SizeKey* left, const SizeKey* right) noexcept nogil:
    return (
        left.rel == right.rel
        and left.db == right.db
        and left.spc == right.spc
        and left.fork == right.fork
        and left.kind == right.kind
    )


cdef SizeKey unpack_key(bytes key) except *:
    cdef SizeKey unpacked
    fields = parse_key(key)
    unpacked.kind = fields.kind
    unpacked.spc = fields.spc
    unpacked.db = fields.db
    unpacked.rel = fields.rel
    unpacked.fork = fields.fork
    return unpacked


cdef class RelationSizes:
    def __cinit__(self):
        self.slot_count = INITIAL_SLOTS
        self.slots = <SizeSlot*> calloc(INITIAL_SLOTS, sizeof(SizeSlot))
        if self.slots == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.slots)

    def get(self, bytes key):
        """Blocks of a size key; -1 when it does not exist, None when that is not known here."""
        cdef SizeKey unpacked = unpack_key(key)
        cdef SizeSlot* slot = self.find(&unpacked)
        if slot == NULL:
            return None
        return slot.blocks if slot.exists else -1

    def get_lsns(self, bytes key):
        """(born LSN, truncated LSN) of a size key that exists; None otherwise."""
        cdef SizeKey unpacked = unpack_key(key)
        cdef SizeSlot* slot = self.find(&unpacked)
        if slot == NULL or not slot.exists:
            return None
        return slot.born_lsn, slot.truncated_lsn

    def set(self, bytes key, blocks, uint64_t born_lsn=0, uint64_t truncated_lsn=0):
        """-1: does not exist."""
        cdef SizeKey unpacked = unpack_key(key)
        cdef SizeSlot* slot = self.insert(&unpacked)
        if slot == NULL:
            raise MemoryError
        slot.exists = blocks >= 0
        slot.blocks = blocks if blocks >= 0 else 0
        slot.born_lsn = born_lsn
        slot.truncated_lsn = truncated_lsn

    def clear(self):
        """Forgets everything: all is unknown again."""
        cdef SizeSlot* fresh = <SizeSlot*> calloc(INITIAL_SLOTS, sizeof(SizeSlot))
        if fresh == NULL:
            raise MemoryError
        free(self.slots)
        self.slots = fresh
        self.slot_count = INITIAL_SLOTS
        self.count = 0

    cdef SizeSlot* find(self, const SizeKey* key) noexcept nogil:
        """NULL when unknown. Valid until the next insert."""
        cdef size_t at = hash_key(key) & (self.slot_count - 1)
        while self.slots[at].is_used:
            if is_equal(&self.slots[at].key, key):
                return &self.slots[at]
            at = (at + 1) & (self.slot_count - 1)
        return NULL

    cdef SizeSlot* insert(self, const SizeKey* key) noexcept nogil:
        """The key's slot, new ones as "does not exist"; NULL when memory is out."""
        cdef SizeSlot* found = self.find(key)
        cdef size_t at
        if found != NULL:
            return found
        if 4 * (self.count + 1) > 3 * self.slot_count and self.grow() < 0:
            return NULL
        at = hash_key(key) & (self.slot_count - 1)
        while self.slots[at].is_used:
            at = (at + 1) & (self.slot_count - 1)
        self.slots[at].key = key[0]
        self.slots[at].is_used = 1
        self.slots[at].exists = 0
        self.slots[at].blocks = 0
        self.slots[at].born_lsn = 0
        self.slots[at].truncated_lsn = 0
        self.count += 1
        return &self.slots[at]

    cdef int grow(self) noexcept nogil:
        cdef size_t old_count = self.slot_count
        cdef SizeSlot* old = self.slots
        cdef SizeSlot* fresh = <SizeSlot*> calloc(2 * old_count, sizeof(SizeSlot))
        cdef size_t at, index
        if fresh == NULL:
            return -1
        for index in range(old_count):
            if old[index].is_used:
                at = hash_key(&old[index].key) & (2 * old_count - 1)
                while fresh[at].is_used:
                    at = (at + 1) & (2 * old_count - 1)
                fresh[at] = old[index]
        self.slots = fresh
        self.slot_count = 2 * old_count
        free(old)
        return 0
