"""What one WAL record changes: blocks it touches, values it puts, checkpoint fields it moves.

A record is handled in steps: first everything it *touches* is listed; when all sizes are known,
forks and SLRU segments *grow*; then values are *put*. Growth: the touched block becomes a page of zeros
unless its first value starts a chain. These zeros have an LSN one below the record's end, so that the
record can build upon them. LSNs never decrease in the batch that way.

Blocks of a fork that are skipped over get no value: a block below the size without one is a page of zeros,
and what a truncation has left there is told apart by the size's LSNs (`storage.format.relation_size`). Of an
SLRU segment, which has 32 blocks, they become pages of zeros one by one.

Not here: what a record touches and puts (`wal_decoder`).
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from excimer._native.batch_builder cimport (
    STARTS_CHAIN,
    VALUE_IMAGE,
    VALUE_NATIVE,
    VALUE_TOMBSTONE,
    VALUE_ZERO_PAGE,
    BatchBuilder,
    StorageKey,
)
from excimer._native.little_endian cimport put_u32, put_u64, u32, u64
from excimer._native.origin_progress cimport OriginProgress
from excimer._native.relation_sizes cimport RelationSizes, SizeKey, SizeSlot

cdef enum:
    FORK_COUNT = 4
    RELATION_SIZE_SIZE = 20
    NOTE_LEVELS = 4  # storage.format.relation_size
    NOTE_GROUP_BITS = 8
    XACTS_PER_PAGE = 32_768
    COMMIT_TIMES_PER_PAGE = 819
    COMMIT_TIME_STEP_US = 10_000
    FIRST_NORMAL_XID = 3

cdef enum:  # offsets into the checkpoint state
    NEXT_XID = 24
    NEXT_MULTI = 36
    NEXT_MULTI_OFFSET = 40
    NEWEST_COMMIT_TS = 76


cdef inline uint64_t page_start(uint64_t xid, uint64_t per_page) noexcept nogil:
    """First xid of the page that begins at or after `xid`."""
    return (xid + per_page - 1) // per_page * per_page


cdef class ChangeSet:
    def __cinit__(self):
        self.sizes = RelationSizes()
        self.batch = BatchBuilder()
        self.origins = OriginProgress()
        self.last_commit_time = -(1 << 62)

    def __dealloc__(self):
        free(self.touches)

    cdef void begin(self, uint64_t lsn) noexcept nogil:
        self.lsn = lsn
        self.touch_count = 0

    cdef Touch* touch(self, const SizeKey* key, uint32_t block) noexcept nogil:
        """NULL when memory is out, which the batch remembers."""
        cdef Touch* touch
        if self.touch_count == self.touch_capacity:
            touch = <Touch*> realloc(self.touches, (self.touch_capacity * 2 + 64) * sizeof(Touch))
            if touch == NULL:
                self.batch.is_out_of_memory = True
                return NULL
            self.touches = touch
            self.touch_capacity = self.touch_capacity * 2 + 64
        touch = &self.touches[self.touch_count]
        self.touch_count += 1
        memset(touch, 0, sizeof(Touch))
        touch.key = key[0]
        touch.block = block
        return touch

    cdef void touch_relation(
        self, uint32_t spc, uint32_t db, uint32_t rel, uint8_t fork, uint32_t block, bint needs_zero
    ) noexcept nogil:
        cdef SizeKey key
        cdef Touch* touch
        key.kind, key.spc, key.db, key.rel, key.fork = RELATION_SIZE, spc, db, rel, fork
        touch = self.touch(&key, block)
        if touch != NULL:
            touch.needs_zero = needs_zero

    cdef void touch_slru(self, uint32_t slru, uint32_t page, uint32_t index) noexcept nogil:
        """`index` is that of the id, among the record's, that lies on the page."""
        cdef SizeKey key
        cdef Touch* touch
        cdef size_t at
        for at in range(self.touch_count):
            touch = &self.touches[self.touch_count - 1 - at]
            if touch.key.kind == SLRU_SIZE and touch.key.spc == slru and touched_page(touch) == page:
                touch.last_id = index
                return
        key.kind, key.spc, key.db, key.rel, key.fork = SLRU_SIZE, slru, 0, page // SEGMENT_BLOCKS, 0
        touch = self.touch(&key, page % SEGMENT_BLOCKS)
        if touch != NULL:
            touch.needs_zero = True
            touch.first_id = touch.last_id = index

    cdef void touch_slru_segment(self, uint32_t slru, uint32_t page) noexcept nogil:
        """For pages that come in ascending order: a touch for the farthest of each segment."""
        cdef SizeKey key
        cdef Touch* touch
        if self.touch_count:
            touch = &self.touches[self.touch_count - 1]
            if (
                touch.key.kind == SLRU_SIZE
                and touch.key.spc == slru
                and touch.key.rel == page // SEGMENT_BLOCKS
            ):
                touch.block = page % SEGMENT_BLOCKS
                return
        key.kind, key.spc, key.db, key.rel, key.fork = SLRU_SIZE, slru, 0, page // SEGMENT_BLOCKS, 0
        touch = self.touch(&key, page % SEGMENT_BLOCKS)
        if touch != NULL:
            touch.needs_zero = True

    cdef bint has_unknown_sizes(self) noexcept nogil:
        cdef size_t at
        for at in range(self.touch_count):
            if self.sizes.find(&self.touches[at].key) == NULL:
                return True
        return False

    cdef void grow(self) noexcept nogil:
        """All sizes must be known."""
        cdef size_t at
        cdef Touch* touch
        cdef SizeSlot* slot
        cdef StorageKey key
        for at in range(self.touch_count):
            self.grow_to(&self.touches[at])
        for at in range(self.touch_count):
            touch = &self.touches[at]
            if not touch.has_grown:
                continue
            slot = self.sizes.find(&touch.key)
            if touch.block != NO_BLOCK and slot.blocks != touch.block + 1:
                continue  # another touch of the same fork went further
            memset(&key, 0, sizeof(key))
            key.kind, key.fork = touch.key.kind, touch.key.fork
            key.spc, key.db, key.rel = touch.key.spc, touch.key.db, touch.key.rel
            self.put_size(&key, slot)

    cdef void put_size(self, const StorageKey* key, const SizeSlot* slot) noexcept nogil:
        cdef uint8_t[RELATION_SIZE_SIZE] value
        cdef uint32_t size = RELATION_SIZE_SIZE if key.kind == RELATION_SIZE else 4
        put_u32(value, slot.blocks)
        put_u64(value + 4, slot.born_lsn)
        put_u64(value + 12, slot.truncated_lsn)
        self.put(key, VALUE_IMAGE, STARTS_CHAIN, value, size)

    cdef void grow_to(self, Touch* touch) noexcept nogil:
        cdef SizeSlot* slot = self.sizes.find(&touch.key)
        cdef StorageKey key
        cdef uint32_t block = slot.blocks if slot.exists else 0
        if not slot.exists:
            slot.born_lsn = self.lsn - 1
            slot.truncated_lsn = 0
        if touch.block == NO_BLOCK:
            if not slot.exists:
                slot.exists = 1
                slot.blocks = 0
                touch.has_grown = 1
            return
        if slot.exists and touch.block < slot.blocks:
            return
        if touch.key.kind == RELATION_SIZE:
            if slot.exists and slot.born_lsn == 0:
                self.end_older_life(touch, slot)
            block = touch.block
        memset(&key, 0, sizeof(key))
        key.kind = RELATION_BLOCK if touch.key.kind == RELATION_SIZE else SLRU_BLOCK
        key.fork, key.spc, key.db, key.rel = touch.key.fork, touch.key.spc, touch.key.db, touch.key.rel
        while block < touch.block + touch.needs_zero:
            key.block = block
            self.batch.add_entry(&key, VALUE_ZERO_PAGE, STARTS_CHAIN, self.lsn - 1, 0, 0)
            block += 1
        slot.exists = 1
        slot.blocks = touch.block + 1
        touch.has_grown = 1

    cdef void end_older_life(self, const Touch* touch, SizeSlot* slot) noexcept nogil:
        """A size of version 1 of the layer format knows nothing of truncations: the blocks that it lacks now
        may have older values, so they are noted as cut off, once (`storage.format.relation_size`).
        """
        cdef StorageKey key
        cdef uint8_t* note
        cdef uint64_t offset
        cdef uint8_t level
        slot.born_lsn = 1
        if slot.blocks == 0:
            slot.born_lsn = self.lsn - 1
            return
        slot.truncated_lsn = self.lsn - 1
        memset(&key, 0, sizeof(key))
        key.kind, key.spc, key.db, key.rel = RELATION_TRUNCATION, touch.key.spc, touch.key.db, touch.key.rel
        for level in range(NOTE_LEVELS):
            key.fork = touch.key.fork | level << 4
            key.block = slot.blocks >> NOTE_GROUP_BITS * level
            offset = self.batch.data_size
            note = self.batch.add_data(8)
            if note == NULL:
                return
            put_u64(note, self.lsn - 1)
            self.batch.add_entry(&key, VALUE_IMAGE, STARTS_CHAIN, self.lsn - 1, offset, 8)

    cdef void put(
        self, const StorageKey* key, uint8_t kind, uint8_t flags, const void* payload, uint32_t size
    ) noexcept nogil:
        cdef uint64_t offset = self.batch.data_size
        cdef uint8_t* place = self.batch.add_data(size)
        if place != NULL:
            memcpy(place, payload, size)
            self.batch.add_entry(key, kind, flags, self.lsn, offset, size)

    cdef uint8_t* put_native(self, const StorageKey* key, uint32_t size) noexcept nogil:
        """Room for a native record, zeroed; NULL when memory is out."""
        cdef uint64_t offset = self.batch.data_size
        cdef uint8_t* place = self.batch.add_data(size)
        if place != NULL:
            memset(place, 0, size)
            self.batch.add_entry(key, VALUE_NATIVE, 0, self.lsn, offset, size)
        return place

    cdef void drop_relation(
        self, uint32_t spc, uint32_t db, uint32_t rel, bint stays_unknown
    ) noexcept nogil:
        """All forks, also those whose size is unknown here: a tombstone too many does no harm.

        What was unknown and stays so must not be asked for before the batch is put.
        """
        cdef SizeKey size_key
        cdef StorageKey key
        cdef SizeSlot* slot
        cdef uint8_t fork
        memset(&key, 0, sizeof(key))
        for fork in range(FORK_COUNT):
            size_key.kind, size_key.spc, size_key.db, size_key.rel = RELATION_SIZE, spc, db, rel
            size_key.fork = fork
            slot = self.sizes.find(&size_key)
            if slot != NULL and not slot.exists:
                continue
            if slot != NULL or not stays_unknown:
                slot = self.sizes.insert(&size_key)
                if slot == NULL:
                    self.batch.is_out_of_memory = True
                    return
                slot.exists = 0
                slot.blocks = 0
            key.kind, key.spc, key.db, key.rel, key.fork = RELATION_SIZE, spc, db, rel, fork
            self.put(&key, VALUE_TOMBSTONE, STARTS_CHAIN, NULL, 0)

    cdef void put_commit_time(self, int64_t time) noexcept nogil:
        """At most one per 10 ms: enough to find an LSN by time."""
        cdef StorageKey key
        if 0 <= time - self.last_commit_time < COMMIT_TIME_STEP_US:
            return
        if -COMMIT_TIME_STEP_US < time - self.last_commit_time < 0:
            return
        self.last_commit_time = time
        memset(&key, 0, sizeof(key))
        key.kind = COMMIT_TIME
        self.put(&key, VALUE_IMAGE, STARTS_CHAIN, &time, 8)

    cdef void put_origin(self, uint16_t origin, uint64_t remote_lsn) noexcept nogil:
        """The transaction of an origin that ends at `remote_lsn` there has ended here."""
        cdef StorageKey key
        cdef int moved = self.origins.advance(origin, remote_lsn)
        if moved < 0:
            self.batch.is_out_of_memory = True
        elif moved:
            memset(&key, 0, sizeof(key))
            key.kind, key.rel = ORIGIN, origin
            self.put(&key, VALUE_IMAGE, STARTS_CHAIN, &remote_lsn, 8)

    # -- the checkpoint state: offsets are those of pgformat.checkpoint_state

    def get_checkpoint_state(self):
        """Packed `CheckpointState` with the exact next xid."""
        state = bytearray((<const char*> self.state)[:STATE_SIZE])
        state[NEXT_XID : NEXT_XID + 8] = int(self.next_xid).to_bytes(8, "little")
        return bytes(state)

    def set_checkpoint_state(self, bytes state):
        """Replaces all fields; the record at hand will put them."""
        self.load_checkpoint_state(state)
        self.has_state_changed = True

    cdef int load_checkpoint_state(self, bytes state) except -1:
        """What is stored already, but for a next xid that is not rounded yet: an imported cluster's."""
        if len(state) != STATE_SIZE:
            raise ValueError(f"checkpoint state has {len(state)} bytes")
        memcpy(self.state, PyBytes_AS_STRING(state), STATE_SIZE)
        self.next_xid = u64(self.state + NEXT_XID)
        self.has_state_changed = False
        self.round_next_xid()
        return 0

    def advance_next_xid(self, uint32_t xid):
        """Makes the next xid one that follows `xid`."""
        self.advance_xid(xid)

    def get_full_xid(self, uint32_t xid):
        """64 bits, for an xid that is before the next one."""
        return self.full_xid(xid)

    cdef void put_state(self) noexcept nogil:
        """The CHECKPOINT value, if the record changed it."""
        cdef StorageKey key
        if self.has_state_changed:
            memset(&key, 0, sizeof(key))
            key.kind = CHECKPOINT
            self.put(&key, VALUE_IMAGE, STARTS_CHAIN, self.state, STATE_SIZE)
            self.has_state_changed = False

    cdef void round_next_xid(self) noexcept nogil:
        """pgformat.checkpoint_state.stored_next_xid."""
        cdef uint64_t xid = <uint32_t> self.next_xid
        cdef uint64_t rounded = self.next_xid - xid
        if xid > FIRST_NORMAL_XID:
            rounded += min(page_start(xid, XACTS_PER_PAGE), page_start(xid, COMMIT_TIMES_PER_PAGE))
        if <uint32_t> rounded < FIRST_NORMAL_XID:
            rounded += FIRST_NORMAL_XID
        if rounded != u64(self.state + NEXT_XID):
            put_u64(self.state + NEXT_XID, rounded)
            self.has_state_changed = True

    cdef void advance_xid(self, uint32_t xid) noexcept nogil:
        """AdvanceNextFullTransactionIdPastXid."""
        cdef uint32_t next_xid = <uint32_t> self.next_xid
        cdef uint64_t epoch = self.next_xid >> 32
        if xid < FIRST_NORMAL_XID or id_precedes(xid, next_xid):
            return
        xid += 1
        if xid < FIRST_NORMAL_XID:
            xid = FIRST_NORMAL_XID
        if xid < next_xid:
            epoch += 1
        self.next_xid = epoch << 32 | xid
        self.round_next_xid()

    cdef void advance_multixact(self, uint32_t multi, uint32_t offset) noexcept nogil:
        """MultiXactAdvanceNextMXact."""
        if id_precedes(u32(self.state + NEXT_MULTI), multi):
            put_u32(self.state + NEXT_MULTI, multi)
            self.has_state_changed = True
        if id_precedes(u32(self.state + NEXT_MULTI_OFFSET), offset):
            put_u32(self.state + NEXT_MULTI_OFFSET, offset)
            self.has_state_changed = True

    cdef void advance_newest_commit_time(self, uint32_t xid) noexcept nogil:
        cdef uint32_t newest = u32(self.state + NEWEST_COMMIT_TS)
        if id_precedes(newest, xid) if newest >= FIRST_NORMAL_XID else newest < xid:
            put_u32(self.state + NEWEST_COMMIT_TS, xid)
            self.has_state_changed = True

    cdef uint64_t full_xid(self, uint32_t xid) noexcept nogil:
        cdef uint64_t epoch = self.next_xid >> 32
        if xid > <uint32_t> self.next_xid and epoch:
            epoch -= 1
        return epoch << 32 | xid
