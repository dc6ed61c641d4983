"""Decompressed layer blocks that were used lately, shared by all timelines, bounded in bytes.

A block is named by its layer's number in this process and its own in the layer; layers are immutable, so an
entry never goes stale. The least recently used goes first: entries are an array, linked both by hash bucket
and by age. The GIL is what keeps threads apart: no call lets go of it, and none calls back into Python.
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdlib cimport calloc, free, realloc

cdef enum:
    FIRST_BUCKETS = 1024
    FIRST_ENTRIES = 256


cdef inline unsigned int bucket_of(unsigned long long id) noexcept nogil:
    return <unsigned int> ((id * <unsigned long long> 0x9E3779B97F4A7C15) >> 32)


cdef class BlockCache:
    def __cinit__(self, unsigned long long size_bytes_max):
        self.size_bytes_max = size_bytes_max
        self.newest = self.oldest = self.free_entry = -1
        self.bucket_mask = FIRST_BUCKETS - 1
        self.buckets = <int*> calloc(FIRST_BUCKETS, sizeof(int))  # entry + 1; 0: none
        if self.buckets is NULL:
            raise MemoryError

    def __dealloc__(self):
        while self.oldest >= 0:
            self.drop_oldest()
        free(self.entries)
        free(self.buckets)

    def __len__(self) -> int:
        return self.entry_count

    def try_get(self, unsigned int layer_number, unsigned int block_number) -> bytes | None:
        cdef PyObject* found = self.find(layer_number, block_number)
        return None if found is NULL else <object> found

    def add(self, unsigned int layer_number, unsigned int block_number, bytes block not None) -> None:
        """Then forgets the oldest as long as there is too much, this one itself if it is too large."""
        cdef unsigned long long id = <unsigned long long> layer_number << 32 | block_number
        cdef CachedBlock* entry
        cdef int at
        cdef unsigned int bucket
        if self.find(layer_number, block_number) is not NULL:
            self.hits -= 1
            return
        self.misses -= 1
        if self.free_entry < 0:
            self.grow()
        at = self.free_entry
        entry = &self.entries[at]
        self.free_entry = entry.next_in_bucket
        entry.id = id
        entry.block = <PyObject*> block
        Py_INCREF(block)
        bucket = bucket_of(id) & self.bucket_mask
        entry.next_in_bucket = self.buckets[bucket]
        self.buckets[bucket] = at + 1
        self.make_newest(at)
        self.entry_count += 1
        self.size_bytes += len(block)
        while self.size_bytes > self.size_bytes_max:
            self.drop_oldest()

    def clear(self) -> None:
        while self.oldest >= 0:
            self.drop_oldest()

    cdef PyObject* find(self, unsigned int layer_number, unsigned int block_number) noexcept nogil:
        """Borrowed: hold it before anything is added."""
        cdef unsigned long long id = <unsigned long long> layer_number << 32 | block_number
        cdef int at = self.buckets[bucket_of(id) & self.bucket_mask] - 1
        while at >= 0 and self.entries[at].id != id:
            at = self.entries[at].next_in_bucket - 1
        if at < 0:
            self.misses += 1
            return NULL
        self.hits += 1
        if at != self.newest:
            self.unlink(at)
            self.make_newest(at)
        return self.entries[at].block

    cdef void unlink(self, int at) noexcept nogil:
        cdef CachedBlock* entry = &self.entries[at]
        if entry.newer >= 0:
            self.entries[entry.newer].older = entry.older
        else:
            self.newest = entry.older
        if entry.older >= 0:
            self.entries[entry.older].newer = entry.newer
        else:
            self.oldest = entry.newer

    cdef void make_newest(self, int at) noexcept nogil:
        self.entries[at].newer = -1
        self.entries[at].older = self.newest
        if self.newest >= 0:
            self.entries[self.newest].newer = at
        else:
            self.oldest = at
        self.newest = at

    cdef int drop_oldest(self) except -1:
        cdef int at = self.oldest
        cdef CachedBlock* entry = &self.entries[at]
        cdef int* link = &self.buckets[bucket_of(entry.id) & self.bucket_mask]
        while link[0] != at + 1:
            link = &self.entries[link[0] - 1].next_in_bucket
        link[0] = entry.next_in_bucket
        self.unlink(at)
        entry.next_in_bucket = self.free_entry
        self.free_entry = at
        self.entry_count -= 1
        block = <object> entry.block
        entry.block = NULL
        self.size_bytes -= len(<bytes> block)
        Py_DECREF(block)
        return 0

    cdef int grow(self) except -1:
        """More entries, all free; and as many buckets as entries at least."""
        cdef int capacity = self.entry_capacity * 2 if self.entry_capacity else FIRST_ENTRIES
        cdef int at
        cdef unsigned int mask = self.bucket_mask, bucket
        cdef int* buckets
        cdef CachedBlock* entries = <CachedBlock*> realloc(self.entries, capacity * sizeof(CachedBlock))
        if entries is NULL:
            raise MemoryError
        self.entries = entries
        while mask < <unsigned int> capacity:
            mask = mask * 2 + 1
        if mask != self.bucket_mask:
            buckets = <int*> calloc(<size_t> mask + 1, sizeof(int))
            if buckets is NULL:
                raise MemoryError
            free(self.buckets)
            self.buckets = buckets
            self.bucket_mask = mask
            at = self.newest
            while at >= 0:
                bucket = bucket_of(entries[at].id) & mask
                entries[at].next_in_bucket = buckets[bucket]
                buckets[bucket] = at + 1
                at = entries[at].older
        for at in range(self.entry_capacity, capacity):
            entries[at].block = NULL
            entries[at].next_in_bucket = self.free_entry
            self.free_entry = at
        self.entry_capacity = capacity
        return 0
