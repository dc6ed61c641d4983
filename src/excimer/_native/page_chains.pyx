"""Chains of values for a run of adjacent pages, and the pages made of them.

One `PageChains` serves one read: `count` adjacent block keys at one LSN. Layers offer their values
from the newest layer to the oldest, and within a key from the newest value to the oldest, until
every chain is closed by a value that starts it. Then the pages are restored in place:

    restore_bases -> (Python decompresses lz4 and zstd) -> set_image_data
    repeat: take_native -> set_page;  take_redo -> set_page     until both are empty
    take_pages

Value payloads stay where they are (layer blocks, WAL buffers); `held` keeps their owners alive.

Not here: which layers to visit (`excimer.storage.plan.read_path`), and redo itself.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    static inline uint32_t block_of_key(const unsigned char *key) {
        return ((uint32_t)key[14] << 24) | ((uint32_t)key[15] << 16) | ((uint32_t)key[16] << 8) | key[17];
    }
    static inline uint32_t field_of_key(const unsigned char *key, int at) {
        return ((uint32_t)key[at] << 24) | ((uint32_t)key[at + 1] << 16)
             | ((uint32_t)key[at + 2] << 8) | key[at + 3];
    }

    /* PostgreSQL's LZ (src/common/pg_lzcompress.c): a control byte, then eight items, each a literal or
       a tag of 2-3 bytes (12-bit offset, 4-bit length - 3, and one more length byte when that is 18).
       Returns the bytes written, or -1 on malformed input. */
    static int pglz_decompress_into(const unsigned char *source, int source_size,
                                    unsigned char *target, int target_size) {
        const unsigned char *source_end = source + source_size;
        unsigned char *at = target, *target_end = target + target_size;
        while (source < source_end && at < target_end) {
            unsigned control = *source++;
            for (int bit = 0; bit < 8 && source < source_end && at < target_end; bit++, control >>= 1) {
                if (!(control & 1)) { *at++ = *source++; continue; }
                if (source_end - source < 2) return -1;
                int length = (source[0] & 0x0f) + 3;
                int offset = ((source[0] & 0xf0) << 4) | source[1];
                source += 2;
                if (length == 18) {
                    if (source >= source_end) return -1;
                    length += *source++;
                }
                if (offset == 0 || offset > at - target) return -1;
                if (length > target_end - at) length = (int)(target_end - at);
                for (; length > 0; length--, at++) *at = at[-offset];
            }
        }
        return source == source_end ? (int)(at - target) : -1;
    }
    """
    unsigned int block_of_key(const unsigned char* key) nogil
    unsigned int field_of_key(const unsigned char* key, int at) nogil
    int pglz_decompress_into(
        const unsigned char* source, int source_size, unsigned char* target, int target_size
    ) nogil

cdef enum:
    KEY_SIZE = 18
    BLOCK_SIZE = 8192
    VALUE_HEAD_SIZE = 32
    IMAGE = 1
    WAL_RECORD = 2
    NATIVE = 3
    TOMBSTONE = 4
    ZERO_PAGE = 5
    PAGE_IMAGE = 6
    FLAG_STARTS_CHAIN = 1
    PAGE_IMAGE_HEAD_SIZE = 6
    COMPRESSION_NONE = 0
    COMPRESSION_PGLZ = 1
    REDO_OPERATION = 0x52
    CLOSED_BY_VALUE = 1
    CLOSED_EMPTY = 2
    PAGES_WITH_GIL_MAX = 32


class MalformedValueError(ValueError):
    """A stored value is not of its kind's shape."""


