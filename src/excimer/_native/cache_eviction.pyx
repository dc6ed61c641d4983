"""The evictor's leaf loop over an arena: compiled from libhydrate's own header, run without the GIL.

Not here: how much is to go, and when (`excimer.compute.cache_keeper`).
"""

import os

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef extern from "../../../csrc/libhydrate/eviction.h" nogil:
    uint32_t ARENA_BLOCK_SIZE
    uint32_t ARENA_FILES_OFFSET

    struct arena_header:
        uint32_t evicts

    struct eviction:
        arena_header *header
        int arena_fd
        int data_dir_fd
        uint64_t ingested_lsn
        uint64_t oldest_xid
        int clean_only
        int begins_epochs
        uint64_t evicted
        uint64_t retained
        uint64_t unsettled
        uint64_t epochs
        int punch_error

    const char *arena_fault(const arena_header *header, uint64_t size)
    void eviction_sweep(eviction *eviction, uint64_t wanted)
    void eviction_settle(eviction *eviction, uint64_t end_lsn, uint64_t oldest_xid)
    uint64_t eviction_used_bytes(const eviction *eviction)


cdef class Evictor:
    """Of an arena in memory, `path` being its file. One at a time uses an arena, and from one thread."""

    cdef unsigned char[::1] _arena
    cdef eviction *_state

    def __cinit__(self):
        self._state = <eviction *>calloc(1, sizeof(eviction))
        if self._state == NULL:
            raise MemoryError
        self._state.arena_fd = self._state.data_dir_fd = -1

    def __init__(self, unsigned char[::1] arena, str path, str data_dir, bint clean_only) -> None:
        """`clean_only`: what PostgreSQL has written stays, because the pageserver never gets it.

        Raises OSError, ValueError.
        """
        if arena.shape[0] < ARENA_FILES_OFFSET:
            raise ValueError("too short for an arena")
        cdef const char *fault = arena_fault(<arena_header *>&arena[0], <uint64_t>arena.shape[0])
        if fault != NULL:
            raise ValueError(fault.decode())
        if (<arena_header *>&arena[0]).evicts == 0:
            raise ValueError("nothing may be evicted of an arena that was not begun so")
        self._arena = arena
        self._state.header = <arena_header *>&arena[0]
        self._state.clean_only = clean_only
        self._state.arena_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._state.data_dir_fd = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """It is not used after."""
        for descriptor in (self._state.arena_fd, self._state.data_dir_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._state.arena_fd = self._state.data_dir_fd = -1
        self._arena = None

    def __dealloc__(self):
        free(self._state)

    def used_bytes(self) -> int:
        """Allocated on the disk for the files of the arena."""
        cdef uint64_t used
        with nogil:
            used = eviction_used_bytes(self._state)
        return used

    def sweep(
        self, uint64_t wanted_blocks, uint64_t ingested_lsn, bint begins_epochs
    ) -> tuple[int, int, int, int, int]:
        """Goes on round until so many blocks are evicted, or once.

        How many; how many that PostgreSQL has written must stay for now; how many were not settled yet;
        epochs begun; the error number of the disk, or 0. No epoch may begin between a question to PostgreSQL
        and `settle`.
        """
        self._state.ingested_lsn = ingested_lsn
        self._state.begins_epochs = begins_epochs
        with nogil:
            eviction_sweep(self._state, wanted_blocks)
        cdef eviction *state = self._state
        return state.evicted, state.retained, state.unsettled, state.epochs, state.punch_error

    def settle(self, uint64_t end_lsn, uint64_t oldest_xid) -> None:
        """What PostgreSQL said after the last sweep: the end of its WAL, and that all transactions below
        `oldest_xid` have ended.
        """
        eviction_settle(self._state, end_lsn, oldest_xid)
