"""A set of transaction ids, for transactions that end with millions of subtransactions; without the GIL.

One entry for each page of commit status, 32,768 xids. Its xids are positions of two bytes in ascending
order, and from 2,048 on a bitmap of 4 KiB: as in a Roaring bitmap. So memory is at most twice that of the
values that come of it and a table of 2 MiB: 33 MiB for a commit record of a gigabyte whose ids follow each
other, 256 MiB for one whose ids are strewn over all that can be in use.

Not here: where the ids come from (`long_xact`), how the values are laid out (`pgformat.native_records`).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove, memset

from excimer._native.batch_builder cimport StorageKey
from excimer._native.change_set cimport (
    SEGMENT_BLOCKS,
    SLRU_COMMIT_TS,
    SLRU_XACT,
    ChangeSet,
)
from excimer._native.little_endian cimport put_u16, put_u64

cdef enum:
    XACTS_PER_PAGE = 32768
    PAGE_COUNT = 131072
    BITMAP_SIZE = 4096
    POSITIONS_MAX = 2048
    POSITIONS_MIN = 8
    COMMIT_TIMES_PER_PAGE = 819
    COMMIT_TIME_SET_SIZE = 103
    OP_CLOG_STATUS = 1
    OP_COMMIT_TIMES = 4
    OP_CLOG_STATUS_SET = 8
    OP_COMMIT_TIMES_SET = 9
    SLRU_BLOCK = 0x20


cdef struct TimesPage:
    uint32_t number
    uint32_t count
    uint8_t[COMMIT_TIME_SET_SIZE] bits


cdef class XidSet:
    def __dealloc__(self):
        self.clear()

    cdef void clear(self) noexcept nogil:
        """Empty, and without memory."""
        cdef uint32_t number
        if self.pages != NULL:
            for number in range(PAGE_COUNT):
                free(self.pages[number].data)
        free(self.pages)
        self.pages = NULL
        self.is_out_of_memory = False

    cdef void add(self, uint32_t xid) noexcept nogil:
        """Fast for ids that ascend, as PostgreSQL writes them."""
        cdef XidPage* page
        cdef uint16_t position = xid % XACTS_PER_PAGE
        cdef uint16_t* positions
        cdef uint32_t low, high, middle
        if self.pages == NULL:
            self.pages = <XidPage*> calloc(PAGE_COUNT, sizeof(XidPage))
            if self.pages == NULL:
                self.is_out_of_memory = True
                return
        page = &self.pages[xid // XACTS_PER_PAGE]
        if not page.is_bitmap and page.count == page.capacity and self.make_room(page) < 0:
            self.is_out_of_memory = True
            return
        if page.is_bitmap:
            page.count += not page.data[position // 8] >> position % 8 & 1
            page.data[position // 8] |= <uint8_t> (1 << position % 8)
            return
        positions = <uint16_t*> page.data
        low = high = page.count
        if high and positions[high - 1] >= position:
            low = 0
            while low < high:
                middle = (low + high) // 2
                if positions[middle] < position:
                    low = middle + 1
                else:
                    high = middle
            if positions[low] == position:
                return
            memmove(positions + low + 1, positions + low, 2 * (page.count - low))
        positions[low] = position
        page.count += 1

    cdef int make_room(self, XidPage* page) noexcept nogil:
        """For one more; -1 when memory is out."""
        cdef uint16_t capacity = 2 * page.capacity if page.capacity else POSITIONS_MIN
        cdef uint8_t* grown
        if page.count == POSITIONS_MAX:
            return self.become_bitmap(page)
        grown = <uint8_t*> realloc(page.data, 2 * capacity)
        if grown == NULL:
            return -1
        page.data = grown
        page.capacity = capacity
        return 0

    cdef int become_bitmap(self, XidPage* page) noexcept nogil:
        cdef uint8_t* bits = <uint8_t*> calloc(BITMAP_SIZE, 1)
        cdef uint16_t* positions = <uint16_t*> page.data
        cdef uint32_t at
        if bits == NULL:
            return -1
        for at in range(page.count):
            bits[positions[at] // 8] |= <uint8_t> (1 << positions[at] % 8)
        free(page.data)
        page.data = bits
        page.is_bitmap = True
        return 0

    cdef void touch(self, ChangeSet changes, bint with_commit_times) noexcept nogil:
        """The farthest page of each segment that values will lie on: it grows up to there."""
        cdef uint32_t number
        if self.pages == NULL:
            return
        for number in range(PAGE_COUNT):
            if self.pages[number].count:
                changes.touch_slru_segment(SLRU_XACT, number)
        if with_commit_times:
            self.put_commit_times(changes, NULL)

    cdef void put_status(self, ChangeSet changes, uint8_t status) noexcept nogil:
        """One value for each page of commit status."""
        cdef uint32_t number, size
        cdef const XidPage* page
        cdef StorageKey key
        cdef uint8_t* place
        if self.pages == NULL:
            return
        for number in range(PAGE_COUNT):
            page = &self.pages[number]
            if not page.count:
                continue
            size = BITMAP_SIZE if page.is_bitmap else 2 * page.count
            key = slru_page_key(SLRU_XACT, number)
            place = changes.put_native(&key, 4 + size)
            if place == NULL:
                return
            place[0], place[1] = OP_CLOG_STATUS_SET if page.is_bitmap else OP_CLOG_STATUS, status
            put_u16(place + 2, page.count)
            memcpy(place + 4, page.data, size)

    cdef void put_commit_times(self, ChangeSet changes, const CommitTimes* said) noexcept nogil:
        """One value for each page of commit times; where nothing is said, the pages are only touched."""
        cdef uint32_t number, at
        cdef const XidPage* page
        cdef TimesPage times
        if self.pages == NULL:
            return
        memset(&times, 0, sizeof(times))
        for number in range(PAGE_COUNT):
            page = &self.pages[number]
            if not page.count:
                continue
            if page.is_bitmap:
                for at in range(XACTS_PER_PAGE):
                    if page.data[at // 8] >> at % 8 & 1:
                        add_time(changes, said, &times, number * XACTS_PER_PAGE + at)
            else:
                for at in range(page.count):
                    add_time(
                        changes, said, &times, number * XACTS_PER_PAGE + (<const uint16_t*> page.data)[at]
                    )
        put_times(changes, said, &times)


cdef inline StorageKey slru_page_key(uint32_t slru, uint32_t page) noexcept nogil:
    cdef StorageKey key
    key.kind, key.fork = SLRU_BLOCK, 0
    key.spc, key.db, key.rel, key.block = slru, 0, page // SEGMENT_BLOCKS, page % SEGMENT_BLOCKS
    return key


cdef inline void add_time(
    ChangeSet changes, const CommitTimes* said, TimesPage* times, uint32_t xid
) noexcept nogil:
    """Ids come in ascending order: with the next page this one is whole."""
    cdef uint32_t number = xid // COMMIT_TIMES_PER_PAGE
    cdef uint32_t entry = xid % COMMIT_TIMES_PER_PAGE
    if number != times.number:
        put_times(changes, said, times)
        memset(times, 0, sizeof(TimesPage))
        times.number = number
    times.bits[entry // 8] |= <uint8_t> (1 << entry % 8)
    times.count += 1


cdef void put_times(ChangeSet changes, const CommitTimes* said, const TimesPage* times) noexcept nogil:
    """The shorter of a list and a set, or a touch alone."""
    cdef bint is_set = 2 * times.count > COMMIT_TIME_SET_SIZE
    cdef uint32_t entry
    cdef StorageKey key = slru_page_key(SLRU_COMMIT_TS, times.number)
    cdef uint8_t* place
    if not times.count:
        return
    if said == NULL:
        changes.touch_slru_segment(SLRU_COMMIT_TS, times.number)
        return
    place = changes.put_native(&key, 14 + (COMMIT_TIME_SET_SIZE if is_set else 2 * times.count))
    if place == NULL:
        return
    place[0] = OP_COMMIT_TIMES_SET if is_set else OP_COMMIT_TIMES
    put_u16(place + 2, <uint16_t> times.count)
    put_u64(place + 4, <uint64_t> said.time)
    put_u16(place + 12, said.origin)
    place += 14
    if is_set:
        memcpy(place, times.bits, COMMIT_TIME_SET_SIZE)
        return
    for entry in range(COMMIT_TIMES_PER_PAGE):
        if times.bits[entry // 8] >> entry % 8 & 1:
            put_u16(place, <uint16_t> entry)
            place += 2
