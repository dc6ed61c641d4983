"""Takes the free room between the objects of this process, for good, so that new ones lie beside each other.

A process that others are forked from shares its pages with them until somebody writes there. What a fork
makes goes into holes of a few bytes first, each in another page, and each costs it a page of its own: 0.6 MiB
of holes cost seven forks 5 MiB. Afterwards both allocators begin new pages.

CPython's own allocator (Objects/obmalloc.c) serves up to 512 bytes from pools of blocks of one size, those
that have free blocks first; the C library serves what is larger.

Not here: when that is of use (`excimer.supervisor.preload`), giving whole pages back that are free
(`excimer.io.processes`).
"""

import sys

from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc


cdef extern from "Python.h":
    void *PyObject_Malloc(size_t size)

cdef extern from "unistd.h":
    void *sbrk(long increment)

cdef enum:
    POOL_SIZE = 16384
    POOL_HEADER = 48
    BLOCK_STEP = 16
    BLOCK_MAX = 512
    BLOCKS_BYTES_MAX = 8 << 20
    CHUNK_STEP = 16
    CHUNK_HEADER = 8
    CHUNK_MIN = 32
    CHUNK_MAX = 65536
    CHUNK_FINE_MAX = 1024


def fill_object_holes():
    """Takes the free blocks of CPython's allocator; how many bytes that were, with half a MiB of new pools.

    Nothing where that allocator is not in use; where it lays out its pools in another way, some MiB at most.
    """
    cdef size_t size = BLOCK_STEP
    cdef size_t taken = 0
    if sys.getallocatedblocks() == 0:
        return 0
    while size <= BLOCK_MAX:
        taken += _take_blocks(size, BLOCKS_BYTES_MAX - taken)
        size += BLOCK_STEP
    return taken


cdef size_t _take_blocks(size_t size, size_t bytes_max) except? 0:
    """Until a whole pool came in a row, from its first block: then none was left that had been begun."""
    cdef size_t whole = (POOL_SIZE - POOL_HEADER) // size
    cdef size_t in_row = 0
    cdef size_t taken = 0
    cdef uintptr_t previous = 0
    cdef uintptr_t block
    while in_row < whole and taken + size <= bytes_max:
        block = <uintptr_t>PyObject_Malloc(size)
        if block == 0:
            break
        taken += size
        if block % POOL_SIZE == POOL_HEADER:
            in_row = 1
        elif in_row > 0 and block == previous + size:
            in_row += 1
        else:
            in_row = 0
        previous = block
    return taken


def fill_heap_holes():
    """Takes the free chunks of the C library's main heap, the large ones first; how many bytes that were.

    A chunk that lies behind the heap's end as it was says that no hole of that size is left.
    """
    cdef uintptr_t end = <uintptr_t>sbrk(0)
    cdef size_t chunk_size = CHUNK_MAX
    cdef size_t taken = 0
    cdef void *chunk
    while chunk_size >= CHUNK_MIN:
        chunk = malloc(chunk_size - CHUNK_HEADER)
        if chunk != NULL and <uintptr_t>chunk + chunk_size <= end:
            taken += chunk_size
            continue
        free(chunk)
        chunk_size -= CHUNK_STEP if chunk_size <= CHUNK_FINE_MAX else chunk_size // 128 * CHUNK_STEP
    return taken