cdef class PageChains:
    def __cinit__(self, bytes first_key, int count, unsigned long long lsn):
        if len(first_key) != KEY_SIZE or count <= 0:
            raise ValueError("a key of 18 bytes and a positive count are needed")
        memcpy(self.first_key, <const unsigned char*> first_key, KEY_SIZE)
        self.first_block = block_of_key(self.first_key)
        if <unsigned long long> self.first_block + <unsigned int> count > 0x100000000:
            raise ValueError("block numbers end at 2^32 - 1")
        self.count = count
        self.open_count = count
        self.lsn = lsn
        self.held = []
        self.slots = <Slot*> malloc(count * sizeof(Slot))
        if self.slots is NULL:
            raise MemoryError
        for slot in range(count):
            self.slots[slot].bound = lsn + 1 if lsn != <unsigned long long> -1 else lsn
            self.slots[slot].oldest = -1
            self.slots[slot].cursor = -1
            self.slots[slot].closed = 0
            self.slots[slot].has_page = 0

    def __dealloc__(self):
        free(self.slots)
        free(self.links)

    def hold(self, owner: object) -> None:
        """Keeps `owner`, whose bytes the chains point into, alive as long as these chains."""
        self.held.append(owner)

    cdef int offer(
        self, int slot, unsigned char kind, unsigned char flags, unsigned long long lsn,
        const unsigned char* payload, unsigned int length,
    ) except -1 nogil:
        """Takes one value unless the chain is closed or already has a value at or below `lsn`."""
        cdef Slot* place = &self.slots[slot]
        cdef Link* link
        cdef Link* grown
        if place.closed or lsn >= place.bound:
            return 0
        if self.link_count == self.link_capacity:
            self.link_capacity = self.link_capacity * 2 if self.link_capacity else 64
            grown = <Link*> realloc(self.links, self.link_capacity * sizeof(Link))
            if grown is NULL:
                raise MemoryError
            self.links = grown
        link = &self.links[self.link_count]
        link.payload = payload
        link.length = length
        link.kind = kind
        link.lsn = lsn
        link.newer = place.oldest
        place.oldest = self.link_count
        place.bound = lsn
        self.link_count += 1
        if flags & FLAG_STARTS_CHAIN or (kind != WAL_RECORD and kind != NATIVE):
            place.closed = CLOSED_BY_VALUE
            self.open_count -= 1
        return 1

    def add_block(self, bytes block, unsigned long long low_lsn, unsigned long long high_lsn) -> None:
        """Offers the values of a decompressed layer block with low_lsn < LSN <= high_lsn.

        Raises `MalformedValueError` if the block's structure is broken.
        """
        cdef const unsigned char* at = <const unsigned char*> PyBytes_AS_STRING(block)
        cdef const unsigned char* end = at + len(block)
        cdef unsigned int length
        cdef unsigned long long lsn
        cdef long long slot
        cdef int order, broken = 0
        # Microseconds: to let go of the GIL, with other threads waiting for it, costs more than that.
        while at < end:
            if end - at < VALUE_HEAD_SIZE:
                broken = 1
                break
            memcpy(&length, at + 20, 4)
            memcpy(&lsn, at + 24, 8)
            if end - at - VALUE_HEAD_SIZE < <long long> length:
                broken = 1
                break
            order = memcmp(at, self.first_key, KEY_SIZE - 4)
            if order > 0:
                break
            if order == 0:
                slot = <long long> block_of_key(at) - self.first_block
                if slot >= self.count:
                    break
                if slot >= 0 and low_lsn < lsn <= high_lsn:
                    self.offer(<int> slot, at[18], at[19], lsn, at + VALUE_HEAD_SIZE, length)
            at += VALUE_HEAD_SIZE + length
        if broken:
            raise MalformedValueError("a value reaches past the end of its block")
        self.held.append(block)

    def close_all(self) -> None:
        """Nothing older exists: what is still open starts from a page of zeros."""
        for slot in range(self.count):
            if not self.slots[slot].closed:
                self.slots[slot].closed = CLOSED_EMPTY
        self.open_count = 0

    def oldest_lsn(self) -> int:
        """Of all values taken; 0xFFFFFFFFFFFFFFFF if there is none."""
        cdef unsigned long long oldest = <unsigned long long> -1
        cdef Slot* place
        for slot in range(self.count):
            place = &self.slots[slot]
            if place.oldest >= 0 and self.links[place.oldest].lsn < oldest:
                oldest = self.links[place.oldest].lsn
        return oldest

    def drop_below(self, int slot, unsigned long long lsn) -> None:
        """Values below `lsn` are of an earlier life of the block: above them the chain begins with zeros.

        For when all values are collected, and before pages are restored.
        """
        cdef Slot* place
        if not 0 <= slot < self.count:
            raise IndexError(slot)
        place = &self.slots[slot]
        while place.oldest >= 0 and self.links[place.oldest].lsn < lsn:
            place.oldest = self.links[place.oldest].newer
            if not place.closed:
                self.open_count -= 1
            place.closed = CLOSED_EMPTY

    def has_values(self, int slot) -> bool:
        if not 0 <= slot < self.count:
            raise IndexError(slot)
        return self.slots[slot].oldest >= 0

    def values(self, int slot) -> list:
        """(LSN, kind, whether it starts the chain, payload) of the values taken so far, newest first.

        For showing how a page comes about; never on the way of a real read.
        """
        cdef list found = []
        cdef Link* link
        cdef int at, is_first = 1
        if not 0 <= slot < self.count:
            raise IndexError(slot)
        at = self.slots[slot].oldest
        while at >= 0:
            link = &self.links[at]
            starts = is_first and self.slots[slot].closed == CLOSED_BY_VALUE
            found.append((link.lsn, <int> link.kind, bool(starts), <bytes> link.payload[:link.length]))
            is_first = 0
            at = link.newer
        found.reverse()
        return found

    def restore_bases(self) -> list:
        """Fills in where each chain starts. Returns (slot, compression, data, size) of images to decompress.

        Raises `MalformedValueError` for an image of the wrong size.
        """
        cdef list compressed = []
        cdef Link* link
        cdef int slot = 0, outcome
        self.output = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> self.count * BLOCK_SIZE)
        self.pages = <unsigned char*> PyBytes_AS_STRING(self.output)
        while slot < self.count:
            # Once for all pages, not once for each: threads that wait for the GIL wake up at every release.
            # For few pages not at all: to have it back may take milliseconds when others compute.
            if self.count <= PAGES_WITH_GIL_MAX:
                outcome = self.restore_from(&slot)
            else:
                with nogil:
                    outcome = self.restore_from(&slot)
            if outcome == 0:
                break
            link = &self.links[self.slots[slot - 1].oldest]
            if outcome < 0:
                raise MalformedValueError(
                    f"slot {slot - 1}: the value of kind {link.kind} at LSN {link.lsn:#x} is malformed"
                )
            hole = link.payload[4] | (<int> link.payload[5]) << 8
            data = link.payload[PAGE_IMAGE_HEAD_SIZE:link.length]
            compressed.append((slot - 1, outcome, data, BLOCK_SIZE - hole))
        return compressed

    cdef int restore_from(self, int* slot) except -2 nogil:
        """Bases from this slot on, up to the first with an outcome that is not 0; the slot after it."""
        cdef int outcome = 0
        while slot[0] < self.count and outcome == 0:
            outcome = self.restore_base(slot[0])
            slot[0] += 1
        return outcome

    cdef int restore_base(self, int slot) except -2 nogil:
        """0: done, or nothing to do; -1: malformed; otherwise the compression that Python must undo.

        Leaves the cursor at the first link to apply on top of the base.
        """
        cdef Slot* place = &self.slots[slot]
        cdef Link* link
        cdef unsigned char* page = self.pages + <Py_ssize_t> slot * BLOCK_SIZE
        cdef unsigned char plain[BLOCK_SIZE]
        cdef int hole_offset, hole_length, size
        if place.oldest < 0:
            memset(page, 0, BLOCK_SIZE)
            return 0
        link = &self.links[place.oldest]
        if link.kind == WAL_RECORD or link.kind == NATIVE:
            memset(page, 0, BLOCK_SIZE)
            place.cursor = place.oldest
            return 0
        place.cursor = link.newer
        place.has_page = 1
        if link.kind == IMAGE:
            if link.length != BLOCK_SIZE:
                return -1
            memcpy(page, link.payload, BLOCK_SIZE)
            return 0
        if link.kind != PAGE_IMAGE:
            memset(page, 0, BLOCK_SIZE)
            return 0 if link.kind == ZERO_PAGE or link.kind == TOMBSTONE else -1
        if link.length < PAGE_IMAGE_HEAD_SIZE:
            return -1
        hole_offset = link.payload[2] | <int> link.payload[3] << 8
        hole_length = link.payload[4] | <int> link.payload[5] << 8
        size = BLOCK_SIZE - hole_length
        if size < 0 or hole_offset > size:
            return -1
        if link.payload[0] == COMPRESSION_NONE:
            if link.length - PAGE_IMAGE_HEAD_SIZE != <unsigned int> size:
                return -1
            self.fill_page(slot, link, link.payload + PAGE_IMAGE_HEAD_SIZE)
            return 0
        if link.payload[0] == COMPRESSION_PGLZ:
            if pglz_decompress_into(
                link.payload + PAGE_IMAGE_HEAD_SIZE, link.length - PAGE_IMAGE_HEAD_SIZE, plain, size
            ) != size:
                return -1
            self.fill_page(slot, link, plain)
            return 0
        return link.payload[0]

    cdef void fill_page(self, int slot, Link* link, const unsigned char* plain) noexcept nogil:
        """Puts the hole back and stamps pd_lsn, unless the page is new (pd_upper is zero)."""
        cdef unsigned char* page = self.pages + <Py_ssize_t> slot * BLOCK_SIZE
        cdef int hole_offset = link.payload[2] | <int> link.payload[3] << 8
        cdef int hole_length = link.payload[4] | <int> link.payload[5] << 8
        cdef unsigned int half
        memcpy(page, plain, hole_offset)
        memset(page + hole_offset, 0, hole_length)
        memcpy(
            page + hole_offset + hole_length, plain + hole_offset, BLOCK_SIZE - hole_offset - hole_length
        )
        if page[14] or page[15]:
            half = <unsigned int> (link.lsn >> 32)
            memcpy(page, &half, 4)
            half = <unsigned int> link.lsn
            memcpy(page + 4, &half, 4)

    def set_image_data(self, int slot, bytes data) -> None:
        """The decompressed content of an image that `restore_bases` returned."""
        cdef Link* link
        if not 0 <= slot < self.count or self.slots[slot].oldest < 0:
            raise IndexError(slot)
        link = &self.links[self.slots[slot].oldest]
        size = BLOCK_SIZE - (link.payload[4] | <int> link.payload[5] << 8)
        if link.kind != PAGE_IMAGE or len(data) != size:
            raise MalformedValueError(f"slot {slot}: an image of the wrong size")
        self.fill_page(slot, link, <const unsigned char*> PyBytes_AS_STRING(data))

    def take_native(self) -> list:
        """(slot, LSN, payload) of the native records that come next, in the order to apply them."""
        cdef list taken = []
        cdef Slot* place
        cdef Link* link
        cdef int slot
        for slot in range(self.count):
            place = &self.slots[slot]
            while place.cursor >= 0 and self.links[place.cursor].kind == NATIVE:
                link = &self.links[place.cursor]
                taken.append((slot, link.lsn, <bytes> link.payload[:link.length]))
                place.cursor = link.newer
                place.has_page = 1
        return taken

    def take_redo(self) -> tuple:
        """(slots, redo requests) of the runs of WAL records that come next.

        Raises `MalformedValueError` for a value that can neither start nor continue a chain.
        """
        cdef list slots = [], requests = []
        cdef Slot* place
        cdef int slot
        for slot in range(self.count):
            place = &self.slots[slot]
            if place.cursor < 0:
                continue
            if self.links[place.cursor].kind == WAL_RECORD:
                slots.append(slot)
                requests.append(self.redo_request(slot))
            elif self.links[place.cursor].kind != NATIVE:
                raise MalformedValueError(f"slot {slot}: unexpected kind {self.links[place.cursor].kind}")
        return slots, requests

    cdef bytes redo_request(self, int slot):
        """Layout: `docs/architecture/interfaces.md`, redo workers. Moves the cursor past the run."""
        cdef Slot* place = &self.slots[slot]
        cdef Link* link
        cdef int at = place.cursor
        cdef unsigned int head[10]
        cdef unsigned int count = 0, record_length
        cdef unsigned char flag_init = 0
        cdef size_t size = 40, padded
        cdef unsigned char* out
        cdef bytes request
        # Without a base a chain is either complete in itself (will-init) or builds on a page of zeros.
        flag_init = not place.has_page and at == place.oldest and self.starts_itself(slot)
        if not flag_init:
            size += BLOCK_SIZE
        while at >= 0 and self.links[at].kind == WAL_RECORD:
            if self.links[at].length < 8:
                raise MalformedValueError(f"slot {slot}: a WAL record of {self.links[at].length} bytes")
            size += 24 + ((self.links[at].length - 8 + 7) & ~<size_t> 7)
            count += 1
            at = self.links[at].newer
        request = PyBytes_FromStringAndSize(NULL, size)
        out = <unsigned char*> PyBytes_AS_STRING(request)
        head[0] = <unsigned int> (size - 8)
        head[1] = REDO_OPERATION
        head[2] = field_of_key(self.first_key, 1)
        head[3] = field_of_key(self.first_key, 5)
        head[4] = field_of_key(self.first_key, 9)
        head[5] = self.first_key[13]
        head[6] = self.first_block + slot
        head[7] = 0 if flag_init else 1
        head[8] = count
        head[9] = 0
        memcpy(out, head, 40)
        out += 40
        if not flag_init:
            memcpy(out, self.pages + <Py_ssize_t> slot * BLOCK_SIZE, BLOCK_SIZE)
            out += BLOCK_SIZE
        while place.cursor >= 0 and self.links[place.cursor].kind == WAL_RECORD:
            link = &self.links[place.cursor]
            record_length = link.length - 8
            padded = (record_length + 7) & ~<size_t> 7
            memcpy(out, link.payload, 8)
            memcpy(out + 8, &link.lsn, 8)
            memcpy(out + 16, &record_length, 4)
            memset(out + 20, 0, 4)
            memcpy(out + 24, link.payload + 8, record_length)
            memset(out + 24 + record_length, 0, padded - record_length)
            out += 24 + padded
            place.cursor = link.newer
        place.has_page = 1
        return request

    cdef bint starts_itself(self, int slot):
        cdef Slot* place = &self.slots[slot]
        return place.closed == CLOSED_BY_VALUE and self.links[place.oldest].kind == WAL_RECORD

    def page(self, int slot) -> bytes:
        """The page as restored so far."""
        if not 0 <= slot < self.count or self.pages is NULL:
            raise IndexError(slot)
        return self.pages[<Py_ssize_t> slot * BLOCK_SIZE:<Py_ssize_t> (slot + 1) * BLOCK_SIZE]

    def set_page(self, int slot, page) -> None:
        """The page that redo, or a native record, made."""
        cdef const unsigned char[::1] view = page
        if not 0 <= slot < self.count or self.pages is NULL:
            raise IndexError(slot)
        if view.shape[0] != BLOCK_SIZE:
            raise MalformedValueError(f"slot {slot}: a page of {view.shape[0]} bytes")
        memcpy(self.pages + <Py_ssize_t> slot * BLOCK_SIZE, &view[0], BLOCK_SIZE)

    def take_pages(self) -> bytes:
        """All pages, `count` x 8192 bytes. Call once, at the end: the chains are used up."""
        cdef bytes output = self.output
        if output is None:
            raise ValueError("no pages were restored, or they were taken already")
        self.output = None
        self.pages = NULL
        return output


