"""Cores with one rule broken each. The simulator must notice every one of them, or it proves nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from excimer.base.errors import CorruptionError
from excimer.base.lsn import Lsn
from excimer.consensus.acceptor import (
    Acceptor,
    AcceptorEffect,
    AcceptorState,
    ConnectionId,
    FlushWal,
    PersistControl,
    Send,
    TruncateWal,
    WriteWal,
)
from excimer.consensus.leader_state import LeaderState, Member
from excimer.consensus.proposer import CommitAdvanced, Proposer, ProposerEffect, RestartWindow
from excimer.consensus.proposer import Send as ProposerSend
from excimer.consensus.term_history import TermHistory
from excimer.wire.safekeeping import (
    AppendRequest,
    AppendResponse,
    ProposerElected,
    ProposerMessage,
    SkipWal,
    Term,
    TermStart,
    VoteRequest,
    VoteResponse,
)

NO_LOG = VoteResponse(
    term=Term(0),
    granted=True,
    flush_lsn=Lsn(0),
    last_record_end_lsn=Lsn(0),
    wal_start_lsn=Lsn(0),
    commit_lsn=Lsn(0),
    history=(TermStart(Term(0), Lsn(0)),),
)


class SpeaksBeforePersisting(Acceptor):
    """C2 broken: the vote leaves before it is on disk."""

    def receive(self, connection: ConnectionId, message: ProposerMessage) -> list[AcceptorEffect]:
        effects = super().receive(connection, message)
        return sorted(effects, key=lambda effect: isinstance(effect, PersistControl))


class NeverPersistsVotes(Acceptor):
    """C2 broken: a promise lives in memory only."""

    def _vote(self, connection: ConnectionId, request: VoteRequest) -> list[AcceptorEffect]:
        effects = super()._vote(connection, request)
        return [effect for effect in effects if not isinstance(effect, PersistControl)]


class VotesWithoutChecking(Acceptor):
    """Grants every vote, whatever it has promised."""

    def _may_vote(self, request: VoteRequest) -> bool:
        return True


class AcceptsOlderTerms(Acceptor):
    """C1 broken: WAL of the adopted term is still accepted, and acknowledged, after a newer promise."""

    def _append(self, connection: ConnectionId, request: AppendRequest) -> list[AcceptorEffect]:
        promised = self.state.promised_term
        if request.term != self.adopted_term:
            return super()._append(connection, request)
        self.state = replace(self.state, promised_term=request.term)
        effects = super()._append(connection, request)
        self.state = replace(self.state, promised_term=promised)
        return effects

    def _append_response(self) -> AppendResponse:
        return AppendResponse(self.adopted_term, self.flush_lsn, self.state.commit_lsn)


class CutsBelowCommit(Acceptor):
    """Cuts to the start of the log instead of to where it parts; the leader would send it all again."""

    def _cut_lsn(self, history: TermHistory) -> Lsn | None:
        cut_lsn = super()._cut_lsn(history)
        return None if cut_lsn is None else self.timeline_start_lsn


class CutsAgainWhenRepeated(Acceptor):
    """Handles a repeated announcement of an election like the first."""

    def _elected(self, connection: ConnectionId, elected: ProposerElected) -> list[AcceptorEffect]:
        again: list[AcceptorEffect] = []
        if elected.term == self.adopted_term == self.state.promised_term:
            start_lsn = elected.history[-1].start_lsn
            if start_lsn < self.write_lsn and start_lsn >= self.state.commit_lsn:
                self._set_end(start_lsn)
                self._truncation_count += 1
                again.append(TruncateWal(start_lsn))
        return again + super()._elected(connection, elected)


class NeverCuts(Acceptor):
    """Adopts a history and keeps WAL that does not belong to it."""

    def _cut_lsn(self, history: TermHistory) -> Lsn | None:
        return None


class AdoptsBeforeCutting(Acceptor):
    """The new history is on disk before the WAL that contradicts it is gone."""

    def _adopt(self, elected: ProposerElected) -> list[AcceptorEffect]:
        return sorted(super()._adopt(elected), key=lambda effect: isinstance(effect, TruncateWal))


class KeepsLeftovers(Acceptor):
    """Does not clear what a crash left behind the last complete record."""

    def start(self) -> list[AcceptorEffect]:
        return []


class AcknowledgesUnflushed(Acceptor):
    """D1 broken: says "flushed" when the write has only been handed to the system."""

    def _append(self, connection: ConnectionId, request: AppendRequest) -> list[AcceptorEffect]:
        effects = super()._append(connection, request)
        if any(isinstance(effect, WriteWal) for effect in effects):
            early = AppendResponse(self.state.promised_term, self.write_lsn, self.state.commit_lsn)
            effects.append(Send(connection, early))
        return effects


class BelievesStaleFlushes(Acceptor):
    """Takes a flush from before a truncation for one of the WAL that came after."""

    def wal_flushed(self, flush: FlushWal, last_record_end_lsn: Lsn) -> list[AcceptorEffect]:
        current = FlushWal(flush.end_lsn, self._truncation_count)
        if flush.end_lsn > self.write_lsn or last_record_end_lsn < self.last_record_end_lsn:
            current = flush
        return super().wal_flushed(current, last_record_end_lsn)


class ShowsUncommittedWal(Acceptor):
    """C3 broken: lets readers see all that is durable here."""

    def _committed_since(self, before_lsn: int) -> list[AcceptorEffect]:
        self.accepted.announce(self.last_record_end_lsn, 0)
        return super()._committed_since(before_lsn)


class TrimsHistoryAtItsOwnCommit(Acceptor):
    """Forgets terms that another member, which lags, still needs to find where logs part."""

    def _adopt(self, elected: ProposerElected) -> list[AcceptorEffect]:
        effects = super()._adopt(elected)
        self.state: AcceptorState = replace(
            self.state, history=self.state.history.trimmed(self.state.commit_lsn)
        )
        return [PersistControl(self.state) if isinstance(e, PersistControl) else e for e in effects]


class SkipsWhatItHas(Acceptor):
    """Gives up WAL that it has acknowledged, because it is told to begin at an LSN below its end."""

    def _may_skip(self, skip: SkipWal) -> bool:
        return skip.term == self.state.promised_term == self.adopted_term


class SkipsWhatOnlyMembersHave(Acceptor):
    """Believes its leader that what it lacks is in object storage."""

    def _may_skip(self, skip: SkipWal) -> bool:
        return skip.term == self.state.promised_term == self.adopted_term and self.write_lsn < skip.start_lsn


class ForgetsWhereItsWalBegins(Acceptor):
    """Serves WAL that it has skipped."""

    def _skip(self, connection: ConnectionId, skip: SkipWal) -> list[AcceptorEffect]:
        wal_start_lsn = self.wal_start_lsn
        effects = super()._skip(connection, skip)
        self.wal_start_lsn = wal_start_lsn
        return effects


class LetsSkipToItsCommit(Proposer):
    """Lets a member begin where this leader's commits are, whatever object storage has."""

    def _read_for(self, leader: LeaderState, peer: Member, start_lsn: Lsn) -> Iterator[ProposerEffect]:
        for effect in super()._read_for(leader, peer, start_lsn):
            if isinstance(effect, ProposerSend) and isinstance(effect.message, SkipWal):
                yield ProposerSend(peer.index, SkipWal(self.term, leader.commit_lsn))
            else:
                yield effect


