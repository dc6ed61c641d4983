"""What other native modules use of `change_set`."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from excimer._native.batch_builder cimport BatchBuilder, StorageKey
from excimer._native.origin_progress cimport OriginProgress
from excimer._native.relation_sizes cimport RelationSizes, SizeKey, SizeSlot

cdef enum:  # kinds of storage keys
    RELATION_BLOCK = 0x00
    RELATION_SIZE = 0x10
    RELATION_TRUNCATION = 0x11
    SLRU_BLOCK = 0x20
    SLRU_SIZE = 0x21
    TWO_PHASE = 0x40
    ORIGIN = 0x41
    CHECKPOINT = 0x50
    COMMIT_TIME = 0x60

cdef enum:  # SLRUs and their geometry
    SLRU_XACT = 0
    SLRU_OFFSETS = 1
    SLRU_MEMBERS = 2
    SLRU_COMMIT_TS = 3
    SEGMENT_BLOCKS = 32

cdef enum:
    NO_BLOCK = 0xFFFFFFFF
    STATE_SIZE = 120


cdef struct Touch:
    SizeKey key
    uint32_t block  # NO_BLOCK: the fork is created
    uint8_t needs_zero
    uint8_t has_grown
    uint32_t first_id  # the record's ids on this SLRU page have indexes in [first_id, last_id]
    uint32_t last_id


cdef class ChangeSet:
    cdef readonly RelationSizes sizes
    cdef readonly BatchBuilder batch
    cdef readonly OriginProgress origins
    cdef Touch* touches
    cdef size_t touch_count
    cdef size_t touch_capacity
    cdef uint64_t lsn  # end of the record whose changes these are
    cdef uint64_t next_xid
    cdef uint8_t[STATE_SIZE] state  # its next_xid is the rounded one
    cdef bint has_state_changed
    cdef public int64_t last_commit_time

    cdef void begin(self, uint64_t lsn) noexcept nogil
    cdef Touch* touch(self, const SizeKey* key, uint32_t block) noexcept nogil
    cdef void touch_relation(
        self, uint32_t spc, uint32_t db, uint32_t rel, uint8_t fork, uint32_t block, bint needs_zero
    ) noexcept nogil
    cdef void touch_slru(self, uint32_t slru, uint32_t page, uint32_t index) noexcept nogil
    cdef void touch_slru_segment(self, uint32_t slru, uint32_t page) noexcept nogil
    cdef bint has_unknown_sizes(self) noexcept nogil
    cdef void grow(self) noexcept nogil
    cdef void grow_to(self, Touch* touch) noexcept nogil
    cdef void end_older_life(self, const Touch* touch, SizeSlot* slot) noexcept nogil
    cdef void put_size(self, const StorageKey* key, const SizeSlot* slot) noexcept nogil

    cdef void put(
        self, const StorageKey* key, uint8_t kind, uint8_t flags, const void* payload, uint32_t size
    ) noexcept nogil
    cdef uint8_t* put_native(self, const StorageKey* key, uint32_t size) noexcept nogil
    cdef void drop_relation(
        self, uint32_t spc, uint32_t db, uint32_t rel, bint stays_unknown
    ) noexcept nogil
    cdef void put_commit_time(self, int64_t time) noexcept nogil
    cdef void put_origin(self, uint16_t origin, uint64_t remote_lsn) noexcept nogil
    cdef void put_state(self) noexcept nogil

    cdef int load_checkpoint_state(self, bytes state) except -1
    cdef void round_next_xid(self) noexcept nogil
    cdef void advance_xid(self, uint32_t xid) noexcept nogil
    cdef void advance_multixact(self, uint32_t multi, uint32_t offset) noexcept nogil
    cdef void advance_newest_commit_time(self, uint32_t xid) noexcept nogil
    cdef uint64_t full_xid(self, uint32_t xid) noexcept nogil


cdef inline bint id_precedes(uint32_t left, uint32_t right) noexcept nogil:
    return <uint32_t> (left - right) >= 0x80000000u


cdef inline StorageKey slru_key(const Touch* touch) noexcept nogil:
    cdef StorageKey key
    key.kind, key.fork = SLRU_BLOCK, 0
    key.spc, key.db, key.rel, key.block = touch.key.spc, 0, touch.key.rel, touch.block
    return key


cdef inline uint32_t touched_page(const Touch* touch) noexcept nogil:
    return touch.key.rel * SEGMENT_BLOCKS + touch.block
