"""What `commit_path` uses of `led_wal`, without the GIL."""

from libc.stdint cimport uint64_t


cdef struct MemberProgress:
    bint is_connected  # greeted on the present connection
    bint has_adopted  # it has this term's history on disk: its flush LSN counts
    bint is_streamed  # `sent_lsn` is known
    uint64_t flush_lsn
    uint64_t commit_lsn
    uint64_t sent_lsn
    uint64_t announced_commit_lsn


cdef struct WalRange:
    uint64_t begin_lsn
    uint64_t end_lsn


cdef class MemberWal:
    cdef MemberProgress progress


cdef class LedWal:
    cdef public uint64_t start_lsn
    cdef public uint64_t window_start_lsn
    cdef public uint64_t window_end_lsn
    cdef public uint64_t commit_lsn
    cdef public uint64_t horizon_lsn
    cdef readonly uint64_t chunk_size_bytes
    cdef readonly uint64_t in_flight_size_bytes_max
    cdef readonly list members
    cdef MemberProgress** progress
    cdef uint64_t* flush_lsns
    cdef size_t member_count
    cdef uint64_t* ends  # record ends that may be committed next: `first_end` up to `last_end`
    cdef size_t first_end
    cdef size_t last_end
    cdef size_t end_capacity

    cdef uint64_t newest_boundary(self) noexcept nogil
    cdef bint add_boundary(self, uint64_t lsn) noexcept nogil
    cdef bint append_wal(self, uint64_t end_lsn, uint64_t last_record_end_lsn) noexcept nogil
    cdef void take_answer(self, MemberProgress* member, uint64_t flush_lsn, uint64_t commit_lsn) noexcept nogil
    cdef uint64_t flushed_by_majority(self) noexcept nogil
    cdef bint advance(self) noexcept nogil
    cdef bint begin_append(self, MemberProgress* member, WalRange* range) noexcept nogil
