"""One replica of a timeline's WAL: promises a term, votes, adopts a history, accepts WAL of that term only.

State machine of the promise (all of it in the control file, C2)::

      VoteRequest(T), T above the promise: grant, remember who
      ProposerElected(T), T at or above the promise: adopt
     +-----------------------------+
     v                             |
    promised P ---ProposerElected(P)---> adopted P ---AppendRequest(P)---> writes WAL
     |  a request of a lower term is answered with P: its sender is fenced (C1)

The shell owns the bytes. It carries out effects in order, each done before the next starts, with one
exception that group commit needs: `FlushWal` (and `ReadWal`) may run beside what follows it, as long as

* a `TruncateWal` waits for a flush or a `ReadWal` in flight, and
* the flush is reported by `Acceptor.wal_flushed` with the effect itself; only a report moves
  `flush_lsn`, and only it is acknowledged. Of several queued flushes the last one suffices.

Why a stale flush report cannot lie: `FlushWal.truncation_count` must still be the acceptor's, so a
report from before a truncation is dropped; and if a higher term was promised while the disk worked,
the answer carries that term and its receiver is fenced instead of counting it.

Why truncating comes before the new history is on disk: WAL cut too early only lacks an uncommitted
tail. A history adopted too early would label another term's bytes as its own, and the next election
would trust them.

What every append moves, and whether it may, is `_native/accepted_wal.pyx`.

Not here: bytes on disk, record boundaries (the shell's WAL scanner reports them), tokens, sockets.
"""

from dataclasses import dataclass, replace
from typing import NewType, assert_never

import msgspec

from excimer._native.accepted_wal import AcceptedWal, AppendOutcome
from excimer.base.errors import CorruptionError, RefusedError
from excimer.base.ids import NodeId
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn
from excimer.consensus.term_history import BOOTSTRAP_TERM, TermHistory
from excimer.wire.safekeeping import (
    NO_PROPOSER,
    PROTOCOL_VERSION,
    WAL_CHUNK_SIZE_BYTES_MAX,
    AcceptorGreeting,
    AcceptorMessage,
    AppendRejected,
    AppendRequest,
    AppendResponse,
    CommitAnnounce,
    ElectedResponse,
    ProposerElected,
    ProposerGreeting,
    ProposerId,
    ProposerMessage,
    ReadWalRequest,
    SkipWal,
    Term,
    TimelineIdentity,
    VoteRequest,
    VoteResponse,
    WalChunk,
)

ConnectionId = NewType("ConnectionId", int)
"""The shell's number for a proposer's connection, 0 or above; never reused while the acceptor lives."""
_NOBODY = -1


class DivergenceBelowCommitError(CorruptionError):
    """An elected proposer's history would cut committed WAL: the quorum's safety is broken (D1)."""


class CommittedWalMissingError(CorruptionError):
    """The disk holds less WAL than the control file says is committed."""


class IdentityMismatchError(RefusedError):
    """The proposer's PostgreSQL is not the one this timeline belongs to."""


@dataclass(frozen=True, slots=True)
class AcceptorState:
    """What must survive a crash. The shell stores it, with the identity, in the control file."""

    promised_term: Term
    """C1: nothing of a lower term is accepted. Never falls."""
    voted_for: ProposerId
    """Who has the vote of `promised_term`; `NO_PROPOSER` when that term was learned, not voted for."""
    history: TermHistory
    """Its last term is at most `promised_term`; entries may start above the WAL that has arrived yet."""
    commit_lsn: Lsn
    """A record boundary, at or below what is durable here. May lag on disk: it only ever saves time."""
    horizon_lsn: Lsn
    """Committed, and every member has what is below."""

    @classmethod
    def bootstrap(cls, timeline_start_lsn: Lsn) -> "AcceptorState":
        return cls(
            promised_term=BOOTSTRAP_TERM,
            voted_for=NO_PROPOSER,
            history=TermHistory.bootstrap(timeline_start_lsn),
            commit_lsn=timeline_start_lsn,
            horizon_lsn=timeline_start_lsn,
        )


class PersistControl(msgspec.Struct, frozen=True):
    """Put `state` on disk, whole or not at all, before the next effect (C2)."""

    state: AcceptorState


