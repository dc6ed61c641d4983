"""Takes long commit, abort and prepare records apart as their bytes pass, without the GIL.

Such a record may have a gigabyte: four bytes for each subtransaction, twelve for each relation that is
dropped, sixteen for each cache invalidation. Kept of it is what its values need: the xids as a set
(`xid_set`), the relations, a prepared transaction's state file; the rest passes::

    headers of parts -> time -> [flags] -> [database] -> [xids] -> [relations] -> [statistics]
                     -> [invalidations] -> [prepared xid [name]] -> [origin] -> end
    headers of parts -> head of a PREPARE -> its name -> xids -> end

Every step takes items of one size. An item that two parts of the record share is put together first.

What it says equals what `excimer.pgformat.transaction_records` and, for what the values do to pages,
`xact_parts` and `slru_values` say of the whole record.

Not here: where the bytes come from (`wal_scanner`), short records (`xact_parts`).
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcpy, memset

from excimer._native.batch_builder cimport STARTS_CHAIN, VALUE_IMAGE, StorageKey
from excimer._native.change_set cimport TWO_PHASE, ChangeSet, id_precedes
from excimer._native.little_endian cimport put_u32, u16, u32, u64
from excimer._native.wal_scanner cimport RecordTaker
from excimer._native.xact_parts cimport (
    ABORT,
    ABORT_PREPARED,
    COMMIT,
    COMMIT_PREPARED,
    HAS_DBINFO,
    HAS_DROPPED_STATS,
    HAS_GID,
    HAS_INFO,
    HAS_INVALS,
    HAS_ORIGIN,
    HAS_RELATIONS,
    HAS_SUBXACTS,
    HAS_TWOPHASE,
    OPMASK,
    PREPARE,
)
from excimer._native.xid_set cimport CommitTimes, XidSet

cdef extern from "crc32c.h" nogil:
    void crc32c_setup()
    uint32_t crc32c(uint32_t crc, const uint8_t* data, size_t size)

crc32c_setup()

cdef enum:
    RM_XACT = 1
    RECORD_HEADER_SIZE = 24
    KEPT_SIZE_MIN = 1 << 16

cdef enum:  # identifiers of a record's parts
    DATA_SHORT = 255
    DATA_LONG = 254
    ORIGIN = 253
    TOPLEVEL_XID = 252

cdef enum:  # steps, in the order of the record
    PART_ID
    PART_HEADER
    TIME
    FLAGS
    DATABASE
    SUBXACT_COUNT
    SUBXACTS
    RELATION_COUNT
    RELATIONS
    STATISTICS_COUNT
    STATISTICS
    INVAL_COUNT
    INVALS
    PREPARED_XID
    PREPARED_NAME
    ORIGIN_PROGRESS
    PREPARE_HEAD
    PREPARE_NAME
    PREPARE_SUBXACTS
    END

cdef const char* WRONG_SUM = "record's length is not the sum of its parts"
cdef const char* TOO_SHORT = "transaction record is shorter than it says"
cdef const char* PREPARE_TOO_SHORT = "malformed record: prepare record is shorter than it says"


cdef class LongXact(RecordTaker):
    """`size_min` is what a record has at least to be taken here."""

    def __cinit__(self, int pg_version, uint32_t size_min):
        self.pg_version = pg_version
        self.size_min = size_min
        self.xids = XidSet()

    def __dealloc__(self):
        free(self.kept)

    cdef bint begin(self, const uint8_t* header) noexcept nogil:
        cdef uint8_t operation = header[16] & OPMASK
        if header[17] != RM_XACT or u32(header) < self.size_min:
            return False
        if operation not in (COMMIT, PREPARE, ABORT, COMMIT_PREPARED, ABORT_PREPARED):
            return False
        self.forget()
        memset(&self.xact, 0, sizeof(self.xact))
        self.info = header[16]
        self.is_prepare = operation == PREPARE
        self.xact.xid = u32(header + 4)
        self.xact.is_commit = operation == COMMIT or operation == COMMIT_PREPARED
        self.xact.is_prepared = operation == COMMIT_PREPARED or operation == ABORT_PREPARED
        self.rest = u32(header) - RECORD_HEADER_SIZE
        self.flags = 0
        self.failure = NULL
        self.subxact_count = 0
        self.state_file_crc = 0
        self.set_step(PART_ID, 1, 1)
        return True

    cdef void take(self, const uint8_t* part, uint32_t size) noexcept nogil:
        cdef uint32_t used
        cdef bint is_main
        while size and self.failure == NULL:
            is_main = self.step > PART_HEADER
            used = self.take_some(part, size)
            self.rest -= used
            if not is_main and self.step > PART_HEADER and self.rest != self.main_size:
                self.failure = WRONG_SUM
            if is_main and self.is_prepare:
                self.state_file_crc = crc32c(self.state_file_crc, part, used)
                self.keep(part, used)
            part += used
            size -= used
            if self.items_left == 0:
                self.next_step()

    cdef uint32_t take_some(self, const uint8_t* part, uint32_t size) noexcept nogil:
        """Uses bytes of one step at most; how many."""
        cdef uint32_t item_size = self.item_size
        cdef uint64_t count
        cdef uint32_t used
        if self.step == END:
            return size
        if self.step == PREPARED_NAME:
            return self.skip_name(part, size)
        if self.item_fill == 0 and size >= item_size:
            count = min(<uint64_t> (size // item_size), self.items_left)
            self.use(part, <uint32_t> count)
            self.items_left -= count
            return <uint32_t> count * item_size
        used = min(size, item_size - self.item_fill)
        memcpy(self.item + self.item_fill, part, used)
        self.item_fill += used
        if self.item_fill == item_size:
            self.item_fill = 0
            self.use(self.item, 1)
            self.items_left -= 1
        return used

    cdef uint32_t skip_name(self, const uint8_t* part, uint32_t size) noexcept nogil:
        cdef const uint8_t* end = <const uint8_t*> memchr(part, 0, size)
        if end == NULL:
            return size
        self.items_left = 0
        return <uint32_t> (end - part) + 1

    cdef void set_step(self, int step, uint32_t item_size, uint64_t count) noexcept nogil:
        self.step = step
        self.item_size = item_size
        self.items_left = count
        self.item_fill = 0

    cdef void next_step(self) noexcept nogil:
        """Goes on to the next part that the record has, past lists of nothing."""
        cdef bint has_name
        while self.items_left == 0 and self.step != END:
            if self.step == PART_ID or self.step == PART_HEADER:
                return  # using them has set the step
            if self.step == TIME and not self.info & HAS_INFO:
                self.step = END
            elif self.step == PREPARE_NAME:
                self.set_step(PREPARE_SUBXACTS, 4, self.subxact_count)
            elif self.step == PREPARE_SUBXACTS or self.step == ORIGIN_PROGRESS:
                self.step = END
            elif self.step == TIME:
                self.set_step(FLAGS, 4, 1)
            elif self.step == FLAGS:
                self.set_step(DATABASE, 8, (self.flags & HAS_DBINFO) != 0)
            elif self.step == DATABASE:
                self.set_step(SUBXACT_COUNT, 4, (self.flags & HAS_SUBXACTS) != 0)
            elif self.step == SUBXACTS or self.step == SUBXACT_COUNT:
                self.set_step(RELATION_COUNT, 4, (self.flags & HAS_RELATIONS) != 0)
            elif self.step == RELATIONS or self.step == RELATION_COUNT:
                self.set_step(STATISTICS_COUNT, 4, (self.flags & HAS_DROPPED_STATS) != 0)
            elif self.step == STATISTICS or self.step == STATISTICS_COUNT:
                self.set_step(INVAL_COUNT, 4, (self.flags & HAS_INVALS) != 0)
            elif self.step == INVALS or self.step == INVAL_COUNT:
                self.set_step(PREPARED_XID, 4, (self.flags & HAS_TWOPHASE) != 0)
            elif self.step == PREPARED_XID:
                has_name = self.flags & HAS_TWOPHASE and self.flags & HAS_GID
                self.set_step(PREPARED_NAME, 1, has_name)
            elif self.step == PREPARED_NAME:
                self.set_step(ORIGIN_PROGRESS, 16, (self.flags & HAS_ORIGIN) != 0)

    cdef void use(self, const uint8_t* items, uint32_t count) noexcept nogil:
        """Items of the step at hand. That of a count sets the list's step, one item longer: it is used up."""
        if self.step == PART_ID or self.step == PART_HEADER:
            self.use_part_header(items)
        elif self.step == TIME:
            self.xact.time = <int64_t> u64(items)
            self.xact.commit_time = self.xact.time
        elif self.step == FLAGS:
            self.flags = u32(items)
        elif self.step == SUBXACT_COUNT:
            self.set_step(SUBXACTS, 4, <uint64_t> u32(items) + 1)
        elif self.step == SUBXACTS or self.step == PREPARE_SUBXACTS:
            self.use_subxacts(items, count)
        elif self.step == RELATION_COUNT:
            self.set_step(RELATIONS, 12, <uint64_t> u32(items) + 1)
        elif self.step == RELATIONS:
            self.keep(items, <size_t> count * 12)
        elif self.step == STATISTICS_COUNT:
            self.set_step(STATISTICS, 16 if self.pg_version >= 18 else 12, <uint64_t> u32(items) + 1)
        elif self.step == INVAL_COUNT:
            self.set_step(INVALS, 16, <uint64_t> u32(items) + 1)
        elif self.step == PREPARED_XID:
            self.xact.xid = u32(items)
        elif self.step == ORIGIN_PROGRESS:
            self.xact.has_origin = 1
            self.xact.origin_lsn = u64(items)
            self.xact.commit_time = <int64_t> u64(items + 8)
        elif self.step == PREPARE_HEAD:
            self.use_prepare_head(items)

    cdef void use_subxacts(self, const uint8_t* items, uint32_t count) noexcept nogil:
        cdef uint32_t at, xid
        for at in range(count):
            xid = u32(items + 4 * at)
            if not self.is_prepare:
                self.xids.add(xid)
            if self.newest_xid == 0 or id_precedes(self.newest_xid, xid):
                self.newest_xid = xid
            self.last_xid = xid

    cdef void use_part_header(self, const uint8_t* item) noexcept nogil:
        """One byte says which part it is, and with that how long its header is."""
        cdef uint32_t size
        if self.step == PART_ID:
            if item[0] == ORIGIN:
                size = 2
            elif item[0] == TOPLEVEL_XID or item[0] == DATA_LONG:
                size = 4
            elif item[0] == DATA_SHORT:
                size = 1
            else:
                self.failure = WRONG_SUM  # no transaction's end refers to blocks
                return
            self.flags = item[0]
            self.set_step(PART_HEADER, size, 2)
            return
        if self.flags == ORIGIN:
            self.xact.origin = u16(item)
        if self.flags == ORIGIN or self.flags == TOPLEVEL_XID:
            self.set_step(PART_ID, 1, 2)
            return
        self.main_size = u32(item) if self.flags == DATA_LONG else item[0]
        self.flags = 0
        if self.is_prepare:
            self.set_step(PREPARE_HEAD, 64 if self.pg_version < 15 else 72, 2)
        else:
            self.set_step(TIME, 8, 2)

    cdef void use_prepare_head(self, const uint8_t* item) noexcept nogil:
        """`xl_xact_prepare`; versions from 15 on have two more counts, of statistics."""
        cdef uint32_t more = 0 if self.pg_version < 15 else 8
        self.xact.xid = u32(item + 8)
        self.subxact_count = u32(item + 28)
        self.xact.origin_lsn = u64(item + 48 + more)
        if self.subxact_count > 0x7FFFFFFF:
            self.failure = PREPARE_TOO_SHORT
        self.set_step(PREPARE_NAME, 1, (u16(item + 46 + more) + 7) // 8 * 8 + 1)

    cdef void keep(self, const uint8_t* part, size_t size) noexcept nogil:
        """Grows with what arrives; large blocks move without being copied."""
        cdef size_t capacity
        cdef uint8_t* grown
        if self.kept_size + size > self.kept_capacity:
            capacity = (self.kept_size + size) + (self.kept_size + size) // 4
            if capacity < KEPT_SIZE_MIN:
                capacity = KEPT_SIZE_MIN
            grown = <uint8_t*> realloc(self.kept, capacity)
            if grown == NULL:
                self.is_out_of_memory = True
                return
            self.kept = grown
            self.kept_capacity = capacity
        memcpy(self.kept + self.kept_size, part, size)
        self.kept_size += size

    cdef const char* finish(self) noexcept nogil:
        """The record is whole, and its checksum right. NULL, or what is wrong with it.

        That memory ran out is no fault of the record: `collect` has the batch say so.
        """
        if self.failure != NULL:
            return self.failure
        if self.step <= PART_HEADER:
            return WRONG_SUM
        if self.step != END:
            return PREPARE_TOO_SHORT if self.is_prepare else TOO_SHORT
        if not self.is_prepare:
            self.xact.relations = self.kept
            self.xact.relation_count = <uint32_t> (self.kept_size // 12)
        return NULL

    cdef void forget(self) noexcept nogil:
        """Gives the memory of the record back."""
        free(self.kept)
        self.kept = NULL
        self.kept_size = 0
        self.kept_capacity = 0
        self.newest_xid = 0
        self.last_xid = 0
        self.is_out_of_memory = False
        self.xids.clear()

    cdef void collect(self, ChangeSet changes, bint with_commit_times) noexcept nogil:
        """What a finished record touches."""
        if self.is_out_of_memory or self.xids.is_out_of_memory:
            changes.batch.is_out_of_memory = True
        if self.xact.xid:
            changes.advance_xid(self.xact.xid)
            changes.advance_xid(self.newest_xid)
            if not self.is_prepare:
                self.xids.add(self.xact.xid)
                self.xids.touch(changes, with_commit_times)

    cdef void put_pages(self, ChangeSet changes, bint with_commit_times) noexcept nogil:
        cdef CommitTimes said
        self.xids.put_status(changes, 1 if self.xact.is_commit else 2)
        if with_commit_times:
            said.time = self.xact.commit_time
            said.origin = self.xact.origin
            self.xids.put_commit_times(changes, &said)
        if self.xids.is_out_of_memory:
            changes.batch.is_out_of_memory = True

    cdef void put_prepared(self, ChangeSet changes) noexcept nogil:
        """The state file, whose memory is given back at once, and the origin's progress."""
        cdef uint64_t xid = changes.full_xid(self.xact.xid)
        cdef uint8_t[4] crc
        cdef StorageKey key
        memset(&key, 0, sizeof(key))
        key.kind, key.db, key.rel = TWO_PHASE, <uint32_t> (xid >> 32), <uint32_t> xid
        put_u32(crc, self.state_file_crc)
        self.keep(crc, 4)
        if self.is_out_of_memory:
            changes.batch.is_out_of_memory = True
            return
        changes.put(&key, VALUE_IMAGE, STARTS_CHAIN, self.kept, <uint32_t> self.kept_size)
        self.forget()
        changes.put_origin(self.xact.origin, self.xact.origin_lsn)
