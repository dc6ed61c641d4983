"""The part of an acceptor that appends move: two terms and a few LSNs, with the decision about each append.

Pure, like all of `consensus`, and native because every commit comes here at every safekeeper. There is one
copy of these rules: `consensus.acceptor` turns what they say into effects, which is what the simulator runs,
and `append_path` obeys them on the way from a socket to the disk.

Not here: votes, histories and truncation (`consensus.acceptor` decides and sets the fields).
"""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    NOBODY = -1


cdef class AcceptedWal:
    """Fields are `consensus.acceptor.Acceptor`'s of the same names. The caller serialises all calls."""

    def __cinit__(self):
        self.streaming_connection = NOBODY

    cdef AppendOutcome check_append(
        self, uint64_t term, uint64_t begin_lsn, uint64_t end_lsn
    ) noexcept nogil:
        """Whether WAL [begin_lsn, end_lsn) may be stored (C1). Changes nothing.

        After NEW_WAL the caller stores what lies above `write_lsn`, then calls `commit_append`, as it does
        after NOTHING_NEW. Within a term there is one stream, so bytes that are here are the same bytes.
        """
        if term < self.promised_term:
            return OLDER_TERM
        if term != self.adopted_term:
            return NOT_ADOPTED
        if begin_lsn > self.write_lsn:
            return LEAVES_GAP
        return NOTHING_NEW if end_lsn <= self.write_lsn else NEW_WAL

    cdef void commit_append(
        self, int64_t connection, uint64_t end_lsn, uint64_t commit_lsn, uint64_t horizon_lsn
    ) noexcept nogil:
        """What was checked is written up to `end_lsn`; it came from `connection`, which said the rest."""
        self.streaming_connection = connection
        self.take_announcement(commit_lsn, horizon_lsn)
        if end_lsn > self.write_lsn:
            self.write_lsn = end_lsn

    cdef bint take_flush(self, uint64_t end_lsn, uint64_t last_record_end_lsn) noexcept nogil:
        """WAL below `end_lsn` is durable (D1). False, and nothing changed, when no record can end there."""
        if not self.last_record_end_lsn <= last_record_end_lsn <= end_lsn:
            return False
        self.flush_lsn = end_lsn
        self.last_record_end_lsn = last_record_end_lsn
        self.advance_commit()
        return True

    cdef void take_announcement(self, uint64_t commit_lsn, uint64_t horizon_lsn) noexcept nogil:
        if commit_lsn > self.announced_commit_lsn:
            self.announced_commit_lsn = commit_lsn
        if horizon_lsn > self.horizon_lsn:
            self.horizon_lsn = horizon_lsn
        self.advance_commit()

    cdef void advance_commit(self) noexcept nogil:
        """Capped at a record boundary that is durable here, so that readers and scans can start there."""
        cdef uint64_t commit_lsn = self.announced_commit_lsn
        if commit_lsn > self.flush_lsn:
            commit_lsn = self.last_record_end_lsn
        if commit_lsn > self.commit_lsn:
            self.commit_lsn = commit_lsn

    def check(self, term: int, begin_lsn: int, end_lsn: int):
        return self.check_append(term, begin_lsn, end_lsn)

    def commit(self, connection: int, end_lsn: int, *, commit_lsn: int, horizon_lsn: int):
        self.commit_append(connection, end_lsn, commit_lsn, horizon_lsn)

    def report_flush(self, end_lsn: int, last_record_end_lsn: int):
        return self.take_flush(end_lsn, last_record_end_lsn)

    def announce(self, commit_lsn: int, horizon_lsn: int):
        self.take_announcement(commit_lsn, horizon_lsn)