def decompress_pglz(bytes data, int size) -> bytes:
    """`size` bytes from PostgreSQL's own compression. Raises `MalformedValueError`."""
    cdef bytes plain = PyBytes_FromStringAndSize(NULL, size)
    if pglz_decompress_into(
        <const unsigned char*> PyBytes_AS_STRING(data), <int> len(data),
        <unsigned char*> PyBytes_AS_STRING(plain), size,
    ) != size:
        raise MalformedValueError("pglz data is malformed")
    return plain


def scan_block(
    bytes block, bytes start, bytes end,
    unsigned long long low_lsn, unsigned long long high_lsn, dict found,
) -> None:
    """Adds to `found` the newest (LSN, kind, payload) with low_lsn < LSN <= high_lsn of each key in
    [start, end) that is not yet in it. Raises `MalformedValueError` if the block's structure is broken.
    """
    cdef const unsigned char* at = <const unsigned char*> PyBytes_AS_STRING(block)
    cdef const unsigned char* block_end = at + len(block)
    cdef const unsigned char* start_key = <const unsigned char*> PyBytes_AS_STRING(start)
    cdef const unsigned char* end_key = <const unsigned char*> PyBytes_AS_STRING(end)
    cdef unsigned int length
    cdef unsigned long long lsn
    if len(start) != KEY_SIZE or len(end) != KEY_SIZE:
        raise ValueError("keys have 18 bytes")
    while at < block_end:
        if block_end - at < VALUE_HEAD_SIZE:
            raise MalformedValueError("a value reaches past the end of its block")
        memcpy(&length, at + 20, 4)
        memcpy(&lsn, at + 24, 8)
        if block_end - at - VALUE_HEAD_SIZE < <long long> length:
            raise MalformedValueError("a value reaches past the end of its block")
        if memcmp(at, end_key, KEY_SIZE) >= 0:
            return
        if low_lsn < lsn <= high_lsn and memcmp(at, start_key, KEY_SIZE) >= 0:
            key = <bytes> at[:KEY_SIZE]
            if key not in found:
                found[key] = (lsn, at[18], <bytes> (at + VALUE_HEAD_SIZE)[:length])
        at += VALUE_HEAD_SIZE + length


