"""Merges sorted streams of raw layer blocks into one, in blocks again: by key, then newest first.

Each source gives blocks of values in that order (`excimer.storage.format.layer_block`); no two sources
have a value of the same key and LSN. `step` merges without the GIL until it needs another block of a
source, which `feed` gives it, or has filled a block, which `take_block` hands out. Memory is one
block per source and one of output, however much is merged.

What is not in order, doubled, outside its source's LSNs or broken in structure raises, and never
goes into the output: a merged layer replaces its sources.

Not here: files, compression, where to cut them (`excimer.storage.engine.merge_job`).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy

from excimer._native.page_chains import MalformedValueError

cdef enum:
    KEY_SIZE = 18
    VALUE_HEAD_SIZE = 32

    BLOCK_READY = -1
    FINISHED = -2

    FAILED_TORN = -10
    FAILED_LSN = -11
    FAILED_ORDER = -12
    FAILED_DOUBLE = -13
    FAILED_MEMORY = -14

cdef struct Source:
    const unsigned char* at
    const unsigned char* end
    unsigned long long low_lsn
    unsigned long long high_lsn
    unsigned long long lsn  # of the value at `at`; when that has been passed, still of that one
    unsigned int length
    unsigned char previous_key[KEY_SIZE]
    unsigned char is_ready
    unsigned char has_previous
    unsigned char is_finished

cdef dict failures = {
    FAILED_TORN: "a value reaches past the end of its block",
    FAILED_LSN: "a value lies outside its layer's LSNs",
    FAILED_ORDER: "values are not in order",
    FAILED_DOUBLE: "two layers hold a value of the same key and LSN",
}


cdef class LayerMerge:
    cdef Source* sources
    cdef int source_count
    cdef list held
    cdef unsigned char* output
    cdef size_t output_size
    cdef size_t output_capacity
    cdef size_t target_size
    cdef unsigned long long low_lsn
    cdef unsigned long long high_lsn
    cdef unsigned int count
    cdef unsigned char first_key[KEY_SIZE]
    cdef unsigned char last_key[KEY_SIZE]
    cdef unsigned long long last_lsn
    cdef bint has_last
    cdef readonly int failed_source
    cdef readonly bint at_key_boundary
    cdef readonly unsigned long long value_count
    cdef readonly unsigned long long key_count

    def __cinit__(self, list lsn_ranges, size_t target_size_bytes):
        """`lsn_ranges`: of each source (low, high): its values have low < LSN <= high."""
        self.source_count = <int> len(lsn_ranges)
        self.sources = <Source*> calloc(self.source_count if self.source_count else 1, sizeof(Source))
        if self.sources is NULL:
            raise MemoryError
        self.target_size = target_size_bytes
        self.held = [None] * self.source_count
        self.at_key_boundary = True
        self.failed_source = -1
        for number in range(self.source_count):
            self.sources[number].low_lsn = lsn_ranges[number][0]
            self.sources[number].high_lsn = lsn_ranges[number][1]

    def __dealloc__(self):
        free(self.sources)
        free(self.output)

    def feed(self, int source, bytes block) -> None:
        """The next block of a source; an empty one ends it."""
        cdef Source* place
        if not 0 <= source < self.source_count:
            raise IndexError(source)
        place = &self.sources[source]
        if place.is_finished or place.is_ready or place.at != place.end:
            raise ValueError(f"source {source} needs no block")
        self.held[source] = block
        place.at = <const unsigned char*> PyBytes_AS_STRING(block)
        place.end = place.at + len(block)
        place.is_finished = len(block) == 0

    def step(self, bint end_at_key) -> int:
        """The number of the source that needs a block; -1: take the block; -2: all is merged and taken.

        With `end_at_key` the block ends where its last key does, however small it is then.
        Raises `MalformedValueError`; the merge is of no use after that.
        """
        cdef int outcome
        with nogil:
            outcome = self.merge(end_at_key)
        if outcome == FAILED_MEMORY:
            raise MemoryError
        if outcome < FINISHED:
            raise MalformedValueError(f"source {self.failed_source}: {failures[outcome]}")
        return outcome

    cdef int merge(self, bint end_at_key) noexcept nogil:
        cdef int number, least, order
        cdef Source* best
        cdef Source* other
        cdef size_t step
        cdef bint same_key
        while True:
            least = -1
            for number in range(self.source_count):
                other = &self.sources[number]
                if not other.is_ready:
                    if other.is_finished:
                        continue
                    if other.at == other.end:
                        return number
                    order = self.read_head(other)
                    if order != 0:
                        self.failed_source = number
                        return order
                if least < 0:
                    least = number
                    continue
                best = &self.sources[least]
                order = memcmp(other.at, best.at, KEY_SIZE)
                if order < 0 or (order == 0 and other.lsn > best.lsn):
                    least = number
                elif order == 0 and other.lsn == best.lsn:
                    self.failed_source = number
                    return FAILED_DOUBLE
            if least < 0:
                self.at_key_boundary = True
                return BLOCK_READY if self.output_size else FINISHED
            best = &self.sources[least]
            same_key = self.has_last and memcmp(best.at, self.last_key, KEY_SIZE) == 0
            step = VALUE_HEAD_SIZE + <size_t> best.length
            if self.output_size and (
                self.output_size + step > self.target_size or (end_at_key and not same_key)
            ):
                self.at_key_boundary = not same_key
                return BLOCK_READY
            if same_key and best.lsn >= self.last_lsn:
                self.failed_source = least
                return FAILED_ORDER
            if self.append(best, step, same_key) != 0:
                return FAILED_MEMORY

    cdef int read_head(self, Source* source) noexcept nogil:
        """Checks the value at the source's cursor. 0 or a failure."""
        cdef unsigned long long lsn
        cdef int order
        if source.end - source.at < VALUE_HEAD_SIZE:
            return FAILED_TORN
        memcpy(&source.length, source.at + 20, 4)
        memcpy(&lsn, source.at + 24, 8)
        if source.end - source.at - VALUE_HEAD_SIZE < <long long> source.length:
            return FAILED_TORN
        if lsn <= source.low_lsn or lsn > source.high_lsn:
            return FAILED_LSN
        if source.has_previous:
            order = memcmp(source.at, source.previous_key, KEY_SIZE)
            if order < 0 or (order == 0 and lsn >= source.lsn):
                return FAILED_ORDER
        source.lsn = lsn
        source.is_ready = 1
        return 0

    cdef int append(self, Source* source, size_t step, bint same_key) noexcept nogil:
        cdef size_t capacity
        cdef unsigned char* grown
        if self.output_size + step > self.output_capacity:
            capacity = self.output_size + step
            capacity = capacity if capacity > self.target_size else self.target_size
            grown = <unsigned char*> realloc(self.output, capacity)
            if grown is NULL:
                return -1
            self.output = grown
            self.output_capacity = capacity
        memcpy(self.output + self.output_size, source.at, step)
        if self.output_size == 0:
            memcpy(self.first_key, source.at, KEY_SIZE)
            self.low_lsn = source.lsn
            self.high_lsn = source.lsn
        if not same_key:
            memcpy(self.last_key, source.at, KEY_SIZE)
            self.has_last = True
            self.key_count += 1
        self.last_lsn = source.lsn
        self.low_lsn = source.lsn if source.lsn < self.low_lsn else self.low_lsn
        self.high_lsn = source.lsn if source.lsn > self.high_lsn else self.high_lsn
        self.output_size += step
        self.count += 1
        self.value_count += 1
        memcpy(source.previous_key, source.at, KEY_SIZE)
        source.has_previous = 1
        source.is_ready = 0
        source.at += step
        return 0

    def take_block(self) -> tuple:
        """(raw block, first key, last key, lowest LSN, highest LSN, value count) of what `step` filled."""
        if not self.output_size:
            raise ValueError("there is no block to take")
        taken = (
            PyBytes_FromStringAndSize(<char*> self.output, self.output_size),
            <bytes> self.first_key[:KEY_SIZE],
            <bytes> self.last_key[:KEY_SIZE],
            self.low_lsn,
            self.high_lsn,
            self.count,
        )
        self.output_size = 0
        self.count = 0
        return taken