class NeverLetsSkip(Proposer):
    """Leaves a member stranded of which the others have removed what it lacks."""

    def _read_for(self, leader: LeaderState, peer: Member, start_lsn: Lsn) -> Iterator[ProposerEffect]:
        for effect in super()._read_for(leader, peer, start_lsn):
            if not (isinstance(effect, ProposerSend) and isinstance(effect.message, SkipWal)):
                yield effect


class CountsOtherwise(Proposer):
    """Advances the commit as if its members had flushed what `_counted` says, with this term's history."""

    def _advance_commit(self) -> list[ProposerEffect]:
        known = [(peer.adopted, peer.flush_lsn) for peer in self._peers]
        for peer, lsn in zip(self._peers, self._counted(), strict=True):
            peer.adopted, peer.flush_lsn = True, lsn
        effects = super()._advance_commit()
        for peer, (adopted, lsn) in zip(self._peers, known, strict=True):
            peer.adopted, peer.flush_lsn = adopted, lsn
        return effects

    def _counted(self) -> list[Lsn]:
        raise NotImplementedError


class CountsByPresence(CountsOtherwise):
    """Commits WAL because a majority holds that many bytes, whatever history they belong to."""

    def _counted(self) -> list[Lsn]:
        return [max(peer.flush_lsn, peer.vote.flush_lsn if peer.vote else Lsn(0)) for peer in self._peers]


class CommitsByMinority(CountsOtherwise):
    """One member is enough."""

    def _counted(self) -> list[Lsn]:
        return [max(peer.flush_lsn for peer in self._peers if peer.adopted)] * len(self._peers)


class CommitsInsideRecords(Proposer):
    """Takes the majority's flush LSN as it is."""

    def _advance_commit(self) -> list[ProposerEffect]:
        reign = self._leading()
        flushed_lsn = reign.majority_flush_lsn()
        if flushed_lsn <= reign.commit_lsn or flushed_lsn < reign.start_lsn:
            return []
        reign.commit_lsn = flushed_lsn
        return [CommitAdvanced(flushed_lsn)]


class PrefersLongestLog(Proposer):
    """Elects by length alone: an abandoned minority's log may be longer than the committed one."""

    def _log_rank(self, vote: VoteResponse) -> tuple[Term, Lsn]:
        return Term(0), vote.flush_lsn


class PrefersNewestPromise(Proposer):
    """Elects by last term alone: among its holders a shorter log may lack committed records."""

    def _log_rank(self, vote: VoteResponse) -> tuple[Term, Lsn]:
        return super()._log_rank(vote)[0], Lsn(0)