class TruncateWal(msgspec.Struct, frozen=True):
    """Durably remove every byte at and above `lsn`, a record boundary, before the next effect.

    After it no crash may bring such a byte back: zero the rest of the segment and delete later ones,
    then sync. A leftover record that happens to fit behind a new one would be taken for the new term's.
    """

    lsn: Lsn


class DiscardWal(msgspec.Struct, frozen=True):
    """WAL begins anew at `state.commit_lsn`. First put `state` on disk, with that as the start of the WAL
    here, whole or not at all; then durably remove every byte of WAL; both before the next effect.

    A crash in between leaves bytes below the start only, which nobody reads, and nothing at or above it.
    """

    state: AcceptorState


class WriteWal(msgspec.Struct, frozen=True):
    """Write `wal` at `lsn`, which is where the WAL written so far ends. Need not be durable yet."""

    lsn: Lsn
    wal: bytes


class FlushWal(msgspec.Struct, frozen=True):
    """fdatasync what is written up to `end_lsn`, then report with `Acceptor.wal_flushed`."""

    end_lsn: Lsn
    truncation_count: int
    """How often WAL had been truncated when this was asked for."""


class ReadWal(msgspec.Struct, frozen=True):
    """Read WAL [start_lsn, end_lsn), which is durable here, and answer with a `WalChunk` of `term`.

    An empty chunk says that it cannot be read. Bounded by `WAL_CHUNK_SIZE_BYTES_MAX`.
    """

    connection: ConnectionId
    term: Term
    start_lsn: Lsn
    end_lsn: Lsn


class Send(msgspec.Struct, frozen=True):
    connection: ConnectionId
    message: AcceptorMessage


class CommitAdvanced(msgspec.Struct, frozen=True):
    """Readers may have WAL up to `commit_lsn`, a record boundary (C3)."""

    commit_lsn: Lsn


AcceptorEffect = (
    PersistControl | TruncateWal | DiscardWal | WriteWal | FlushWal | ReadWal | Send | CommitAdvanced
)


