"""How far each replication origin has been applied, as ingest knows it: a short list that is searched.

A cluster has as many as it has subscriptions, give or take, and PostgreSQL itself searches its array of
them for each commit. Rules: `replorigin_advance` in src/backend/replication/logical/origin.c.

Not here: which records say so (`wal_decoder`, `excimer.pageserver.special_records`).
"""

from libc.stdint cimport uint16_t, uint64_t
from libc.stdlib cimport free, realloc

cdef enum:
    NO_ORIGIN = 0
    DO_NOT_REPLICATE = 0xFFFF
    ADDED_ORIGINS = 8


cdef class OriginProgress:
    def __dealloc__(self):
        free(self.origins)

    def get(self, uint16_t origin):
        """The origin's remote LSN; None when it has no progress."""
        cdef Origin* found = self.find(origin)
        return None if found == NULL else found.remote_lsn

    def set(self, uint16_t origin, remote_lsn):
        """Whatever it was before; None: it has no progress any more."""
        cdef Origin* found = self.find(origin)
        if remote_lsn is not None:
            if found == NULL and self.advance(origin, 0) < 0:
                raise MemoryError
            self.find(origin).remote_lsn = remote_lsn
        elif found != NULL:
            self.count -= 1
            found[0] = self.origins[self.count]

    cdef Origin* find(self, uint16_t origin) noexcept nogil:
        """NULL when it has no progress. Valid until the next call that adds or removes one."""
        cdef size_t at
        for at in range(self.count):
            if self.origins[at].id == origin:
                return &self.origins[at]
        return NULL

    cdef int advance(self, uint16_t origin, uint64_t remote_lsn) noexcept nogil:
        """1 when the origin moved on, 0 when it did not (it never goes back), -1 when memory is out."""
        cdef Origin* found
        if origin == NO_ORIGIN or origin == DO_NOT_REPLICATE:
            return 0
        found = self.find(origin)
        if found != NULL:
            if remote_lsn <= found.remote_lsn:
                return 0
            found.remote_lsn = remote_lsn
            return 1
        if self.count == self.capacity:
            found = <Origin*> realloc(self.origins, (self.capacity + ADDED_ORIGINS) * sizeof(Origin))
            if found == NULL:
                return -1
            self.origins = found
            self.capacity += ADDED_ORIGINS
        self.origins[self.count].id = origin
        self.origins[self.count].remote_lsn = remote_lsn
        self.count += 1
        return 1