class TrustsAnyVoter(Proposer):
    """Continues whichever log answered first."""

    def _log_rank(self, vote: VoteResponse) -> tuple[Term, Lsn]:
        return Term(0), Lsn(0)


class IgnoresHigherTerms(Proposer):
    """Never fenced; counts what answers of a newer term say."""

    def _append_answered(self, peer: object, answer: AppendResponse) -> list[ProposerEffect]:
        own = AppendResponse(self.term, answer.flush_lsn, answer.commit_lsn)
        return super()._append_answered(peer, own)  # type: ignore[arg-type]


class CountsOnItsWindow(Proposer):
    """Never asks PostgreSQL again for what members have lost of a record longer than the window."""

    def _may_restart_window(self, leader: LeaderState, missing_lsn: Lsn) -> bool:
        return False


class RestartsWindowWhereWalLacks(Proposer):
    """Asks PostgreSQL for just what is missing, so that record ends are not seen any more."""

    def _pump_all(self) -> list[ProposerEffect]:
        effects = super()._pump_all()
        for index, effect in enumerate(effects):
            if isinstance(effect, RestartWindow) and self._leader is not None:
                lsn = Lsn(effect.start_lsn + 4)
                self._leader.window_start_lsn = self._leader.window_end_lsn = lsn
                effects[index] = RestartWindow(lsn)
        return effects


class LeadsOnWithoutLooking(Proposer):
    """Renews its term although a voter holds WAL of one who has succeeded it."""

    def _is_succession(self, leader: LeaderState, term: Term) -> bool:
        return False


class RenewsByItself(Proposer):
    """Takes a higher term without asking anybody."""

    def _renew(self) -> list[ProposerEffect]:
        effects = super()._renew()
        return effects + self._lead_on(self._leading(), [(self._peers[0], NO_LOG)])


class RenewsInsideRecords(Proposer):
    """Lets the new term's WAL begin where its window ends: a restart then takes it from its holders."""

    def _lead_on(self, leader: LeaderState, votes: list[tuple[Member, VoteResponse]]) -> list[ProposerEffect]:
        end_lsn = max(leader.window_end_lsn, leader.newest_boundary_lsn)
        known, leader.boundaries = leader.boundaries, [end_lsn]
        effects = super()._lead_on(leader, votes)
        leader.boundaries = known
        return effects


class BelievesTornRecordsAreHeld(Proposer):
    """Lets WAL go that a lagging member has flushed, though its next restart may cut it."""

    def _trim(self, held_size_bytes_min: int) -> list[ProposerEffect]:
        effects = super()._trim(held_size_bytes_min)
        leader = self._leading()
        if all(member.adopted for member in self._peers):
            flushed_lsn = min(member.flush_lsn for member in self._peers)
            leader.horizon_lsn = max(leader.horizon_lsn, min(leader.commit_lsn, flushed_lsn))
        return effects


@dataclass(frozen=True)
class Mutant:
    acceptor_type: type[Acceptor] = Acceptor
    proposer_type: type[Proposer] = Proposer
    first_seed: int = 0
    """Where the search begins: rare accidents are found late otherwise."""

    @property
    def name(self) -> str:
        broken = self.acceptor_type if self.acceptor_type is not Acceptor else self.proposer_type
        return broken.__name__


MUTANTS = (
    Mutant(SpeaksBeforePersisting),
    Mutant(NeverPersistsVotes),
    Mutant(VotesWithoutChecking),
    Mutant(AcceptsOlderTerms),
    Mutant(CutsBelowCommit),
    Mutant(CutsAgainWhenRepeated),
    Mutant(NeverCuts),
    Mutant(AdoptsBeforeCutting, first_seed=1100),
    Mutant(KeepsLeftovers, first_seed=600),
    Mutant(AcknowledgesUnflushed),
    Mutant(BelievesStaleFlushes),
    Mutant(ShowsUncommittedWal),
    Mutant(TrimsHistoryAtItsOwnCommit),
    Mutant(SkipsWhatItHas),
    Mutant(SkipsWhatOnlyMembersHave, LetsSkipToItsCommit),
    Mutant(ForgetsWhereItsWalBegins, first_seed=1300),
    Mutant(proposer_type=NeverLetsSkip),
    Mutant(proposer_type=CountsByPresence),
    Mutant(proposer_type=CommitsByMinority),
    Mutant(proposer_type=CommitsInsideRecords),
    Mutant(proposer_type=PrefersLongestLog),
    Mutant(proposer_type=PrefersNewestPromise),
    Mutant(proposer_type=TrustsAnyVoter),
    Mutant(proposer_type=IgnoresHigherTerms),
    Mutant(proposer_type=CountsOnItsWindow),
    Mutant(proposer_type=RestartsWindowWhereWalLacks),
    Mutant(proposer_type=LeadsOnWithoutLooking),
    Mutant(proposer_type=RenewsByItself),
    Mutant(proposer_type=RenewsInsideRecords),
    Mutant(proposer_type=BelievesTornRecordsAreHeld),
)

NOTICED = (AssertionError, CorruptionError)
"""How a broken rule shows: the checker objects, or a sound part finds the damage itself."""
