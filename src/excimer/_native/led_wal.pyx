"""The part of a leader that WAL and its acknowledgements move: LSNs, what may be sent, what is committed.

Pure, like all of `consensus`, and native because every commit comes here. There is one copy of these rules:
`consensus.proposer` turns what they say into effects, which is what the simulator runs, and `commit_path`
obeys them on the way between sockets.

Not here: elections, repair, what the window drops (`consensus.proposer` decides and sets the fields).
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove

cdef enum:
    END_COUNT_MIN = 64


cdef class MemberWal:
    """How much of the leader's WAL a member has. Its flush and commit LSNs outlive a connection."""

    @property
    def connected(self):
        """Greeted on the present connection."""
        return bool(self.progress.is_connected)

    @connected.setter
    def connected(self, bint value):
        self.progress.is_connected = value

    @property
    def adopted(self):
        """It has this term's history on disk: its flush LSN counts."""
        return bool(self.progress.has_adopted)

    @adopted.setter
    def adopted(self, bint value):
        self.progress.has_adopted = value

    @property
    def flush_lsn(self):
        """Highest that it has acknowledged in this term. A restart takes back at most a part of a record.
        """
        return self.progress.flush_lsn

    @flush_lsn.setter
    def flush_lsn(self, uint64_t value):
        self.progress.flush_lsn = value

    @property
    def commit_lsn(self):
        """Highest that it has said it knows as committed."""
        return self.progress.commit_lsn

    @commit_lsn.setter
    def commit_lsn(self, uint64_t value):
        self.progress.commit_lsn = value

    @property
    def sent_lsn(self):
        """End of what was sent on this connection; None until it has said where to begin."""
        return self.progress.sent_lsn if self.progress.is_streamed else None

    @sent_lsn.setter
    def sent_lsn(self, value):
        self.progress.is_streamed = value is not None
        self.progress.sent_lsn = 0 if value is None else value

    @property
    def announced_commit_lsn(self):
        """Highest commit LSN that was sent on this connection."""
        return self.progress.announced_commit_lsn

    @announced_commit_lsn.setter
    def announced_commit_lsn(self, uint64_t value):
        self.progress.announced_commit_lsn = value


