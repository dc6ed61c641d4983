"""Shared declarations of `block_cache.pyx`, for native code that reads cached blocks."""

from cpython.object cimport PyObject

cdef struct CachedBlock:
    unsigned long long id
    PyObject* block
    int newer
    int older
    int next_in_bucket

cdef class BlockCache:
    cdef readonly unsigned long long size_bytes
    cdef readonly unsigned long long hits
    cdef readonly unsigned long long misses
    cdef public unsigned long long size_bytes_max
    cdef CachedBlock* entries
    cdef int entry_count
    cdef int entry_capacity
    cdef int free_entry
    cdef int* buckets
    cdef unsigned int bucket_mask
    cdef int newest
    cdef int oldest

    cdef PyObject* find(self, unsigned int layer_number, unsigned int block_number) noexcept nogil
    cdef void unlink(self, int at) noexcept nogil
    cdef void make_newest(self, int at) noexcept nogil
    cdef int drop_oldest(self) except -1
    cdef int grow(self) except -1
