"""The one writer of a timeline's WAL: wins an election, repairs the members, commits by majority.

::

    GREETING --majority greeted--> CAMPAIGNING --majority voted--> LEADING
                                      |    ^                          |
                       refused: LOST -+    +- campaign() (back off    +--> RENEWING --> LEADING
                                              first: the shell's)     +--> FENCED, for ever

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

What nobody at hand has any more is *skipped*, as far as it is durable in object storage and committed.

**Commit** (D1). The highest record boundary at or below the LSN that a majority has flushed, counting
only members that have adopted this term's history, and never below E. Counting WAL of older terms by
mere presence would be wrong: a later election may still prefer another log over it (Raft, figure 8).
The first `CommitAdvanced`, to E, says that the repair has reached a majority.

**Group commit.** While an append is under way to a member, further WAL gathers until its answer unless it
fills a chunk: one append and one fdatasync for many commits. A heartbeat brings an answer that was lost.

**Fencing.** A majority of higher promises, or WAL of a newer leader at any member, ends a leader: `Fenced`
once, then silence. A minority of promises that nobody follows up is won back by an election in which this
leader keeps its log (**renewal**; the argument is in `excimer.consensus`).

Not here: sockets, retries and their delays, the WAL bytes (a shell keeps a `WalWindow`), PostgreSQL.
"""

from collections.abc import Iterator
from typing import assert_never

from excimer.base.errors import CorruptionError, FencedError, RefusedError
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn
from excimer.consensus.donors import find_donor, holders_of, skip_lsn
from excimer.consensus.leader_state import LeaderState, Member, Phase
from excimer.consensus.members import DuplicateMemberError, check_member
from excimer.consensus.proposer_effects import (
    CommitAdvanced,
    Elected,
    ElectionLost,
    Fenced,
    PeerStranded,
    ProposerEffect,
    ProposerLimits,
    Renewed,
    RestartWindow,
    Send,
    SendWal,
    TrimWindow,
)
from excimer.consensus.quorum import check_member_count, majority
from excimer.consensus.term_history import BOOTSTRAP_TERM, TermHistory
from excimer.wire.safekeeping import (
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
    SkipWal,
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
    "Renewed",
    "RestartWindow",
    "SafetyViolationError",
    "Send",
    "SendWal",
    "TrimWindow",
]