class Acceptor:
    """Drive it from one task. A method that raises has changed nothing; the connection is to be closed.

    `recovered_end_lsn` is the end of the last complete, CRC-valid record on disk, found by scanning
    from `state.commit_lsn`, and synced since: a killed process leaves WAL that only the page cache
    has, and what is scanned counts as durable from here on. Carry out `start()` before anything else.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        identity: TimelineIdentity,
        timeline_start_lsn: Lsn,
        state: AcceptorState,
        recovered_end_lsn: Lsn,
        wal_start_lsn: Lsn | None = None,
        durable_lsn: Lsn = INVALID_LSN,
    ) -> None:
        if recovered_end_lsn < state.commit_lsn:
            raise CommittedWalMissingError(
                f"WAL of timeline {identity.timeline_id} ends at {format_lsn(recovered_end_lsn)}, but is "
                f"committed up to {format_lsn(state.commit_lsn)}: rebuild this safekeeper from its peers"
            )
        self.node_id = node_id
        self.identity = identity
        self.timeline_start_lsn = timeline_start_lsn
        self.accepted = AcceptedWal()
        self.state = state
        self.wal_start_lsn = timeline_start_lsn if wal_start_lsn is None else wal_start_lsn
        """Oldest WAL still here; the shell raises it when it removes segments (D2)."""
        self.durable_lsn = durable_lsn
        """Below, all is in object storage: a pageserver's word, which the shell passes on. Ends a record."""
        self._set_end(recovered_end_lsn)
        self.accepted.announced_commit_lsn = state.commit_lsn
        self._truncation_count = 0

    @property
    def state(self) -> AcceptorState:
        """In memory at once; on disk as soon as its `PersistControl` is done. `commit_lsn` and
        `horizon_lsn` move without one: persist `state` whenever convenient (say, per segment)."""
        accepted = self.accepted
        return AcceptorState(
            promised_term=Term(accepted.promised_term),
            voted_for=self._voted_for,
            history=self._history,
            commit_lsn=Lsn(accepted.commit_lsn),
            horizon_lsn=Lsn(accepted.horizon_lsn),
        )

    @state.setter
    def state(self, state: AcceptorState) -> None:
        self._voted_for = state.voted_for
        self._history = state.history
        accepted = self.accepted
        accepted.promised_term = state.promised_term
        accepted.adopted_term = state.history.last.term
        accepted.commit_lsn = state.commit_lsn
        accepted.horizon_lsn = state.horizon_lsn

    @property
    def adopted_term(self) -> Term:
        """The term whose WAL may be appended, if it is also the promised one."""
        return Term(self.accepted.adopted_term)

    @property
    def write_lsn(self) -> Lsn:
        """End of the WAL that effects have written; at or above `flush_lsn`."""
        return Lsn(self.accepted.write_lsn)

    @property
    def flush_lsn(self) -> Lsn:
        """Everything below is durable. The only LSN that is ever acknowledged (D1)."""
        return Lsn(self.accepted.flush_lsn)

    @property
    def last_record_end_lsn(self) -> Lsn:
        """End of the last complete record at or below `flush_lsn`."""
        return Lsn(self.accepted.last_record_end_lsn)

    def _set_end(self, lsn: Lsn) -> None:
        """Nothing is stored above `lsn`, a record boundary; all below is durable."""
        self.accepted.write_lsn = self.accepted.flush_lsn = self.accepted.last_record_end_lsn = lsn

    def start(self) -> list[AcceptorEffect]:
        """First effects of a life: cut what lies beyond the last complete record.

        A crash may have kept later sectors of a write and lost earlier ones; see `TruncateWal`.
        """
        return [TruncateWal(self.write_lsn)]

    def receive(self, connection: ConnectionId, message: ProposerMessage) -> list[AcceptorEffect]:
        """Raises a `RefusedError` (answer it, close) or a `CorruptionError` (stop the timeline)."""
        match message:
            case AppendRequest():
                return self._append(connection, message)
            case CommitAnnounce():
                return self._announce(message)
            case ReadWalRequest():
                return self._read(connection, message)
            case SkipWal():
                return self._skip(connection, message)
            case VoteRequest():
                return self._vote(connection, message)
            case ProposerElected():
                return self._elected(connection, message)
            case ProposerGreeting():
                return self._greet(connection, message)
            case _:
                assert_never(message)

    def wal_flushed(self, flush: FlushWal, last_record_end_lsn: Lsn) -> list[AcceptorEffect]:
        """A `FlushWal` is done; `last_record_end_lsn` ends the last complete record below its `end_lsn`."""
        if flush.truncation_count != self._truncation_count or flush.end_lsn <= self.flush_lsn:
            return []
        before_lsn = self.accepted.commit_lsn
        if not self.accepted.report_flush(flush.end_lsn, last_record_end_lsn):
            raise CorruptionError(
                f"the last record's end {format_lsn(last_record_end_lsn)} is not between "
                f"{format_lsn(self.last_record_end_lsn)} and the flushed {format_lsn(flush.end_lsn)}"
            )
        effects = self._committed_since(before_lsn)
        if self.accepted.streaming_connection >= 0:
            receiver = ConnectionId(self.accepted.streaming_connection)
            effects.append(Send(receiver, self._append_response()))
        return effects

    def disconnected(self, connection: ConnectionId) -> None:
        """The shell will carry out no more `Send` to this connection."""
        if self.accepted.streaming_connection == connection:
            self.accepted.streaming_connection = _NOBODY

    def _greet(self, connection: ConnectionId, greeting: ProposerGreeting) -> list[AcceptorEffect]:
        if greeting.version != PROTOCOL_VERSION:
            raise RefusedError(
                f"protocol version {greeting.version}; this safekeeper speaks {PROTOCOL_VERSION}: upgrade one"
            )
        self._check_identity(greeting.identity)
        answer = AcceptorGreeting(
            node_id=self.node_id,
            identity=self.identity,
            term=self.state.promised_term,
            timeline_start_lsn=self.timeline_start_lsn,
            flush_lsn=self.flush_lsn,
            commit_lsn=self.state.commit_lsn,
        )
        return [Send(connection, answer)]

    def _check_identity(self, theirs: TimelineIdentity) -> None:
        mine = self.identity
        pairs = (
            ("tenant", theirs.tenant_id, mine.tenant_id),
            ("timeline", theirs.timeline_id, mine.timeline_id),
            ("PostgreSQL version", theirs.pg_version or mine.pg_version, mine.pg_version),
            ("system id", theirs.system_id or mine.system_id, mine.system_id),
            (
                "WAL segment size",
                theirs.wal_segment_size_bytes or mine.wal_segment_size_bytes,
                mine.wal_segment_size_bytes,
            ),
        )
        for what, given, expected in pairs:
            if given != expected:
                raise IdentityMismatchError(
                    f"the proposer's {what} is {given}, this timeline's is {expected}"
                )

    def _vote(self, connection: ConnectionId, request: VoteRequest) -> list[AcceptorEffect]:
        effects: list[AcceptorEffect] = []
        granted = self._may_vote(request)
        if granted and request.term != self.state.promised_term:
            self.state = replace(self.state, promised_term=request.term, voted_for=request.proposer_id)
            effects.append(PersistControl(self.state))
        answer = VoteResponse(
            term=self.state.promised_term,
            granted=granted,
            flush_lsn=self.flush_lsn,
            last_record_end_lsn=self.last_record_end_lsn,
            wal_start_lsn=self.wal_start_lsn,
            commit_lsn=self.state.commit_lsn,
            history=self.state.history.up_to(self.flush_lsn).entries,
        )
        effects.append(Send(connection, answer))
        return effects

    def _may_vote(self, request: VoteRequest) -> bool:
        """One vote per term; asking again is allowed, because the first answer may have been lost."""
        if request.term > self.state.promised_term:
            return True
        return request.term == self.state.promised_term and request.proposer_id == self.state.voted_for

    def _elected(self, connection: ConnectionId, elected: ProposerElected) -> list[AcceptorEffect]:
        effects: list[AcceptorEffect] = []
        if self._accepts(elected.term):
            # Repeated by a reconnect: cutting again would cut WAL acknowledged since.
            if self.adopted_term != elected.term:
                effects = self._adopt(elected)
            self.accepted.streaming_connection = connection
        answer = ElectedResponse(
            term=self.state.promised_term,
            flush_lsn=self.flush_lsn,
            wal_start_lsn=self.wal_start_lsn,
            commit_lsn=self.state.commit_lsn,
            durable_lsn=self.durable_lsn,
        )
        effects.append(Send(connection, answer))
        return effects

    def _accepts(self, term: Term) -> bool:
        """C1. An elected proposer of a higher term is proof of its election: it needs no vote of ours."""
        return term >= self.state.promised_term

    def _adopt(self, elected: ProposerElected) -> list[AcceptorEffect]:
        history = TermHistory(elected.history)
        if history.last.term != elected.term:
            raise RefusedError(f"the history of term {elected.term} ends with term {history.last.term}")
        cut_lsn = self._cut_lsn(history)
        effects: list[AcceptorEffect] = []
        if cut_lsn is not None:
            self._set_end(cut_lsn)
            self._truncation_count += 1
            effects.append(TruncateWal(cut_lsn))
        voted = self.state.voted_for if self.state.promised_term == elected.term else NO_PROPOSER
        self.state = replace(
            self.state,
            promised_term=elected.term,
            voted_for=voted,
            history=history.trimmed(self.state.horizon_lsn),
        )
        effects.append(PersistControl(self.state))
        self.accepted.announced_commit_lsn = self.accepted.commit_lsn
        return effects

    def _cut_lsn(self, history: TermHistory) -> Lsn | None:
        """Where this log must be cut to be a prefix of `history`'s; None when it is one already."""
        common_lsn = self.state.history.common_end(self.flush_lsn, history)
        if common_lsn == self.write_lsn:
            return None
        # Written but not flushed WAL goes too, with the partial record before it: cuts are at boundaries.
        cut_lsn = min(common_lsn, self.last_record_end_lsn)
        if cut_lsn < self.state.commit_lsn:
            raise DivergenceBelowCommitError(
                f"the elected history {history.entries} parts from this safekeeper's WAL at "
                f"{format_lsn(cut_lsn)}, below its commit LSN {format_lsn(self.state.commit_lsn)}"
            )
        return cut_lsn

    def _append(self, connection: ConnectionId, request: AppendRequest) -> list[AcceptorEffect]:
        accepted, wal = self.accepted, request.wal
        before_lsn, write_lsn = accepted.commit_lsn, Lsn(accepted.write_lsn)
        end_lsn = request.begin_lsn + len(wal)
        outcome = accepted.check(request.term, request.begin_lsn, end_lsn)
        if outcome == AppendOutcome.OLDER_TERM:
            return [Send(connection, self._append_response())]
        if outcome == AppendOutcome.NOT_ADOPTED:
            return [Send(connection, AppendRejected(Term(accepted.promised_term), INVALID_LSN))]
        if outcome == AppendOutcome.LEAVES_GAP:
            return [Send(connection, AppendRejected(Term(accepted.promised_term), write_lsn))]
        accepted.commit(connection, end_lsn, commit_lsn=request.commit_lsn, horizon_lsn=request.horizon_lsn)
        effects = self._committed_since(before_lsn)
        if outcome == AppendOutcome.NOTHING_NEW:
            return [*effects, Send(connection, self._append_response())]
        known_size_bytes = write_lsn - request.begin_lsn
        effects.append(WriteWal(write_lsn, wal[known_size_bytes:] if known_size_bytes else wal))
        effects.append(FlushWal(self.write_lsn, self._truncation_count))
        return effects

    def _skip(self, connection: ConnectionId, skip: SkipWal) -> list[AcceptorEffect]:
        """As Raft installs a snapshot, which here is in object storage: the log is what it would be had all
        below arrived. The leader's log holds what is committed, hence this one stays a prefix of it.
        """
        if not self._may_skip(skip):
            return [Send(connection, self._append_response())]
        self._set_end(skip.start_lsn)
        self._truncation_count += 1
        self.wal_start_lsn = skip.start_lsn
        self.state = replace(self.state, commit_lsn=skip.start_lsn)
        self.accepted.announced_commit_lsn = max(self.accepted.announced_commit_lsn, skip.start_lsn)
        return [
            DiscardWal(self.state),
            CommitAdvanced(skip.start_lsn),
            Send(connection, self._append_response()),
        ]

    def _may_skip(self, skip: SkipWal) -> bool:
        """Not for another term's leader (C1), not what is here, and not what only other members may have."""
        is_leaders = skip.term == self.state.promised_term == self.adopted_term
        return is_leaders and self.write_lsn < skip.start_lsn <= self.durable_lsn

    def _append_response(self) -> AppendResponse:
        accepted = self.accepted
        return AppendResponse(Term(accepted.promised_term), Lsn(accepted.flush_lsn), Lsn(accepted.commit_lsn))

    def _announce(self, announce: CommitAnnounce) -> list[AcceptorEffect]:
        if announce.term != self.accepted.promised_term or announce.term != self.adopted_term:
            return []
        before_lsn = self.accepted.commit_lsn
        self.accepted.announce(announce.commit_lsn, announce.horizon_lsn)
        return self._committed_since(before_lsn)

    def _committed_since(self, before_lsn: int) -> list[AcceptorEffect]:
        commit_lsn = Lsn(self.accepted.commit_lsn)
        return [CommitAdvanced(commit_lsn)] if commit_lsn > before_lsn else []

    def _read(self, connection: ConnectionId, request: ReadWalRequest) -> list[AcceptorEffect]:
        end_lsn = Lsn(min(request.end_lsn, self.flush_lsn, request.start_lsn + WAL_CHUNK_SIZE_BYTES_MAX))
        readable = (
            request.term == self.state.promised_term == self.adopted_term
            and self.wal_start_lsn <= request.start_lsn < end_lsn
        )
        if not readable:
            start_lsn = max(request.start_lsn, self.wal_start_lsn)
            return [Send(connection, WalChunk(self.state.promised_term, start_lsn, b""))]
        return [ReadWal(connection, request.term, request.start_lsn, end_lsn)]