cdef class LedWal:
    """Fields are `consensus.leader_state.LeaderState`'s of the same names. The caller serialises calls."""

    def __cinit__(
        self,
        members,
        *,
        uint64_t start_lsn,
        uint64_t chunk_size_bytes,
        uint64_t in_flight_size_bytes_max,
        **_,
    ):
        cdef MemberWal member
        self.members = list(members)
        self.member_count = len(self.members)
        self.progress = <MemberProgress**> calloc(max(self.member_count, 1), sizeof(MemberProgress*))
        self.flush_lsns = <uint64_t*> calloc(max(self.member_count, 1), sizeof(uint64_t))
        if self.progress == NULL or self.flush_lsns == NULL:
            raise MemoryError("no memory for a leader's members")
        for index in range(self.member_count):
            member = self.members[index]
            self.progress[index] = &member.progress
        self.start_lsn = self.window_start_lsn = self.window_end_lsn = start_lsn
        self.chunk_size_bytes = chunk_size_bytes
        self.in_flight_size_bytes_max = in_flight_size_bytes_max
        if not self.add_boundary(start_lsn):
            raise MemoryError("no memory for a leader's record ends")

    @classmethod
    def __class_getitem__(cls, _):
        """For type checkers, who are told what kind of members it has."""
        return cls

    def __dealloc__(self):
        free(self.progress)
        free(self.flush_lsns)
        free(self.ends)

    @property
    def boundaries(self):
        """Record ends that may be committed next, rising, all above `commit_lsn`; a copy."""
        return [self.ends[index] for index in range(self.first_end, self.last_end)]

    @boundaries.setter
    def boundaries(self, lsns):
        self.first_end = self.last_end = 0
        for lsn in lsns:
            if not self.add_boundary(lsn):
                raise MemoryError("no memory for a leader's record ends")

    @property
    def newest_boundary_lsn(self):
        """End of the last complete record known."""
        return self.newest_boundary()

    @property
    def window_size_bytes(self):
        return self.window_end_lsn - self.window_start_lsn

    def wal_appended(self, uint64_t end_lsn, uint64_t last_record_end_lsn):
        """The window now ends at `end_lsn`, the last complete record in it at the other. Raises MemoryError.
        """
        if not self.append_wal(end_lsn, last_record_end_lsn):
            raise MemoryError("no memory for a leader's record ends")

    def answered(self, MemberWal member not None, uint64_t flush_lsn, uint64_t commit_lsn):
        """A member that follows this leader has flushed, and knows as committed, that much."""
        self.take_answer(&member.progress, flush_lsn, commit_lsn)

    def majority_flush_lsn(self):
        """How far a majority has flushed, of members whose log is known to be a prefix of this term's; 0
        for nowhere."""
        return self.flushed_by_majority()

    def advance_commit(self):
        """Whether the commit LSN has risen (D1)."""
        return self.advance()

    def next_append(self, MemberWal member not None):
        """The WAL [begin, end) to send to a member now, which counts as sent then; None for nothing."""
        cdef WalRange range
        return (range.begin_lsn, range.end_lsn) if self.begin_append(&member.progress, &range) else None

    cdef uint64_t newest_boundary(self) noexcept nogil:
        return self.ends[self.last_end - 1] if self.last_end > self.first_end else self.commit_lsn

    cdef bint add_boundary(self, uint64_t lsn) noexcept nogil:
        """False without memory."""
        cdef size_t count = self.last_end - self.first_end
        cdef size_t capacity = self.end_capacity
        cdef uint64_t* ends
        if self.last_end == capacity:
            if count <= capacity // 2 and count:
                memmove(self.ends, self.ends + self.first_end, count * sizeof(uint64_t))
            elif count:
                capacity *= 2
                ends = <uint64_t*> realloc(self.ends, capacity * sizeof(uint64_t))
                if ends == NULL:
                    return False
                self.ends = ends
                self.end_capacity = capacity
                memmove(self.ends, self.ends + self.first_end, count * sizeof(uint64_t))
            elif capacity == 0:
                self.ends = <uint64_t*> calloc(END_COUNT_MIN, sizeof(uint64_t))
                if self.ends == NULL:
                    return False
                self.end_capacity = END_COUNT_MIN
            self.first_end = 0
            self.last_end = count
        self.ends[self.last_end] = lsn
        self.last_end += 1
        return True

    cdef bint append_wal(self, uint64_t end_lsn, uint64_t last_record_end_lsn) noexcept nogil:
        """As `wal_appended`; False, and nothing changed, without memory."""
        if last_record_end_lsn > self.newest_boundary() and not self.add_boundary(last_record_end_lsn):
            return False
        self.window_end_lsn = end_lsn
        return True

    cdef void take_answer(
        self, MemberProgress* member, uint64_t flush_lsn, uint64_t commit_lsn
    ) noexcept nogil:
        if member.is_streamed and member.sent_lsn < flush_lsn:
            # A late rejection had set it back, perhaps below all that the window and donors still have.
            member.sent_lsn = flush_lsn
        member.flush_lsn = max(member.flush_lsn, flush_lsn)
        member.commit_lsn = max(member.commit_lsn, commit_lsn)

    cdef uint64_t flushed_by_majority(self) noexcept nogil:
        """The highest LSN that more than half of the members have flushed; who has not adopted has 0."""
        cdef size_t index, place
        cdef uint64_t lsn
        for index in range(self.member_count):  # sorted as they come, the highest first
            lsn = self.progress[index].flush_lsn if self.progress[index].has_adopted else 0
            place = index
            while place and self.flush_lsns[place - 1] < lsn:
                self.flush_lsns[place] = self.flush_lsns[place - 1]
                place -= 1
            self.flush_lsns[place] = lsn
        return self.flush_lsns[self.member_count // 2]

    cdef bint advance(self) noexcept nogil:
        """To the highest record end at or below what a majority has flushed, never below `start_lsn`."""
        cdef uint64_t flushed_lsn = self.flushed_by_majority()
        cdef size_t reached = self.first_end
        if flushed_lsn < self.start_lsn:
            return False
        while reached < self.last_end and self.ends[reached] <= flushed_lsn:
            reached += 1
        if reached == self.first_end:
            return False
        self.commit_lsn = self.ends[reached - 1]
        self.first_end = reached
        return True

    cdef bint begin_append(self, MemberProgress* member, WalRange* range) noexcept nogil:
        """As `next_append`, for a member whom the window can serve.

        Group commit: while an append is under way, WAL gathers until its answer unless it fills a chunk.
        """
        cdef uint64_t end_lsn
        if (
            not member.is_streamed
            or not member.is_connected
            or not member.has_adopted
            or not self.window_start_lsn <= member.sent_lsn < self.window_end_lsn
            or member.sent_lsn >= member.flush_lsn + self.in_flight_size_bytes_max
        ):
            return False
        end_lsn = min(member.sent_lsn + self.chunk_size_bytes, self.window_end_lsn)
        if member.sent_lsn > member.flush_lsn and end_lsn - member.sent_lsn < self.chunk_size_bytes:
            return False
        range.begin_lsn = member.sent_lsn
        range.end_lsn = end_lsn
        member.sent_lsn = end_lsn
        member.announced_commit_lsn = self.commit_lsn
        return True