def key_runs(bytes block) -> list:
    """The block's distinct keys as (first key, count) of keys whose block numbers follow each other.

    Raises `MalformedValueError` if the block's structure is broken.
    """
    cdef const unsigned char* at = <const unsigned char*> PyBytes_AS_STRING(block)
    cdef const unsigned char* end = at + len(block)
    cdef const unsigned char* first = NULL
    cdef const unsigned char* last = NULL
    cdef unsigned int length, count = 0
    cdef list runs = []
    while at < end:
        if end - at < VALUE_HEAD_SIZE:
            raise MalformedValueError("a value reaches past the end of its block")
        memcpy(&length, at + 20, 4)
        if end - at - VALUE_HEAD_SIZE < <long long> length:
            raise MalformedValueError("a value reaches past the end of its block")
        if last is NULL or memcmp(at, last, KEY_SIZE) != 0:
            if (
                last is not NULL and memcmp(at, last, KEY_SIZE - 4) == 0
                and block_of_key(at) == block_of_key(last) + 1
            ):
                count += 1
            else:
                if first is not NULL:
                    runs.append((<bytes> first[:KEY_SIZE], count))
                first = at
                count = 1
            last = at
        at += VALUE_HEAD_SIZE + length
    if first is not NULL:
        runs.append((<bytes> first[:KEY_SIZE], count))
    return runs
