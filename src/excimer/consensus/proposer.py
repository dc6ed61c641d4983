"""The one writer of a timeline's WAL: wins an election, repairs the members, commits by majority.

::

    GREETING --majority greeted--> CAMPAIGNING --majority voted--> LEADING
                                      |    ^                          |
                       refused: LOST -+    +- campaign() (back off    +--> FENCED, for ever
                                              first: the shell's)

**Election.** The term is one above the highest promise heard. Of the voters' logs the best is the one of the
highest last term, then the longest: it holds everything that was ever committed (leader
completeness). Its last complete record ends at E, where this proposer's own WAL begins; the new history
is the donor's up to E plus (term, E).

**Repair.** Every member, voter or not, is sent the history; it cuts what diverges and answers where its log
ends. What lies between that and the window of recent WAL is read back from a *donor*, any member that
has adopted the history and holds it, chunk by chunk (one read in flight per lagging member), and
appended to the lagging one like new WAL::

    lagging      |=====|                       ReadWalRequest -> donor
    donor        |=====|=========|=====|       WalChunk       <- donor
                       ^ repaired  E    window |=======|  sent from memory

**Commit** (D1). The highest record boundary at or below the LSN that a majority has flushed, counting
only members that have adopted this term's history, and never below E. Counting WAL of older terms by
mere presence would be wrong: a later election may still prefer another log over it (Raft, figure 8).
The first `CommitAdvanced`, to E, says that the repair has reached a majority.

**Group commit.** While an append is under way to a member, further WAL gathers until its answer unless it
fills a chunk: one append and one fdatasync for many commits. A heartbeat brings an answer that was lost.

**Fencing.** Any answer of a higher term ends a leader: `Fenced` once, then silence.

Not here: sockets, retries and their delays, the WAL bytes (a shell keeps a `WalWindow`), PostgreSQL.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import assert_never

from excimer.base.errors import CorruptionError, FencedError, RefusedError
from excimer.base.ids import NodeId
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn
from excimer.consensus.proposer_effects import (
    CommitAdvanced,
    Elected,
    ElectionLost,
    Fenced,
    PeerStranded,
    ProposerEffect,
    ProposerLimits,
    Send,
    SendWal,
    TrimWindow,
)
from excimer.consensus.quorum import check_member_count, majority, quorum_lsn
from excimer.consensus.term_history import BOOTSTRAP_TERM, TermHistory
from excimer.wire.safekeeping import (
    PROTOCOL_VERSION,
    AcceptorGreeting,
    AcceptorMessage,
    AppendRejected,
    AppendRequest,
    AppendResponse,
    CommitAnnounce,
    ElectedResponse,
    ErrorResponse,
    ProposerElected,
    ProposerGreeting,
    ProposerId,
    ReadWalRequest,
    Term,
    TimelineIdentity,
    VoteRequest,
    VoteResponse,
    WalChunk,
)

__all__ = [
    "CommitAdvanced",
    "DuplicateMemberError",
    "Elected",
    "ElectionLost",
    "Fenced",
    "PeerStranded",
    "Phase",
    "Proposer",
    "ProposerEffect",
    "ProposerLimits",
    "SafetyViolationError",
    "Send",
    "SendWal",
    "TrimWindow",
]


class SafetyViolationError(CorruptionError):
    """Members report what a sound quorum cannot: stop, write nothing, call a human."""


class DuplicateMemberError(RefusedError):
    """Two addresses lead to one safekeeper, which would then count twice."""


class Phase(Enum):
    GREETING = auto()
    CAMPAIGNING = auto()
    LOST = auto()
    LEADING = auto()
    FENCED = auto()


@dataclass(slots=True)
class _Peer:
    """What the proposer knows of one member. Facts about its disk outlive a connection."""

    index: int
    node_id: NodeId | None = None
    connected: bool = False
    """Greeted on the present connection."""
    promised_term: Term = BOOTSTRAP_TERM
    vote: VoteResponse | None = None
    """Granted in the present term."""
    refused: bool = False
    adopted: bool = False
    """It has this term's history on disk: its flush LSN counts."""
    flush_lsn: Lsn = INVALID_LSN
    """Highest that it has acknowledged in this term; within a term that never becomes untrue."""
    commit_lsn: Lsn = INVALID_LSN
    wal_start_lsn: Lsn = INVALID_LSN
    sent_lsn: Lsn | None = None
    """End of what was sent on this connection; None until it has said where to begin."""
    announced_commit_lsn: Lsn = INVALID_LSN
    reading_lsn: Lsn | None = None
    """Start of the chunk being read from a donor for it."""
    reading_from: int | None = None
    stranded: bool = False


