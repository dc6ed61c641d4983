"""Finds record boundaries in a stream of WAL bytes, without the GIL.

The definition is `excimer.pgformat.wal_reader.WalReader`; here only the speed is different. A
record that lies within one page of one chunk is looked at in place; of others only the header is copied,
unless somebody wants to look at the record: its checksum is computed as its bytes pass. So a record may be
as long as PostgreSQL allows, one gigabyte, and memory stays at two pages.

Not here: what records mean (`wal_decoder` does that, on top of this module).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from excimer._native.little_endian cimport u16, u32, u64

from excimer.base.lsn import format_lsn
from excimer.pgformat.control_file import WAL_PAGE_MAGICS
from excimer.pgformat.wal_segment import InvalidWalError

cdef extern from "crc32c.h" nogil:
    void crc32c_setup()
    uint32_t crc32c(uint32_t crc, const uint8_t* data, size_t size)

crc32c_setup()

cdef enum:
    PAGE_SIZE = 8192
    SHORT_HEADER_SIZE = 24
    LONG_HEADER_SIZE = 40
    RECORD_HEADER_SIZE = 24
    RECORD_SIZE_MAX = 0x3FFFFFFF
    LONG_RECORD_SIZE = 1 << 20
    CAPACITY_KEPT = 1 << 20
    CONTINUES_RECORD = 0x0001
    LONG_HEADER = 0x0002
    OVERWRITES_RECORD = 0x0008
    ALL_FLAGS = 0x000F
    XLOG_SWITCH = 0x40

cdef enum:  # resource managers of records that may be long and change no page
    RM_XACT = 1
    RM_STANDBY = 8
    RM_HEAP2 = 9
    RM_HEAP = 10
    RM_LOGICALMSG = 21

cdef enum:
    NEED_MORE = 0
    HAVE_RECORD = 1
    FAILED = -1

cdef enum:
    NO_ERROR
    BAD_MAGIC
    BAD_FLAGS
    BAD_PAGE_LSN
    BAD_HEADER_SIZE
    BAD_SEGMENT_SIZE
    BAD_CONTINUATION
    BAD_LENGTH
    BAD_PREVIOUS
    BAD_CRC
    NO_MEMORY


cdef class RecordTaker:
    """Takes records in parts, as their bytes pass; for native callers who can do with that."""

    cdef bint begin(self, const uint8_t* header) noexcept nogil:
        """Whether it wants the rest of the record with this header of 24 bytes."""
        return False

    cdef void take(self, const uint8_t* part, uint32_t size) noexcept nogil:
        """The next bytes; whether their checksum is right is known when the record is whole."""


cdef class WalScanner:
    """Reads from `start_lsn`, the end of a record (or the very beginning of WAL).

    `previous_lsn` is the start of the record that ends there, 0 when unknown. `last_record_end`
    and `last_record_start` stand for the last complete, valid record seen. `check_crc=False` is
    for bytes that were checked before. `keep_records` is for native callers that look at records; those
    that change no page are skimmed all the same when they are long, and those that a taker wants go to it.
    """

    def __cinit__(
        self,
        uint64_t start_lsn,
        int pg_version,
        uint64_t segment_size_bytes=16 << 20,
        *,
        uint64_t previous_lsn=0,
        bint check_crc=True,
        bint keep_records=False,
    ):
        if start_lsn % 8:
            raise ValueError(f"{format_lsn(start_lsn)} is not a record boundary")
        self.lsn = start_lsn
        self.last_record_end = start_lsn
        self.last_record_start = previous_lsn
        self.segment_size = segment_size_bytes
        self.magic = WAL_PAGE_MAGICS[pg_version]
        self.checks_crc = check_crc
        self.keeps_records = keep_records

    def __dealloc__(self):
        free(self.record)

    @property
    def position(self):
        """LSN of the next byte to feed."""
        return self.lsn

    @property
    def held_size_bytes(self):
        """Memory for a record that has come in part."""
        return self.record_capacity

    def feed(self, bytes chunk):
        """Takes the next bytes. Raises `InvalidWalError`, again at every later call."""
        cdef const uint8_t* data = <const uint8_t*> PyBytes_AS_STRING(chunk)
        cdef size_t size = PyBytes_GET_SIZE(chunk)
        cdef bint is_valid
        if self.error:
            self.raise_error()
        with nogil:
            is_valid = self.take(data, size)
        if not is_valid:
            self.raise_error()

    cdef bint take(self, const uint8_t* data, size_t size) noexcept nogil:
        """As `feed`; False when the bytes are not WAL, of which `feed` then tells more."""
        cdef RecordView view
        cdef int state = HAVE_RECORD
        self.begin(data, size)
        while state == HAVE_RECORD:
            state = self.next_record(&view)
        self.chunk = NULL
        return state != FAILED

    cdef void begin(self, const uint8_t* chunk, size_t size) noexcept nogil:
        self.chunk = chunk
        self.chunk_size = size
        self.chunk_position = 0

    cdef int next_record(self, RecordView* view) noexcept nogil:
        """HAVE_RECORD, NEED_MORE (the chunk is consumed) or FAILED."""
        cdef size_t available
        cdef uint32_t room, total, wanted, part
        cdef const uint8_t* here
        if self.error:
            return FAILED
        if self.record_capacity > CAPACITY_KEPT and self.record_fill == 0:
            free(self.record)
            self.record = NULL
            self.record_capacity = 0
        while True:
            available = self.chunk_size - self.chunk_position
            if available == 0:
                return NEED_MORE
            here = self.chunk + self.chunk_position
            if self.skip_to:
                if self.skip_to - self.lsn > available:
                    self.lsn += available
                    self.chunk_position += available
                    return NEED_MORE
                self.chunk_position += self.skip_to - self.lsn
                self.lsn = self.skip_to
                self.skip_to = 0
                return self.finish(self.record, u32(self.record), view)
            if self.lsn % PAGE_SIZE == 0 or self.header_fill:
                if self.page_header() == FAILED:
                    return FAILED
                continue
            room = PAGE_SIZE - self.lsn % PAGE_SIZE
            if room > available:
                room = <uint32_t> available
            if self.record_fill == 0:
                self.record_start = self.lsn
                if room >= 4:
                    total = u32(here)
                    if total < RECORD_HEADER_SIZE or total > RECORD_SIZE_MAX:
                        return self.fail(BAD_LENGTH, self.lsn, total, 0)
                    if (total + 7) & ~7 <= room:
                        self.lsn += (total + 7) & ~7
                        self.chunk_position += (total + 7) & ~7
                        if self.check_record(here, total) == FAILED:
                            return FAILED
                        if self.skip_to:
                            continue
                        return self.finish(here, total, view)
            wanted = self.wanted_size()
            part = wanted - self.record_fill
            if part > room:
                part = room
            if self.take_part(here, part) == FAILED:
                return FAILED
            self.lsn += part
            self.chunk_position += part
            if self.record_fill < wanted:
                continue
            total = u32(self.record)
            if wanted == 4 and (total < RECORD_HEADER_SIZE or total > RECORD_SIZE_MAX):
                return self.fail(BAD_LENGTH, self.record_start, total, 0)
            if self.wanted_size() != wanted:
                continue
            if self.check_record(self.record, total) == FAILED:
                return FAILED
            if self.skip_to:
                continue
            return self.finish(self.record, total, view)

    cdef int fail(self, int error, uint64_t lsn, uint64_t found, uint64_t wanted) noexcept nogil:
        self.error = error
        self.error_lsn = lsn
        self.error_found = found
        self.error_wanted = wanted
        return FAILED

    cdef uint32_t wanted_size(self) noexcept nogil:
        """How much of the record at hand is to be there before more can be said of it."""
        if self.record_fill < 4:
            return 4
        if self.record_fill < RECORD_HEADER_SIZE:
            return RECORD_HEADER_SIZE
        return (u32(self.record) + 7) & ~7

    cdef void give_to(self, RecordTaker taker):
        self.taker = taker
        self.has_taker = True

    cdef int take_part(self, const uint8_t* part, uint32_t size) noexcept nogil:
        """The next bytes of a record that does not lie in one piece."""
        cdef uint32_t total, rest
        if self.record_fill == 0:
            self.is_skimmed = False
            self.is_taken = False
            self.record_crc = 0
        if self.record_fill == RECORD_HEADER_SIZE:
            self.is_taken = self.has_taker and self.taker.begin(self.record)
            self.is_skimmed = not self.keeps_records or self.is_taken or self.is_long_for_nothing()
        if self.is_skimmed:
            total = u32(self.record)  # behind it is padding
            if self.record_fill < total:
                rest = min(size, total - self.record_fill)
                if self.checks_crc:
                    self.record_crc = crc32c(self.record_crc, part, rest)
                if self.is_taken:
                    self.taker.take(part, rest)
        else:
            if self.reserve(self.record_fill + size) == FAILED:
                return FAILED
            memcpy(self.record + self.record_fill, part, size)
        self.record_fill += size
        return NEED_MORE

    cdef bint is_long_for_nothing(self) noexcept nogil:
        """Whether the record changes no page whatever it says: a message, invalidations, locks, mappings."""
        cdef uint8_t operation = self.record[16] & 0x70
        cdef uint8_t rmgr = self.record[17]
        if u32(self.record) < LONG_RECORD_SIZE:
            return False
        if rmgr == RM_XACT:
            return operation in (0x50, 0x60)  # assignment, invalidations
        if rmgr == RM_HEAP:
            return operation == 0x30  # truncate
        if rmgr == RM_HEAP2:
            return operation in (0x00, 0x70)  # rewrite, new command id
        return rmgr == RM_STANDBY or rmgr == RM_LOGICALMSG

    cdef int reserve(self, size_t size) noexcept nogil:
        """Grows with the bytes that arrived, not with what a record claims to be."""
        cdef uint8_t* grown
        if size <= self.record_capacity:
            return NEED_MORE
        size = size * 2 if size > PAGE_SIZE else 2 * PAGE_SIZE
        if self.record_fill >= 4 and size > u32(self.record) + 2 * PAGE_SIZE:
            size = u32(self.record) + 2 * PAGE_SIZE
        grown = <uint8_t*> realloc(self.record, size)
        if grown == NULL:
            return self.fail(NO_MEMORY, self.record_start, size, 0)
        self.record = grown
        self.record_capacity = size
        return NEED_MORE

    cdef int page_header(self) noexcept nogil:
        cdef uint32_t size = SHORT_HEADER_SIZE
        cdef size_t available = self.chunk_size - self.chunk_position
        cdef uint64_t page_lsn = self.lsn - self.header_fill
        cdef uint32_t part
        if page_lsn % self.segment_size == 0:
            size = LONG_HEADER_SIZE
        part = size - self.header_fill
        if part > available:
            part = <uint32_t> available
        memcpy(self.header + self.header_fill, self.chunk + self.chunk_position, part)
        self.header_fill += part
        self.lsn += part
        self.chunk_position += part
        if self.header_fill < size:
            return NEED_MORE
        self.header_fill = 0
        self.lsn -= size
        if self.check_page_header() == FAILED:
            return FAILED
        self.lsn += size
        return NEED_MORE

    cdef int check_page_header(self) noexcept nogil:
        cdef const uint8_t* header = self.header
        cdef uint16_t info = u16(header + 2)
        cdef bint starts_segment = self.lsn % self.segment_size == 0
        cdef uint32_t expected = 0
        if u16(header) != self.magic:
            return self.fail(BAD_MAGIC, self.lsn, u16(header), self.magic)
        if info & ~<uint16_t> ALL_FLAGS:
            return self.fail(BAD_FLAGS, self.lsn, info, 0)
        if u64(header + 8) != self.lsn:
            return self.fail(BAD_PAGE_LSN, self.lsn, u64(header + 8), 0)
        if starts_segment != ((info & LONG_HEADER) != 0):
            return self.fail(BAD_HEADER_SIZE, self.lsn, 0, 0)
        if starts_segment and (u32(header + 32) != self.segment_size or u32(header + 36) != PAGE_SIZE):
            return self.fail(BAD_SEGMENT_SIZE, self.lsn, u32(header + 32), u32(header + 36))
        if self.record_fill and info & OVERWRITES_RECORD:
            self.record_fill = 0
        if self.record_fill:
            expected = u32(self.record) - self.record_fill
        if ((info & CONTINUES_RECORD) != 0) != (expected > 0) or u32(header + 16) != expected:
            return self.fail(BAD_CONTINUATION, self.lsn, u32(header + 16), expected)
        return NEED_MORE

    cdef int check_record(self, const uint8_t* data, uint32_t total) noexcept nogil:
        """Checks a complete record, self.lsn being its end; a switch sets `skip_to` and is kept."""
        cdef uint64_t previous = u64(data + 8)
        cdef uint32_t crc
        if previous != self.last_record_start if self.last_record_start else previous >= self.record_start:
            return self.fail(BAD_PREVIOUS, self.record_start, previous, self.last_record_start)
        if self.checks_crc:
            if data == self.record and self.is_skimmed:
                crc = self.record_crc
            else:
                crc = crc32c(0, data + RECORD_HEADER_SIZE, total - RECORD_HEADER_SIZE)
            if crc32c(crc, data, 20) != u32(data + 20):
                return self.fail(BAD_CRC, self.record_start, 0, 0)
        if data[17] == 0 and data[16] & 0xF0 == XLOG_SWITCH and self.lsn % self.segment_size:
            if data != self.record:
                if self.reserve(total) == FAILED:
                    return FAILED
                memcpy(self.record, data, total)
                self.record_fill = total
                self.is_skimmed = False
            self.skip_to = self.lsn + self.segment_size - self.lsn % self.segment_size
        return NEED_MORE

    cdef int finish(self, const uint8_t* data, uint32_t total, RecordView* view) noexcept nogil:
        view.data = data
        view.size = total
        view.is_whole = data != self.record or not self.is_skimmed
        view.was_taken = not view.is_whole and self.is_taken
        view.start_lsn = self.record_start
        view.end_lsn = self.lsn
        self.last_record_start = self.record_start
        self.last_record_end = self.lsn
        self.record_count += 1
        self.record_fill = 0
        return HAVE_RECORD

    cdef int raise_error(self) except -1:
        if self.error == NO_MEMORY:
            raise MemoryError(f"no memory for a WAL record of {self.error_found} bytes")
        if self.error_text is None:
            self.error_text = _describe(self.error, self.error_found, self.error_wanted)
        raise InvalidWalError(self.error_lsn, self.error_text)


cdef str _describe(int error, uint64_t found, uint64_t wanted):
    if error == BAD_MAGIC:
        return f"page magic is {found:04X}, not {wanted:04X}"
    if error == BAD_FLAGS:
        return f"page has unknown flags {found:04X}"
    if error == BAD_PAGE_LSN:
        return f"page says that it belongs at {format_lsn(found)}"
    if error == BAD_HEADER_SIZE:
        return "page header is long where it must be short, or the reverse"
    if error == BAD_SEGMENT_SIZE:
        return f"page was written with segments of {found} and blocks of {wanted} bytes"
    if error == BAD_CONTINUATION:
        return f"page continues a record by {found} bytes, not {wanted}"
    if error == BAD_LENGTH:
        return f"record length {found} is not possible"
    if error == BAD_PREVIOUS:
        return f"record follows {format_lsn(found)}, not {format_lsn(wanted)}"
    return "record's checksum is wrong"