class SafetyViolationError(CorruptionError):
    """Members report what a sound quorum cannot: stop, write nothing, call a human."""


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
        self._peers = [Member(index) for index in range(member_count)]
        self._leader: LeaderState | None = None

    @property
    def commit_lsn(self) -> Lsn:
        """0 until the repair after the election has reached a majority."""
        return self._leader.commit_lsn if self._leader else INVALID_LSN

    @property
    def start_lsn(self) -> Lsn:
        """E of the election; 0 before it."""
        return self._leader.start_lsn if self._leader else INVALID_LSN

    @property
    def history(self) -> TermHistory | None:
        return self._leader.history if self._leader else None

    @property
    def steady_leader(self) -> LeaderState | None:
        """This leader's state while all that happens is WAL and its acknowledgements, which may move it
        without this object; then `go_on` has to be called.
        """
        leader = self._leader
        return leader if self.phase is Phase.LEADING and leader and leader.has_steady_members else None

    def go_on(self) -> list[ProposerEffect]:
        """Whatever is due after others have moved the state of a steady leader."""
        if self._leader is None or self.phase is not Phase.LEADING:
            return []
        return [*self._pump_all(), *self._trim(self._limits.trim_size_bytes)]

    @property
    def writable_size_bytes(self) -> int:
        """How much more WAL to read from PostgreSQL now; 0 means wait for commits (backpressure)."""
        if self._leader is None or self.phase is not Phase.LEADING:
            return 0
        return max(0, self._limits.window_size_bytes_max - self._leader.window_size_bytes)

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
        leader = self._leader
        if leader is None or self.phase not in (Phase.LEADING, Phase.RENEWING):
            raise FencedError(f"the proposer of term {self.term} does not lead: write no WAL")
        if not leader.window_end_lsn <= end_lsn or last_record_end_lsn > end_lsn:
            raise ValueError(f"WAL to {format_lsn(end_lsn)} after {format_lsn(leader.window_end_lsn)}")
        leader.wal_appended(end_lsn, last_record_end_lsn)
        return self._pump_all()

    def tick(self) -> list[ProposerEffect]:
        """A heartbeat to every member: finds lost appends, spreads commit LSN and horizon, retries reads."""
        leader = self._leader
        if leader is None or self.phase not in (Phase.LEADING, Phase.RENEWING):
            return []
        if self._renewal_is_due(leader):
            return self._renew()
        if self.phase is Phase.RENEWING:
            return self._ask_for_votes()
        leader.raise_horizon()
        heartbeats: list[ProposerEffect] = [
            Send(
                peer.index,
                AppendRequest(self.term, peer.sent_lsn, leader.commit_lsn, leader.horizon_lsn, b""),
            )
            for peer in self._peers
            if peer.connected and peer.adopted and peer.sent_lsn is not None
        ]
        elected = ProposerElected(self.term, leader.history.entries)  # whose answer says how far it may skip
        stranded = [Send(peer.index, elected) for peer in self._peers if peer.lacks_donor and peer.connected]
        return [*heartbeats, *stranded, *self._pump_all(), *self._trim(0)]

    def announce(self, *, to_all: bool = False) -> list[ProposerEffect]:
        """Tells commit LSN and horizon to members that have not heard the former from an append, or to all.

        To be called some time after a `CommitAdvanced`: while WAL goes on, appends tell it for nothing.
        """
        leader = self._leader
        if leader is None or self.phase is not Phase.LEADING:
            return []
        effects: list[ProposerEffect] = []
        leader.raise_horizon()
        for peer in self._peers:
            is_streamed = peer.connected and peer.adopted and peer.sent_lsn is not None
            if is_streamed and (to_all or peer.announced_commit_lsn < leader.commit_lsn):
                peer.announced_commit_lsn = leader.commit_lsn
                message = CommitAnnounce(self.term, leader.commit_lsn, leader.horizon_lsn)
                effects.append(Send(peer.index, message))
        return effects

    def _forget_connection(self, peer: Member) -> None:
        peer.connected = False
        peer.probed_term = BOOTSTRAP_TERM
        peer.announced_commit_lsn = INVALID_LSN
        peer.stranded = peer.lacks_donor = False
        self._forget_stream(peer)

    def _forget_stream(self, peer: Member) -> None:
        peer.forget_stream()
        for other in self._peers:
            if other.reading_from == peer.index:
                other.reading_lsn = other.reading_from = None

    def _outranked_by(self, peer: Member, term: Term) -> list[ProposerEffect]:
        """Called with every answer's term, which its sender has promised. A candidate loses to a higher one.

        A leader loses that member, and goes on while the others may still be a majority of its own. A vote
        request, which such a member refuses, asks for its history: whether somebody does lead.
        """
        self.term_seen = max(self.term_seen, term)
        peer.promised_term = max(peer.promised_term, term)
        if term <= self.term:
            return []
        if self.phase is Phase.CAMPAIGNING:
            self.phase = Phase.LOST
            return [ElectionLost(self.term_seen)]
        if self.phase not in (Phase.LEADING, Phase.RENEWING):
            return []
        peer.adopted = False
        self._forget_stream(peer)
        outranking = sum(other.promised_term > self.term for other in self._peers)
        if outranking >= majority(len(self._peers)):
            return self._fence(term)
        if not peer.connected or peer.probed_term >= peer.promised_term:
            return []
        peer.probed_term = peer.promised_term
        return [Send(peer.index, VoteRequest(self.term, self._proposer_id))]

    def _fence(self, term: Term) -> list[ProposerEffect]:
        self.phase = Phase.FENCED
        return [Fenced(term)]

    # Election

    def _greeted(self, peer: Member, greeting: AcceptorGreeting) -> list[ProposerEffect]:
        self.identity = check_member(self._peers, peer, greeting, self.identity)
        peer.node_id = greeting.node_id
        peer.connected = True
        effects = self._outranked_by(peer, greeting.term)
        if effects or (self._leader is not None and greeting.term > self.term):
            return effects
        if self.phase in (Phase.CAMPAIGNING, Phase.RENEWING) and peer.vote is None:
            return [Send(peer.index, VoteRequest(self.term, self._proposer_id))]
        if self._leader is not None and self.phase is Phase.LEADING:
            return [Send(peer.index, ProposerElected(self.term, self._leader.history.entries))]
        return self._try_campaign()

    def _try_campaign(self) -> list[ProposerEffect]:
        """Begins an election once a majority is there to decide it."""
        connected = [peer for peer in self._peers if peer.connected]
        if self.phase is not Phase.GREETING or len(connected) < majority(len(self._peers)):
            return []
        self.phase = Phase.CAMPAIGNING
        return self._begin_election()

    def _begin_election(self) -> list[ProposerEffect]:
        """In a term above every one seen."""
        self.term = Term(max(self.term_seen, self.term) + 1)
        for peer in self._peers:
            peer.vote = None
            peer.refused = False
        return self._ask_for_votes()

    def _ask_for_votes(self) -> list[ProposerEffect]:
        request = VoteRequest(self.term, self._proposer_id)
        asked = (peer for peer in self._peers if peer.connected and peer.vote is None and not peer.refused)
        return [Send(peer.index, request) for peer in asked]

    def _voted(self, peer: Member, vote: VoteResponse) -> list[ProposerEffect]:
        effects = self._outranked_by(peer, vote.term)
        newest_term = TermHistory(vote.history).last.term
        if self._leader is not None and self._is_succession(self._leader, newest_term):
            return self._fence(newest_term)
        is_asking = self.phase in (Phase.CAMPAIGNING, Phase.RENEWING)
        if effects or not is_asking or vote.term != self.term:
            return effects
        if not vote.granted:
            peer.refused = True
            return self._check_lost()
        peer.vote = vote
        votes = [(other, other.vote) for other in self._peers if other.vote is not None]
        if len(votes) < majority(len(self._peers)):
            return []
        return self._win(votes) if self._leader is None else self._lead_on(self._leader, votes)

    def _check_lost(self) -> list[ProposerEffect]:
        """Another candidate of this term has a vote, and those that could still answer are too few to win.

        Members that are down do not count as hope: with one of three down, two candidates would
        otherwise wait for ever with a vote each.
        """
        granted = sum(peer.vote is not None for peer in self._peers)
        hoped = sum(peer.connected and peer.vote is None and not peer.refused for peer in self._peers)
        refused = any(peer.refused for peer in self._peers)
        may_win = granted + hoped >= majority(len(self._peers))
        if self.phase is not Phase.CAMPAIGNING or not refused or may_win:
            return []
        self.phase = Phase.LOST
        return [ElectionLost(self.term_seen)]

    def _win(self, votes: list[tuple[Member, VoteResponse]]) -> list[ProposerEffect]:
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
        self._leader = LeaderState(
            self._peers,
            start_lsn=start_lsn,
            history=history,
            chunk_size_bytes=self._limits.chunk_size_bytes,
            in_flight_size_bytes_max=self._limits.in_flight_size_bytes_max,
        )
        return [Elected(self.term, start_lsn, donor.index), *self._tell_elected(history)]

    def _tell_elected(self, history: TermHistory) -> Iterator[ProposerEffect]:
        message = ProposerElected(self.term, history.entries)
        return (Send(peer.index, message) for peer in self._peers if peer.connected)

    def _log_rank(self, vote: VoteResponse) -> tuple[Term, Lsn]:
        """Highest last term, then longest: such a log contains every committed record."""
        return TermHistory(vote.history).term_at(vote.flush_lsn), vote.flush_lsn

    # Renewal

    def _renewal_is_due(self, leader: LeaderState) -> bool:
        """Whether members at hand have long shown promises to others, who do not come forward as leaders."""
        connected = [peer for peer in self._peers if peer.connected]
        is_renewing = self.phase is Phase.RENEWING
        if not any(peer.promised_term > self.term or (is_renewing and peer.refused) for peer in connected):
            leader.renewal_tick_count = 0
            return False
        leader.renewal_tick_count += 1
        return leader.renewal_tick_count >= self._limits.renewal_tick_count and len(connected) >= majority(
            len(self._peers)
        )

    def _is_succession(self, leader: LeaderState, term: Term) -> bool:
        """Whether a member that has WAL of `term` has it from a newer leader."""
        return term > leader.history.last.term

    def _renew(self) -> list[ProposerEffect]:
        """Asks for votes in a higher term. Nothing is committed until it is won."""
        leader = self._leading()
        leader.renewal_tick_count = 0
        self.phase = Phase.RENEWING
        for peer in self._peers:
            peer.adopted = False
            self._forget_stream(peer)
        return self._begin_election()

    def _lead_on(self, leader: LeaderState, votes: list[tuple[Member, VoteResponse]]) -> list[ProposerEffect]:
        """No voter has WAL of a newer leader, so this one's own log holds everything that was committed."""
        start_lsn = leader.newest_boundary_lsn
        committed = max(vote.commit_lsn for _, vote in votes)
        if committed > start_lsn:
            raise SafetyViolationError(
                f"{format_lsn(committed)} is committed, but this leader's WAL ends at {format_lsn(start_lsn)}"
            )
        leader.history = leader.history.extended(self.term, start_lsn)
        leader.start_lsn = start_lsn
        self.phase = Phase.LEADING
        return [Renewed(self.term, start_lsn), *self._tell_elected(leader.history)]

    # Repair and replication

    def _elected_answered(self, peer: Member, answer: ElectedResponse) -> list[ProposerEffect]:
        effects = self._outranked_by(peer, answer.term)
        if effects or self._leader is None or answer.term != self.term:
            return effects
        peer.adopted = True
        peer.wal_start_lsn = answer.wal_start_lsn
        peer.durable_lsn = answer.durable_lsn  # up to which it may skip; a heartbeat asks again
        peer.lacks_donor = False
        peer.flush_lsn = peer.sent_lsn = answer.flush_lsn  # a restart may have cut a part of a record
        return self._acknowledged(peer, answer.flush_lsn, answer.commit_lsn)

    def _append_answered(self, peer: Member, answer: AppendResponse) -> list[ProposerEffect]:
        if answer.term != self.term or not peer.adopted:
            return self._outranked_by(peer, answer.term)
        return self._acknowledged(peer, answer.flush_lsn, answer.commit_lsn)

    def _append_rejected(self, peer: Member, answer: AppendRejected) -> list[ProposerEffect]:
        effects = self._outranked_by(peer, answer.term)
        if effects or self._leader is None or self.phase is not Phase.LEADING or answer.term > self.term:
            return effects
        if answer.expected_lsn == INVALID_LSN:
            return [Send(peer.index, ProposerElected(self.term, self._leader.history.entries))]
        if answer.term == self.term and peer.sent_lsn is not None:
            peer.sent_lsn = answer.expected_lsn
            peer.flush_lsn = min(peer.flush_lsn, answer.expected_lsn)
            peer.reading_lsn = peer.reading_from = None
        return self._pump_all()

    def _acknowledged(self, peer: Member, flush_lsn: Lsn, commit_lsn: Lsn) -> list[ProposerEffect]:
        self._leading().answered(peer, flush_lsn, commit_lsn)
        return [*self._advance_commit(), *self._pump_all(), *self._trim(self._limits.trim_size_bytes)]

    def _advance_commit(self) -> list[ProposerEffect]:
        leader = self._leading()
        return [CommitAdvanced(leader.commit_lsn)] if leader.advance_commit() else []

    def _leading(self) -> LeaderState:
        if self._leader is None:
            raise FencedError(f"the proposer of term {self.term} does not lead")
        return self._leader

    def _trim(self, held_size_bytes_min: int) -> list[ProposerEffect]:
        """Raises the horizon; drops window WAL that all have, or that a majority has and room is short.

        Not while the window holds less: neither is urgent, and this is in the way of every commit.
        """
        leader = self._leading()
        if leader.window_size_bytes < held_size_bytes_min:
            return []
        adopted = [peer for peer in self._peers if peer.adopted]
        if not adopted:
            return []
        flushed_lsn = min([peer.flush_lsn for peer in adopted])
        leader.raise_horizon()
        kept_size_bytes = self._limits.window_size_bytes_max // 2
        trim_lsn = leader.trim_lsn(flushed_lsn, leader.majority_flush_lsn(), kept_size_bytes)
        if trim_lsn <= leader.window_start_lsn:
            return []
        leader.window_start_lsn = trim_lsn
        return [TrimWindow(trim_lsn)]

    def _pump_all(self) -> list[ProposerEffect]:
        """Sends every member what it lacks, within the limits."""
        leader = self._leader
        if leader is None or self.phase is not Phase.LEADING:
            return []
        effects: list[ProposerEffect] = []
        for peer in self._peers:
            sent_lsn = peer.sent_lsn
            if sent_lsn is None or not peer.connected or not peer.adopted:
                continue
            if sent_lsn != leader.window_end_lsn:
                effects += self._pump(leader, peer, sent_lsn)
        return effects

    def _pump(self, leader: LeaderState, peer: Member, sent_lsn: Lsn) -> Iterator[ProposerEffect]:
        if sent_lsn < leader.window_start_lsn:
            room_end_lsn = peer.flush_lsn + self._limits.in_flight_size_bytes_max
            if peer.reading_lsn is None and sent_lsn < room_end_lsn:
                yield from self._read_for(leader, peer, sent_lsn)
            return
        while (wal := leader.next_append(peer)) is not None:
            yield SendWal(peer.index, self.term, *wal, leader.commit_lsn, leader.horizon_lsn)

    def _read_for(self, leader: LeaderState, peer: Member, start_lsn: Lsn) -> Iterator[ProposerEffect]:
        """Asks the member with the most WAL, of those that hold what `peer` lacks."""
        holders = holders_of(self._peers, peer, start_lsn)
        donor = find_donor(holders)
        if donor is not None:
            limit = start_lsn + self._limits.repair_chunk_size_bytes
            end_lsn = Lsn(min(limit, leader.window_start_lsn, donor.flush_lsn))
            peer.reading_lsn = start_lsn
            peer.reading_from = donor.index
            yield Send(donor.index, ReadWalRequest(self.term, start_lsn, end_lsn))
        elif self._may_restart_window(leader, start_lsn):
            leader.window_start_lsn = leader.window_end_lsn = leader.commit_lsn
            yield RestartWindow(leader.commit_lsn)
        elif not peer.lacks_donor:
            peer.lacks_donor = True
            resumed_lsn = skip_lsn(self._peers, leader, peer, start_lsn)
            if resumed_lsn is not None:
                peer.wal_start_lsn = resumed_lsn
                yield Send(peer.index, SkipWal(self.term, resumed_lsn))
            elif not holders and not peer.stranded and all(other.adopted for other in self._peers):
                peer.stranded = True
                yield PeerStranded(peer.index, start_lsn)

    def _may_restart_window(self, leader: LeaderState, missing_lsn: Lsn) -> bool:
        """Whether PostgreSQL has the WAL that a majority at hand does not have, or has lost in part."""
        at_hand = sum(peer.connected and peer.adopted for peer in self._peers)
        return INVALID_LSN < leader.commit_lsn <= missing_lsn and at_hand >= majority(len(self._peers))

    def _chunk_read(self, donor: Member, chunk: WalChunk) -> list[ProposerEffect]:
        effects = self._outranked_by(donor, chunk.term)
        if effects or self._leader is None or chunk.term != self.term:
            return effects
        if not chunk.wal:
            self._not_read(donor, chunk.start_lsn)
            return effects
        for peer in self._peers:
            if peer.reading_from != donor.index or peer.reading_lsn != chunk.start_lsn:
                continue
            peer.reading_lsn = peer.reading_from = None
            if peer.sent_lsn == chunk.start_lsn:
                effects.append(Send(peer.index, self._append(chunk.start_lsn, chunk.wal)))
                peer.sent_lsn = Lsn(chunk.start_lsn + len(chunk.wal))
        return [*effects, *self._pump_all()]

    def _not_read(self, donor: Member, lsn: Lsn) -> None:
        """The donor's WAL ends at `lsn`, where some was asked for, or begins there. Ticks try again."""
        for peer in self._peers:
            if peer.reading_from != donor.index or peer.reading_lsn is None or peer.reading_lsn > lsn:
                continue
            if peer.reading_lsn == lsn:
                donor.flush_lsn = min(donor.flush_lsn, lsn)  # or its next answer says more
            else:
                donor.wal_start_lsn = max(donor.wal_start_lsn, lsn)
            peer.reading_lsn = peer.reading_from = None

    def _append(self, begin_lsn: Lsn, wal: bytes) -> AppendRequest:
        leader = self._leading()
        return AppendRequest(self.term, begin_lsn, leader.commit_lsn, leader.horizon_lsn, wal)