@dataclass(slots=True)
class _Reign:
    """State of a leader."""

    start_lsn: Lsn
    history: TermHistory
    window_start_lsn: Lsn
    window_end_lsn: Lsn
    commit_lsn: Lsn = INVALID_LSN
    """INVALID until E itself is at a majority; then a record boundary that never falls."""
    horizon_lsn: Lsn = INVALID_LSN
    boundaries: list[Lsn] = field(default_factory=list)
    """Record ends that may be committed next, rising, all above `commit_lsn`."""


class Proposer:
    """Drive it from one task: one call per event, then carry out the effects in order.

    Peers are numbered 0 to member_count - 1, one per safekeeper address.
    """

    def __init__(
        self,
        *,
        identity: TimelineIdentity,
        proposer_id: ProposerId,
        token: str,
        member_count: int,
        limits: ProposerLimits | None = None,
    ) -> None:
        check_member_count(member_count)
        self.identity = identity
        """Zeros are filled in from the first acceptor greeting."""
        self.phase = Phase.GREETING
        self.term = BOOTSTRAP_TERM
        self.term_seen = BOOTSTRAP_TERM
        self._proposer_id = proposer_id
        self.token = token
        """Of the next greetings; the shell renews it."""
        self._limits = limits or ProposerLimits()
        self._peers = [_Peer(index) for index in range(member_count)]
        self._reign: _Reign | None = None

    @property
    def commit_lsn(self) -> Lsn:
        """0 until the repair after the election has reached a majority."""
        return self._reign.commit_lsn if self._reign else INVALID_LSN

    @property
    def start_lsn(self) -> Lsn:
        """E of the election; 0 before it."""
        return self._reign.start_lsn if self._reign else INVALID_LSN

    @property
    def horizon_lsn(self) -> Lsn:
        return self._reign.horizon_lsn if self._reign else INVALID_LSN

    @property
    def writable_size_bytes(self) -> int:
        """How much more WAL to read from PostgreSQL now; 0 means wait for commits (backpressure)."""
        if self._reign is None or self.phase is not Phase.LEADING:
            return 0
        held = self._reign.window_end_lsn - self._reign.window_start_lsn
        return max(0, self._limits.window_size_bytes_max - held)

    def peer_connected(self, peer: int) -> list[ProposerEffect]:
        """A connection is open: greet. Also restarts a peer whose old connection was not seen to end."""
        if self.phase is Phase.FENCED:
            return []
        self._forget_connection(self._peers[peer])
        greeting = ProposerGreeting(identity=self.identity, proposer_id=self._proposer_id, token=self.token)
        return [Send(peer, greeting), *self._pump_all()]

    def peer_disconnected(self, peer: int) -> list[ProposerEffect]:
        self._forget_connection(self._peers[peer])
        return [*self._check_lost(), *self._pump_all()]

    def campaign(self) -> list[ProposerEffect]:
        """After `ElectionLost`: tries again above every term seen."""
        if self.phase is not Phase.LOST:
            return []
        self.phase = Phase.GREETING
        return self._try_campaign()

    def receive(self, peer: int, message: AcceptorMessage) -> list[ProposerEffect]:
        """Raises `SafetyViolationError`, or a `RefusedError` when the safekeeper cannot be a member."""
        if self.phase is Phase.FENCED:
            return []
        member = self._peers[peer]
        match message:
            case AppendResponse():
                return self._append_answered(member, message)
            case WalChunk():
                return self._chunk_read(member, message)
            case ElectedResponse():
                return self._elected_answered(member, message)
            case AppendRejected():
                return self._append_rejected(member, message)
            case VoteResponse():
                return self._voted(member, message)
            case AcceptorGreeting():
                return self._greeted(member, message)
            case ErrorResponse():
                raise RefusedError(f"safekeeper {member.node_id or peer} says: {message.text}")
            case _:
                assert_never(message)

    def wal_appended(self, end_lsn: Lsn, last_record_end_lsn: Lsn) -> list[ProposerEffect]:
        """The window now ends at `end_lsn`; `last_record_end_lsn` ends the last complete record in it.

        Raises `FencedError` when this proposer is no longer the leader.
        """
        reign = self._reign
        if reign is None or self.phase is not Phase.LEADING:
            raise FencedError(f"the proposer of term {self.term} does not lead: write no WAL")
        if not reign.window_end_lsn <= end_lsn or last_record_end_lsn > end_lsn:
            raise ValueError(f"WAL to {format_lsn(end_lsn)} after {format_lsn(reign.window_end_lsn)}")
        reign.window_end_lsn = end_lsn
        newest = reign.boundaries[-1] if reign.boundaries else reign.commit_lsn
        if last_record_end_lsn > newest:
            reign.boundaries.append(last_record_end_lsn)
        return self._pump_all()

    def tick(self) -> list[ProposerEffect]:
        """A heartbeat to every member: finds lost appends, spreads commit LSN and horizon, retries reads."""
        reign = self._reign
        if reign is None or self.phase is not Phase.LEADING:
            return []
        heartbeats: list[ProposerEffect] = [
            Send(
                peer.index, AppendRequest(self.term, peer.sent_lsn, reign.commit_lsn, reign.horizon_lsn, b"")
            )
            for peer in self._peers
            if peer.connected and peer.adopted and peer.sent_lsn is not None
        ]
        return [*heartbeats, *self._pump_all(), *self._trim(0)]

    def announce(self) -> list[ProposerEffect]:
        """Tells the commit LSN to members that have not heard it from an append.

        To be called some time after a `CommitAdvanced`: while WAL goes on, appends tell it for nothing.
        """
        reign = self._reign
        if reign is None or self.phase is not Phase.LEADING:
            return []
        effects: list[ProposerEffect] = []
        for peer in self._peers:
            is_streamed = peer.connected and peer.adopted and peer.sent_lsn is not None
            if is_streamed and peer.announced_commit_lsn < reign.commit_lsn:
                peer.announced_commit_lsn = reign.commit_lsn
                message = CommitAnnounce(self.term, reign.commit_lsn, reign.horizon_lsn)
                effects.append(Send(peer.index, message))
        return effects

    def _forget_connection(self, peer: _Peer) -> None:
        peer.connected = False
        peer.sent_lsn = None
        peer.reading_lsn = peer.reading_from = None
        peer.announced_commit_lsn = INVALID_LSN
        peer.stranded = False
        for other in self._peers:
            if other.reading_from == peer.index:
                other.reading_lsn = other.reading_from = None

    def _fenced_by(self, term: Term) -> list[ProposerEffect]:
        """Called with every answer's term. A candidate loses; a leader is fenced for good."""
        self.term_seen = max(self.term_seen, term)
        if term <= self.term:
            return []
        if self.phase is Phase.LEADING:
            self.phase = Phase.FENCED
            return [Fenced(term)]
        if self.phase is Phase.CAMPAIGNING:
            self.phase = Phase.LOST
            return [ElectionLost(self.term_seen)]
        return []

    # Election

    def _greeted(self, peer: _Peer, greeting: AcceptorGreeting) -> list[ProposerEffect]:
        self._check_member(peer, greeting)
        peer.connected = True
        peer.promised_term = greeting.term
        effects = self._fenced_by(greeting.term)
        if effects:
            return effects
        if self._reign is not None:
            return [Send(peer.index, ProposerElected(self.term, self._reign.history.entries))]
        if self.phase is Phase.CAMPAIGNING and peer.vote is None:
            return [Send(peer.index, VoteRequest(self.term, self._proposer_id))]
        return self._try_campaign()

    def _check_member(self, peer: _Peer, greeting: AcceptorGreeting) -> None:
        if greeting.version != PROTOCOL_VERSION:
            raise RefusedError(f"safekeeper {greeting.node_id} speaks protocol version {greeting.version}")
        known = {other.node_id: other for other in self._peers if other.node_id is not None}
        if known.get(greeting.node_id, peer) is not peer:
            raise DuplicateMemberError(f"two safekeeper addresses lead to safekeeper {greeting.node_id}")
        if peer.node_id not in (None, greeting.node_id):
            raise DuplicateMemberError(
                f"the address of safekeeper {peer.node_id} now leads to safekeeper {greeting.node_id}"
            )
        mine, theirs = self.identity, greeting.identity
        filled = TimelineIdentity(
            tenant_id=mine.tenant_id,
            timeline_id=mine.timeline_id,
            pg_version=mine.pg_version or theirs.pg_version,
            system_id=mine.system_id or theirs.system_id,
            wal_segment_size_bytes=mine.wal_segment_size_bytes or theirs.wal_segment_size_bytes,
        )
        if (filled.pg_version, filled.system_id, filled.wal_segment_size_bytes) != (
            theirs.pg_version,
            theirs.system_id,
            theirs.wal_segment_size_bytes,
        ):
            raise RefusedError(f"safekeeper {greeting.node_id} holds another PostgreSQL's timeline: {theirs}")
        self.identity = filled
        peer.node_id = greeting.node_id

    def _try_campaign(self) -> list[ProposerEffect]:
        """Begins an election once a majority is there to decide it."""
        connected = [peer for peer in self._peers if peer.connected]
        if self.phase is not Phase.GREETING or len(connected) < majority(len(self._peers)):
            return []
        highest = max(self.term_seen, self.term, *(peer.promised_term for peer in self._peers))
        self.phase = Phase.CAMPAIGNING
        self.term = Term(highest + 1)
        for peer in self._peers:
            peer.vote = None
            peer.refused = False
        return [Send(peer.index, VoteRequest(self.term, self._proposer_id)) for peer in connected]

    def _voted(self, peer: _Peer, vote: VoteResponse) -> list[ProposerEffect]:
        effects = self._fenced_by(vote.term)
        if effects or self.phase is not Phase.CAMPAIGNING or vote.term != self.term:
            return effects
        if not vote.granted:
            peer.refused = True
            return self._check_lost()
        peer.vote = vote
        votes = [(other, other.vote) for other in self._peers if other.vote is not None]
        if len(votes) < majority(len(self._peers)):
            return []
        return self._win(votes)

    def _check_lost(self) -> list[ProposerEffect]:
        """Another candidate of this term has a vote, and those that could still answer are too few to win.

        Members that are down do not count as hope: with one of three down, two candidates would
        otherwise wait for ever with a vote each.
        """
        granted = sum(peer.vote is not None for peer in self._peers)
        hoped = sum(peer.connected and peer.vote is None and not peer.refused for peer in self._peers)
        refused = any(peer.refused for peer in self._peers)
        if (
            self.phase is not Phase.CAMPAIGNING
            or not refused
            or granted + hoped >= majority(len(self._peers))
        ):
            return []
        self.phase = Phase.LOST
        return [ElectionLost(self.term_seen)]

    def _win(self, votes: list[tuple[_Peer, VoteResponse]]) -> list[ProposerEffect]:
        donor, best = max(votes, key=lambda pair: self._log_rank(pair[1]))
        start_lsn = best.last_record_end_lsn
        committed = max(vote.commit_lsn for _, vote in votes)
        if start_lsn < committed or start_lsn > best.flush_lsn:
            raise SafetyViolationError(
                f"the best log of a majority ends at {format_lsn(start_lsn)} (flushed to "
                f"{format_lsn(best.flush_lsn)}), but {format_lsn(committed)} is committed"
            )
        history = TermHistory(best.history).extended(self.term, start_lsn)
        self.phase = Phase.LEADING
        self._reign = _Reign(
            start_lsn=start_lsn,
            history=history,
            window_start_lsn=start_lsn,
            window_end_lsn=start_lsn,
            boundaries=[start_lsn],
        )
        message = ProposerElected(self.term, history.entries)
        return [
            Elected(self.term, start_lsn, donor.index),
            *(Send(peer.index, message) for peer in self._peers if peer.connected),
        ]

    def _log_rank(self, vote: VoteResponse) -> tuple[Term, Lsn]:
        """Highest last term, then longest: such a log contains every committed record."""
        return TermHistory(vote.history).term_at(vote.flush_lsn), vote.flush_lsn

    # Repair and replication

    def _elected_answered(self, peer: _Peer, answer: ElectedResponse) -> list[ProposerEffect]:
        effects = self._fenced_by(answer.term)
        if effects or self._reign is None or answer.term != self.term:
            return effects
        peer.adopted = True
        peer.wal_start_lsn = answer.wal_start_lsn
        peer.sent_lsn = answer.flush_lsn
        return self._acknowledged(peer, answer.flush_lsn, answer.commit_lsn)

    def _append_answered(self, peer: _Peer, answer: AppendResponse) -> list[ProposerEffect]:
        if answer.term != self.term or not peer.adopted:
            return self._fenced_by(answer.term)
        if peer.sent_lsn is not None and peer.sent_lsn < answer.flush_lsn:
            # A late rejection had set it back, perhaps below all that the window and donors still have.
            peer.sent_lsn = answer.flush_lsn
        return self._acknowledged(peer, answer.flush_lsn, answer.commit_lsn)

    def _append_rejected(self, peer: _Peer, answer: AppendRejected) -> list[ProposerEffect]:
        effects = self._fenced_by(answer.term)
        if effects or self._reign is None:
            return effects
        if answer.expected_lsn == INVALID_LSN:
            return [Send(peer.index, ProposerElected(self.term, self._reign.history.entries))]
        if answer.term == self.term and peer.sent_lsn is not None:
            peer.sent_lsn = answer.expected_lsn
            peer.reading_lsn = peer.reading_from = None
        return self._pump_all()

    def _acknowledged(self, peer: _Peer, flush_lsn: Lsn, commit_lsn: Lsn) -> list[ProposerEffect]:
        peer.flush_lsn = max(peer.flush_lsn, flush_lsn)
        peer.commit_lsn = max(peer.commit_lsn, commit_lsn)
        return [*self._advance_commit(), *self._pump_all(), *self._trim(self._limits.trim_size_bytes)]

    def _counted_flush_lsns(self) -> list[Lsn]:
        """Flush LSNs that commit: of members whose log is known to be a prefix of this term's."""
        return [peer.flush_lsn for peer in self._peers if peer.adopted]

    def _advance_commit(self) -> list[ProposerEffect]:
        reign = self._leading()
        if not reign.boundaries:
            return []
        flushed_lsn = quorum_lsn(self._counted_flush_lsns(), len(self._peers))
        reached = bisect_right(reign.boundaries, flushed_lsn)
        if reached == 0:
            return []
        reign.commit_lsn = reign.boundaries[reached - 1]
        del reign.boundaries[:reached]
        return [CommitAdvanced(reign.commit_lsn)]

    def _leading(self) -> _Reign:
        if self._reign is None:
            raise FencedError(f"the proposer of term {self.term} does not lead")
        return self._reign

    def _trim(self, held_size_bytes_min: int) -> list[ProposerEffect]:
        """Raises the horizon; drops window WAL that all have, or that a majority has and room is short.

        Not while the window holds less: neither is urgent, and this is in the way of every commit.
        """
        reign = self._leading()
        if reign.window_end_lsn - reign.window_start_lsn < held_size_bytes_min:
            return []
        adopted = [peer for peer in self._peers if peer.adopted]
        if not adopted:
            return []
        if len(adopted) == len(self._peers):
            reign.horizon_lsn = max(reign.horizon_lsn, min([peer.commit_lsn for peer in adopted]))
        flushed_lsn = min([peer.flush_lsn for peer in adopted])
        half_full_lsn = reign.window_end_lsn - self._limits.window_size_bytes_max // 2
        trim_lsn = Lsn(min(reign.commit_lsn, max(flushed_lsn, half_full_lsn)))
        if trim_lsn <= reign.window_start_lsn:
            return []
        reign.window_start_lsn = trim_lsn
        return [TrimWindow(trim_lsn)]

    def _pump_all(self) -> list[ProposerEffect]:
        """Sends every member what it lacks, within the limits."""
        reign = self._reign
        if reign is None or self.phase is not Phase.LEADING:
            return []
        effects: list[ProposerEffect] = []
        for peer in self._peers:
            sent_lsn = peer.sent_lsn
            if sent_lsn is None or not peer.connected or not peer.adopted:
                continue
            if sent_lsn != reign.window_end_lsn:
                effects += self._pump(reign, peer, sent_lsn)
        return effects

    def _pump(self, reign: _Reign, peer: _Peer, sent_lsn: Lsn) -> Iterator[ProposerEffect]:
        room_end_lsn = peer.flush_lsn + self._limits.in_flight_size_bytes_max
        if sent_lsn < reign.window_start_lsn:
            if peer.reading_lsn is None and sent_lsn < room_end_lsn:
                yield from self._read_for(reign, peer, sent_lsn)
            return
        while sent_lsn < min(reign.window_end_lsn, room_end_lsn):
            end_lsn = Lsn(min(sent_lsn + self._limits.chunk_size_bytes, reign.window_end_lsn))
            if sent_lsn > peer.flush_lsn and end_lsn - sent_lsn < self._limits.chunk_size_bytes:
                break  # group commit: little WAL waits for the answer to what is under way
            yield SendWal(peer.index, self.term, sent_lsn, end_lsn, reign.commit_lsn, reign.horizon_lsn)
            peer.announced_commit_lsn = reign.commit_lsn
            peer.sent_lsn = sent_lsn = end_lsn

    def _read_for(self, reign: _Reign, peer: _Peer, start_lsn: Lsn) -> Iterator[ProposerEffect]:
        """Asks the member with the most WAL, of those that hold what `peer` lacks."""
        holders = [
            other
            for other in self._peers
            if other.adopted and other.wal_start_lsn <= start_lsn < other.flush_lsn and other is not peer
        ]
        donors = [other for other in holders if other.connected]
        if donors:
            donor = max(donors, key=lambda other: other.flush_lsn)
            limit = start_lsn + self._limits.repair_chunk_size_bytes
            end_lsn = Lsn(min(limit, reign.window_start_lsn, donor.flush_lsn))
            peer.reading_lsn = start_lsn
            peer.reading_from = donor.index
            yield Send(donor.index, ReadWalRequest(self.term, start_lsn, end_lsn))
        elif not holders and not peer.stranded and all(other.adopted for other in self._peers):
            peer.stranded = True
            yield PeerStranded(peer.index, start_lsn)

    def _chunk_read(self, donor: _Peer, chunk: WalChunk) -> list[ProposerEffect]:
        effects = self._fenced_by(chunk.term)
        if effects or self._reign is None or chunk.term != self.term:
            return effects
        for peer in self._peers:
            if peer.reading_from != donor.index or peer.reading_lsn != chunk.start_lsn:
                continue
            peer.reading_lsn = peer.reading_from = None
            if chunk.wal and peer.sent_lsn == chunk.start_lsn:
                effects.append(Send(peer.index, self._append(chunk)))
                peer.sent_lsn = Lsn(chunk.start_lsn + len(chunk.wal))
        if not chunk.wal:
            return effects
        return [*effects, *self._pump_all()]

    def _append(self, chunk: WalChunk) -> AppendRequest:
        reign = self._leading()
        return AppendRequest(self.term, chunk.start_lsn, reign.commit_lsn, reign.horizon_lsn, chunk.wal)
