"""WAL records to keyed values, without the GIL and without a Python object per record.

The decoder walks the records of a chunk and adds to one batch what each does to which key:

* every block reference becomes the page image it carries, or the record itself;
* a relation grows when a block beyond its size is touched (`change_set` says how);
* commits, aborts, multixacts and visibility bits change SLRU and VM pages (`native_records`);
* what ends a transaction of a replication origin moves the origin's progress.

It stops where Python must act, in WAL order: at a *special* record (everything rare), when
a size is *unknown* to its table, and behind a *long* transaction's end, so that its values are put at once.
Long records that end or prepare a transaction never lie in memory as a whole (`long_xact`). The state of a
checkpoint is kept in the bytes of `checkpoint_state` and becomes a value whenever a record changed it.

Not here: finding records (`wal_scanner`), special records (`excimer.pageserver.special_records`).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from excimer._native.batch_builder cimport (
    STARTS_CHAIN,
    VALUE_PAGE_IMAGE,
    VALUE_TOMBSTONE,
    VALUE_WAL_RECORD,
    StorageKey,
)
from excimer._native.change_set cimport (
    NO_BLOCK,
    RELATION_BLOCK,
    SLRU_COMMIT_TS,
    SLRU_MEMBERS,
    SLRU_OFFSETS,
    SLRU_XACT,
    TWO_PHASE,
    ChangeSet,
    Touch,
)
from excimer._native.little_endian cimport put_u16, put_u32, put_u64, u32
from excimer._native.long_xact cimport LongXact
from excimer._native.record_parts cimport BlockPart, RecordParts, split_record
from excimer._native.slru_values cimport (
    COMMIT_TIMES_PER_PAGE,
    MEMBERS_PER_PAGE,
    OFFSETS_PER_PAGE,
    XACTS_PER_PAGE,
    next_multi,
    put_multixact,
    put_xact_page,
    xact_id,
)
from excimer._native.wal_scanner cimport RecordView, WalScanner
from excimer._native.xact_parts cimport XactParts, split_xact

from excimer.base.keys import make_key
from excimer.pgformat.wal_record import WalRecord
from excimer.pgformat.wal_segment import InvalidWalError

DONE = 0
SPECIAL = 1
UNKNOWN_SIZES = 2
LONG_RECORD = 3

LONG_XACT_SIZE_BYTES = 1 << 16

cdef enum:
    STOP_FAILED = -1
    STOP_DONE = 0
    STOP_SPECIAL = 1
    STOP_UNKNOWN = 2
    STOP_LONG = 3

cdef enum:
    HEAP_BLOCKS_PER_VM_PAGE = 32672
    FORK_MAIN = 0
    FORK_VM = 2
    RECORD_PREFIX_SIZE = 8
    IMAGE_HEADER_SIZE = 6
    TRACK_COMMIT_TIMESTAMP = 113  # offset into the checkpoint state
    KNOWN_SIZES_MAX = 4_000_000
    VM_CLEARS_MAX = 2

cdef enum:  # resource managers
    RM_XLOG = 0
    RM_XACT = 1
    RM_SMGR = 2
    RM_CLOG = 3
    RM_DBASE = 4
    RM_TBLSPC = 5
    RM_MULTIXACT = 6
    RM_RELMAP = 7
    RM_HEAP2 = 9
    RM_HEAP = 10
    RM_HASH = 12
    RM_GIST = 14
    RM_COMMIT_TS = 18
    RM_REPLORIGIN = 19
    RM_LOGICALMSG = 21
    RM_CUSTOM_MIN = 128

cdef enum:  # native operations
    OP_VM_SET = 5
    OP_VM_CLEAR = 6


cdef struct VmClear:
    const BlockPart* heap
    uint8_t bits


cdef class WalDecoder:
    """`feed` a chunk, then `run` until DONE; at the other stops do what they ask for first.

    SPECIAL: handle `special_record`, add values to `changes.batch`, then `finish_special`.
    UNKNOWN_SIZES: `changes.sizes.set` each of `unknown_keys`. LONG_RECORD: put the batch.
    Raises `InvalidWalError` where the WAL is damaged; what came before is in the batch.
    `long_xact_size_bytes` is from where on transactions' records are taken in parts.
    """

    cdef WalScanner scanner
    cdef readonly ChangeSet changes
    cdef readonly uint64_t applied_end  # end of the last record whose values are in the batch, or were
    cdef readonly uint64_t applied_start
    cdef int pg_version
    cdef bytes chunk
    cdef bint has_record
    cdef RecordView view
    cdef RecordParts parts
    cdef XactParts xact
    cdef LongXact long_xact
    cdef bint is_long
    cdef VmClear[VM_CLEARS_MAX] clears
    cdef int clear_count
    cdef const char* failure

    def __cinit__(
        self,
        uint64_t start_lsn,
        int pg_version,
        uint64_t segment_size_bytes,
        bytes checkpoint_state,
        *,
        uint64_t previous_lsn=0,
        uint32_t long_xact_size_bytes=LONG_XACT_SIZE_BYTES,
    ):
        self.scanner = WalScanner(
            start_lsn, pg_version, segment_size_bytes, previous_lsn=previous_lsn, keep_records=True
        )
        self.long_xact = LongXact(pg_version, long_xact_size_bytes)
        self.scanner.give_to(self.long_xact)
        self.changes = ChangeSet()
        self.changes.load_checkpoint_state(checkpoint_state)
        self.pg_version = pg_version
        self.applied_end = start_lsn
        self.applied_start = previous_lsn

    @property
    def position(self):
        """LSN of the next byte to feed."""
        return self.scanner.position

    @property
    def special_record(self):
        return WalRecord(
            self.view.start_lsn,
            self.view.end_lsn,
            PyBytes_FromStringAndSize(<const char*> self.view.data, self.view.size),
        )

    @property
    def unknown_keys(self):
        """Size keys that the current record needs and the table does not have."""
        cdef Touch* touch
        keys = []
        for index in range(self.changes.touch_count):
            touch = &self.changes.touches[index]
            if self.changes.sizes.find(&touch.key) == NULL:
                keys.append(
                    make_key(touch.key.kind, touch.key.spc, touch.key.db, touch.key.rel, touch.key.fork)
                )
        return keys

    def feed(self, bytes chunk):
        """Takes the next bytes, after `run` has said DONE to those before."""
        if self.changes.sizes.count > KNOWN_SIZES_MAX:
            self.changes.sizes.clear()
        self.chunk = chunk  # the scanner keeps pointers into it
        self.scanner.begin(<const uint8_t*> PyBytes_AS_STRING(chunk), PyBytes_GET_SIZE(chunk))

    def run(self):
        cdef int stop
        with nogil:
            stop = self.decode()
        if stop == STOP_FAILED:
            if self.failure != NULL:
                raise InvalidWalError(self.view.start_lsn, self.failure.decode())
            self.scanner.raise_error()
        return stop

    def finish_special(self):
        self.finish_record()

    cdef int decode(self) noexcept nogil:
        cdef int state
        while self.failure == NULL:
            if not self.has_record:
                state = self.scanner.next_record(&self.view)
                if state <= 0:
                    return state
                self.begin_record()
                continue
            if self.is_special():
                return STOP_SPECIAL
            if self.changes.has_unknown_sizes():
                return STOP_UNKNOWN
            self.changes.grow()
            self.emit()
            self.finish_record()
            if self.is_long:
                self.long_xact.forget()
                return STOP_LONG
        return STOP_FAILED

    cdef void begin_record(self) noexcept nogil:
        self.is_long = self.view.was_taken
        if not self.view.is_whole:
            self.begin_skimmed()
            return
        if split_record(self.view.data, self.view.size, self.pg_version, &self.parts) < 0:
            self.failure = "record's length is not the sum of its parts"
            return
        self.has_record = True
        self.clear_count = 0
        self.changes.begin(self.view.end_lsn)
        self.changes.advance_xid(self.parts.xid)
        if not self.is_special():
            self.collect()

    cdef void begin_skimmed(self) noexcept nogil:
        """A long record of which only the header was kept: it changes no page, or was taken in parts."""
        memset(&self.parts, 0, sizeof(self.parts))
        self.parts.xid = u32(self.view.data + 4)
        self.parts.info = self.view.data[16]
        self.parts.rmgr = self.view.data[17]
        self.xact.xid = 0
        self.has_record = True
        self.clear_count = 0
        self.changes.begin(self.view.end_lsn)
        self.changes.advance_xid(self.parts.xid)
        if self.is_long:
            self.failure = self.long_xact.finish()
            self.xact = self.long_xact.xact
            self.long_xact.collect(self.changes, self.records_commit_times())

    cdef void finish_record(self) noexcept nogil:
        self.changes.put_state()
        self.changes.batch.end_record()
        self.applied_end = self.view.end_lsn
        self.applied_start = self.view.start_lsn
        self.has_record = False

    cdef bint is_special(self) noexcept nogil:
        """Whether Python handles the record: everything rare, and everything unheard of."""
        cdef uint8_t info = self.parts.info & 0xF0
        cdef uint8_t rmgr = self.parts.rmgr
        if rmgr == RM_XLOG:  # checkpoints, next oid, parameters, end of recovery; unheard of
            return info in (0x00, 0x10, 0x30, 0x60, 0x80, 0x90, 0xC0, 0xF0)
        if rmgr == RM_XACT:
            return not self.is_long and info & 0x70 in (0x10, 0x70)  # prepare; unheard of
        if rmgr == RM_SMGR:
            return info != 0x10  # all but creation
        if rmgr == RM_MULTIXACT:
            return info & 0x70 != 0x20  # all but creation
        if rmgr in (RM_CLOG, RM_DBASE, RM_TBLSPC, RM_RELMAP, RM_COMMIT_TS, RM_REPLORIGIN):
            return True
        return RM_LOGICALMSG < rmgr < RM_CUSTOM_MIN

    # -- collecting what the record touches

    cdef bint changes_block(self, const BlockPart* block) noexcept nogil:
        """Full-page images of the XLOG manager that are not to be applied do nothing."""
        return self.parts.rmgr != RM_XLOG or (block.has_image and block.is_applied)

    cdef void collect(self) noexcept nogil:
        cdef int index
        cdef const BlockPart* block
        for index in range(self.parts.block_count):
            block = &self.parts.blocks[index]
            if self.changes_block(block):
                self.changes.touch_relation(
                    block.spc,
                    block.db,
                    block.rel,
                    block.fork,
                    block.block,
                    not (block.will_init or (block.has_image and block.is_applied)),
                )
        if self.parts.rmgr == RM_HEAP:
            self.collect_heap()
        elif self.parts.rmgr == RM_HEAP2:
            self.collect_heap2()
        elif self.parts.rmgr == RM_XACT:
            self.collect_xact()
        elif self.parts.rmgr == RM_MULTIXACT:
            self.collect_multixact()
        elif self.parts.rmgr == RM_SMGR:
            if self.parts.main_size < 16:
                self.failure = "relation creation is shorter than it says"
                return
            self.changes.touch_relation(
                u32(self.parts.main_data),
                u32(self.parts.main_data + 4),
                u32(self.parts.main_data + 8),
                self.parts.main_data[12],
                NO_BLOCK,
                False,
            )

    cdef bint has_heap_block(self, uint8_t block_id) noexcept nogil:
        cdef int index
        for index in range(self.parts.block_count):
            if self.parts.blocks[index].block_id == block_id:
                return self.parts.blocks[index].fork == FORK_MAIN
        return False

    cdef void collect_clear(self, uint8_t block_id, uint8_t bits) noexcept nogil:
        """The record clears visibility bits of the heap page that is its block `block_id`."""
        cdef int index
        cdef const BlockPart* block
        for index in range(self.parts.block_count):
            block = &self.parts.blocks[index]
            if block.block_id == block_id:
                self.clears[self.clear_count].heap = block
                self.clears[self.clear_count].bits = bits
                self.clear_count += 1
                self.changes.touch_relation(
                    block.spc, block.db, block.rel, FORK_VM, block.block // HEAP_BLOCKS_PER_VM_PAGE, True
                )
                return
        self.failure = "heap record clears visibility bits of a block it does not refer to"

    cdef void collect_heap(self) noexcept nogil:
        cdef uint8_t operation = self.parts.info & 0x70
        cdef const uint8_t* main_data = self.parts.main_data
        cdef uint8_t flags
        if operation == 0x00:  # insert
            if self.parts.main_size < 3:
                self.failure = "heap record is shorter than it says"
            elif main_data[2] & 0x01:
                self.collect_clear(0, 0x03)
        elif operation in (0x10, 0x20, 0x40, 0x60):  # delete, update, hot update, lock
            if self.parts.main_size < 8:
                self.failure = "heap record is shorter than it says"
                return
            flags = main_data[7]
            if operation == 0x10 and flags & 0x01:
                self.collect_clear(0, 0x03)
            elif operation == 0x60 and flags & 0x01:
                self.collect_clear(0, 0x02)
            elif operation in (0x20, 0x40):
                if flags & 0x02:
                    self.collect_clear(0, 0x03)
                if flags & 0x01:  # the old row's page is block 1 only if it is another
                    self.collect_clear(1 if self.has_heap_block(1) else 0, 0x03)

    cdef bint is_visible(self) noexcept nogil:
        return self.parts.rmgr == RM_HEAP2 and self.parts.info & 0x70 == 0x40

    cdef void collect_heap2(self) noexcept nogil:
        cdef uint8_t operation = self.parts.info & 0x70
        cdef const uint8_t* main_data = self.parts.main_data
        if operation == 0x50:  # multi-insert
            if self.parts.main_size < 1:
                self.failure = "heap record is shorter than it says"
            elif main_data[0] & 0x01:
                self.collect_clear(0, 0x03)
        elif operation == 0x60:  # lock of an updated row's versions
            if self.parts.main_size < 8:
                self.failure = "heap record is shorter than it says"
            elif main_data[7] & 0x01:
                self.collect_clear(0, 0x02)
        elif self.is_visible():  # block 0 is the map's, block 1 the heap's
            if self.parts.main_size < 5 or self.parts.block_count != 2:
                self.failure = "visibility record is not whole"

    cdef bint records_commit_times(self) noexcept nogil:
        return self.xact.is_commit and self.changes.state[TRACK_COMMIT_TIMESTAMP]

    cdef void collect_xact(self) noexcept nogil:
        cdef uint32_t index, xid
        self.xact.xid = 0
        if (self.parts.info & 0x70) in (0x50, 0x60):  # assignment, invalidations
            return
        if split_xact(&self.parts, self.pg_version, &self.xact) < 0:
            self.failure = "transaction record is shorter than it says"
            return
        if self.xact.xid == 0:
            return
        for index in range(self.xact.subxact_count + 1):
            xid = xact_id(&self.xact, index)
            self.changes.advance_xid(xid)
            self.changes.touch_slru(SLRU_XACT, xid // XACTS_PER_PAGE, index)
            if self.records_commit_times():
                self.changes.touch_slru(SLRU_COMMIT_TS, xid // COMMIT_TIMES_PER_PAGE, index)

    cdef void collect_multixact(self) noexcept nogil:
        cdef const uint8_t* main_data = self.parts.main_data
        cdef uint32_t multi, offset, count, index
        if self.parts.main_size < 12 or (self.parts.main_size - 12) // 8 < u32(main_data + 8):
            self.failure = "multixact record is shorter than it says"
            return
        multi, offset, count = u32(main_data), u32(main_data + 4), u32(main_data + 8)
        self.changes.touch_slru(SLRU_OFFSETS, multi // OFFSETS_PER_PAGE, 0)
        self.changes.touch_slru(SLRU_OFFSETS, next_multi(multi) // OFFSETS_PER_PAGE, 1)
        for index in range(count):
            self.changes.touch_slru(SLRU_MEMBERS, (offset + index) // MEMBERS_PER_PAGE, index)
            self.changes.advance_xid(u32(main_data + 12 + 8 * index))
        self.changes.advance_multixact(next_multi(multi), offset + count)

    # -- putting values

    cdef void emit(self) noexcept nogil:
        cdef int index
        cdef size_t at
        cdef uint64_t record_offset = 0
        cdef bint has_record_data = False
        cdef const BlockPart* block
        for index in range(self.parts.block_count):
            block = &self.parts.blocks[index]
            if not self.changes_block(block):
                continue
            if block.has_image and block.is_applied and not self.redo_outlives_image():
                self.emit_image(block)
            elif block.fork == FORK_VM and self.parts.rmgr in (RM_HEAP, RM_HEAP2):
                if self.is_visible():
                    self.emit_vm_set(block)  # else its bits are cleared, see emit_vm_clears
            else:
                if not has_record_data:
                    record_offset = self.changes.batch.data_size
                    self.add_record_data()
                    has_record_data = True
                self.emit_record(block, record_offset)
        if self.clear_count:
            self.emit_vm_clears()
        if self.is_long and self.long_xact.is_prepare:
            self.long_xact.put_prepared(self.changes)
        elif self.parts.rmgr == RM_XACT and self.xact.xid:
            self.emit_xact()
        elif self.parts.rmgr == RM_MULTIXACT:
            for at in range(self.changes.touch_count):
                put_multixact(self.changes, &self.changes.touches[at], self.parts.main_data)

    cdef bint redo_outlives_image(self) noexcept nogil:
        """GiST (gistRedoClearFollowRight) and hash (split) redo change a page that was just restored.

        Their images are kept inside the record, which starts the chain.
        """
        return self.parts.rmgr == RM_GIST or self.parts.rmgr == RM_HASH

    cdef void add_record_data(self) noexcept nogil:
        cdef uint8_t* place = self.changes.batch.add_data(RECORD_PREFIX_SIZE + self.view.size)
        if place != NULL:
            put_u64(place, self.view.start_lsn)
            memcpy(place + RECORD_PREFIX_SIZE, self.view.data, self.view.size)

    cdef void emit_record(self, const BlockPart* block, uint64_t offset) noexcept nogil:
        cdef StorageKey key = block_key(block)
        cdef bint starts = block.will_init or (block.has_image and block.is_applied)
        self.changes.batch.add_entry(
            &key,
            VALUE_WAL_RECORD,
            STARTS_CHAIN if starts else 0,
            self.view.end_lsn,
            offset,
            RECORD_PREFIX_SIZE + self.view.size,
        )

    cdef void emit_image(self, const BlockPart* block) noexcept nogil:
        cdef StorageKey key = block_key(block)
        cdef uint64_t offset = self.changes.batch.data_size
        cdef uint32_t size = IMAGE_HEADER_SIZE + block.image_size
        cdef uint8_t* place = self.changes.batch.add_data(size)
        if place == NULL:
            return
        place[0], place[1] = block.compression, 0
        put_u16(place + 2, block.hole_offset)
        put_u16(place + 4, block.hole_size)
        memcpy(place + IMAGE_HEADER_SIZE, block.image, block.image_size)
        self.changes.batch.add_entry(&key, VALUE_PAGE_IMAGE, STARTS_CHAIN, self.view.end_lsn, offset, size)

    cdef void emit_vm_set(self, const BlockPart* block) noexcept nogil:
        cdef StorageKey key = block_key(block)
        cdef uint8_t* place = self.changes.put_native(&key, 8)
        if place != NULL:
            place[0], place[1] = OP_VM_SET, self.parts.main_data[4] & 0x03
            put_u32(place + 4, self.parts.blocks[1].block)

    cdef void emit_vm_clears(self) noexcept nogil:
        """One value per map page, though both pages of an update may lie on the same.

        Minor releases of 2026 (17.11, 18.5) refer to the map's page when a bit was set before; only
        then redo gives it the record's LSN.
        """
        cdef int first, index
        cdef uint32_t page, count
        cdef StorageKey key
        cdef const BlockPart* map_block
        cdef uint8_t* place
        for first in range(self.clear_count):
            page = self.clears[first].heap.block // HEAP_BLOCKS_PER_VM_PAGE
            if first and page == self.clears[0].heap.block // HEAP_BLOCKS_PER_VM_PAGE:
                continue
            map_block = self.find_map_block(page)
            if map_block != NULL and map_block.has_image and map_block.is_applied:
                continue
            count = 0
            for index in range(first, self.clear_count):
                count += self.clears[index].heap.block // HEAP_BLOCKS_PER_VM_PAGE == page
            key = block_key(self.clears[first].heap)
            key.fork, key.block = FORK_VM, page
            place = self.changes.put_native(&key, 4 + 8 * count)
            if place == NULL:
                return
            place[0], place[1] = OP_VM_CLEAR, map_block != NULL
            put_u16(place + 2, count)
            place += 4
            for index in range(first, self.clear_count):
                if self.clears[index].heap.block // HEAP_BLOCKS_PER_VM_PAGE == page:
                    put_u32(place, self.clears[index].heap.block)
                    place[4] = self.clears[index].bits
                    place += 8

    cdef const BlockPart* find_map_block(self, uint32_t page) noexcept nogil:
        cdef int index
        cdef const BlockPart* block
        for index in range(self.parts.block_count):
            block = &self.parts.blocks[index]
            if block.fork == FORK_VM and block.block == page:
                return block
        return NULL

    cdef void emit_xact(self) noexcept nogil:
        cdef size_t at
        cdef uint32_t index
        cdef uint64_t xid
        cdef const uint8_t* relation
        cdef StorageKey key
        cdef uint32_t last_xid
        if self.is_long:
            self.long_xact.put_pages(self.changes, self.records_commit_times())
            last_xid = self.long_xact.last_xid or self.xact.xid
        else:
            for at in range(self.changes.touch_count):
                put_xact_page(self.changes, &self.changes.touches[at], &self.xact)
            last_xid = xact_id(&self.xact, self.xact.subxact_count)
        if self.records_commit_times():
            self.changes.advance_newest_commit_time(last_xid)
        for index in range(self.xact.relation_count):
            relation = self.xact.relations + 12 * index
            self.changes.drop_relation(u32(relation), u32(relation + 4), u32(relation + 8), self.is_long)
        if self.xact.is_prepared:
            xid = self.changes.full_xid(self.xact.xid)
            memset(&key, 0, sizeof(key))
            key.kind, key.db, key.rel = TWO_PHASE, <uint32_t> (xid >> 32), <uint32_t> xid
            self.changes.put(&key, VALUE_TOMBSTONE, STARTS_CHAIN, NULL, 0)
        if self.xact.has_origin:
            self.changes.put_origin(self.xact.origin, self.xact.origin_lsn)
        if self.xact.is_commit:
            self.changes.put_commit_time(self.xact.time)


cdef inline StorageKey block_key(const BlockPart* block) noexcept nogil:
    cdef StorageKey key
    key.kind, key.fork = RELATION_BLOCK, block.fork
    key.spc, key.db, key.rel, key.block = block.spc, block.db, block.rel, block.block
    return key
