"""What `append_path` uses of `accepted_wal`, without the GIL."""

from libc.stdint cimport int64_t, uint64_t


cpdef enum AppendOutcome:
    OLDER_TERM
    NOT_ADOPTED
    LEAVES_GAP
    NOTHING_NEW
    NEW_WAL


cdef class AcceptedWal:
    cdef public uint64_t promised_term
    cdef public uint64_t adopted_term
    cdef public uint64_t write_lsn
    cdef public uint64_t flush_lsn
    cdef public uint64_t last_record_end_lsn
    cdef public uint64_t announced_commit_lsn
    cdef public uint64_t commit_lsn
    cdef public uint64_t horizon_lsn
    cdef public int64_t streaming_connection

    cdef AppendOutcome check_append(
        self, uint64_t term, uint64_t begin_lsn, uint64_t end_lsn
    ) noexcept nogil
    cdef void commit_append(
        self, int64_t connection, uint64_t end_lsn, uint64_t commit_lsn, uint64_t horizon_lsn
    ) noexcept nogil
    cdef bint take_flush(self, uint64_t end_lsn, uint64_t last_record_end_lsn) noexcept nogil
    cdef void take_announcement(self, uint64_t commit_lsn, uint64_t horizon_lsn) noexcept nogil
    cdef void advance_commit(self) noexcept nogil
