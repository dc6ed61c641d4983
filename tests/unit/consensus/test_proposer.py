"""A proposer's limits and refusals. Its life is told in tests/scenarios/consensus."""

from typing import Any

import msgspec
import pytest

from excimer.base.errors import FencedError, RefusedError
from excimer.base.ids import NodeId
from excimer.base.lsn import Lsn
from excimer.consensus import proposer as proposers
from excimer.consensus.quorum import MemberCountError
from excimer.wire import safekeeping as wire
from tests.unit.consensus.test_acceptor import IDENTITY

LIMITS = proposers.ProposerLimits(
    chunk_size_bytes=100,
    repair_chunk_size_bytes=40,
    in_flight_size_bytes_max=250,
    window_size_bytes_max=400,
    trim_size_bytes=150,
)


def new_proposer(member_count: int = 3) -> proposers.Proposer:
    return proposers.Proposer(
        identity=msgspec.structs.replace(IDENTITY, system_id=0),
        proposer_id=wire.ProposerId(b"p" * 16),
        token="",
        member_count=member_count,
        limits=LIMITS,
    )


def greeting(node: int, term: int = 0, **changes: Any) -> wire.AcceptorGreeting:
    return wire.AcceptorGreeting(
        node_id=NodeId(node),
        identity=msgspec.structs.replace(IDENTITY, **changes),
        term=wire.Term(term),
        timeline_start_lsn=Lsn(100),
        flush_lsn=Lsn(100),
        commit_lsn=Lsn(100),
    )


def vote(flush: int = 100, commit: int = 100, **changes: Any) -> wire.VoteResponse:
    granted = wire.VoteResponse(
        term=wire.Term(1),
        granted=True,
        flush_lsn=Lsn(flush),
        last_record_end_lsn=Lsn(flush),
        wal_start_lsn=Lsn(100),
        commit_lsn=Lsn(commit),
        history=(wire.TermStart(wire.Term(0), Lsn(100)),),
    )
    return msgspec.structs.replace(granted, **changes)


def leader(member_count: int = 3, flush: int = 100) -> proposers.Proposer:
    proposer = new_proposer(member_count)
    for peer in range(member_count):
        proposer.peer_connected(peer)
        proposer.receive(peer, greeting(peer + 1))
    for peer in range(member_count // 2 + 1):
        proposer.receive(peer, vote(flush))
    assert proposer.phase is proposers.Phase.LEADING
    return proposer


def adopt(proposer: proposers.Proposer, peer: int, flush: int, wal_start: int = 100) -> Any:
    answer = wire.ElectedResponse(wire.Term(1), Lsn(flush), Lsn(wal_start), Lsn(100), Lsn(0))
    return proposer.receive(peer, answer)


def acknowledge(proposer: proposers.Proposer, peer: int, flush: int, term: int = 1) -> Any:
    return proposer.receive(peer, wire.AppendResponse(wire.Term(term), Lsn(flush), Lsn(100)))


def test_even_member_counts_are_refused() -> None:
    with pytest.raises(MemberCountError):
        new_proposer(2)


def test_two_addresses_of_one_safekeeper_are_refused() -> None:
    proposer = new_proposer()
    proposer.receive(0, greeting(7))
    with pytest.raises(proposers.DuplicateMemberError, match="lead to safekeeper 7"):
        proposer.receive(1, greeting(7))
    with pytest.raises(proposers.DuplicateMemberError, match="now leads to safekeeper 8"):
        proposer.receive(0, greeting(8))


def test_identity_is_learned_and_then_insisted_on() -> None:
    proposer = new_proposer()
    proposer.receive(0, greeting(1, system_id=7))
    assert proposer.identity.system_id == 7
    with pytest.raises(RefusedError, match="another PostgreSQL's timeline"):
        proposer.receive(1, greeting(2, system_id=8))


def test_a_best_log_below_a_commit_is_a_violation() -> None:
    proposer = new_proposer()
    for peer in range(3):
        proposer.receive(peer, greeting(peer + 1))
    proposer.receive(0, vote(100))
    with pytest.raises(proposers.SafetyViolationError, match="but 0/C8 is committed"):
        proposer.receive(1, vote(100, commit=200))


def test_only_members_with_this_terms_history_count() -> None:
    proposer = leader(flush=200)
    assert adopt(proposer, 0, 200) == []
    assert acknowledge(proposer, 1, 200) == []
    assert proposer.commit_lsn == 0
    assert proposers.CommitAdvanced(Lsn(200)) in adopt(proposer, 1, 200)


def test_an_error_frame_is_raised_with_its_text() -> None:
    with pytest.raises(RefusedError, match="no such timeline"):
        new_proposer().receive(0, wire.ErrorResponse(wire.ErrorCode.REFUSED, "no such timeline"))


def test_wal_is_refused_before_the_election_and_after_fencing() -> None:
    with pytest.raises(FencedError, match="does not lead"):
        new_proposer().wal_appended(Lsn(100), Lsn(100))
    proposer = leader()
    adopt(proposer, 0, 100)
    probe = proposers.Send(0, wire.VoteRequest(wire.Term(1), wire.ProposerId(b"p" * 16)))
    assert acknowledge(proposer, 0, 100, term=9) == [probe]
    assert acknowledge(proposer, 1, 100, term=9) == [proposers.Fenced(wire.Term(9))]
    assert acknowledge(proposer, 2, 100, term=9) == []
    with pytest.raises(FencedError, match="does not lead"):
        proposer.wal_appended(Lsn(150), Lsn(150))


def test_wal_is_cut_in_chunks_up_to_the_in_flight_limit() -> None:
    proposer = leader(1)
    adopt(proposer, 0, 100)
    sent = proposer.wal_appended(Lsn(450), Lsn(450))
    assert [(e.begin_lsn, e.end_lsn) for e in sent if isinstance(e, proposers.SendWal)] == [
        (100, 200),
        (200, 300),
        (300, 400),
    ]
    # Group commit: the rest does not fill a chunk, so it waits until nothing is under way.
    assert not any(isinstance(effect, proposers.SendWal) for effect in acknowledge(proposer, 0, 200))
    sent = acknowledge(proposer, 0, 400)
    assert [(e.begin_lsn, e.end_lsn) for e in sent if isinstance(e, proposers.SendWal)] == [(400, 450)]


def test_uncommitted_wal_fills_the_window_and_commits_empty_it() -> None:
    proposer = leader()
    for peer in range(3):
        adopt(proposer, peer, 100)
    assert proposer.writable_size_bytes == 400
    proposer.wal_appended(Lsn(500), Lsn(500))
    assert proposer.writable_size_bytes == 0
    acknowledge(proposer, 0, 500)
    effects = acknowledge(proposer, 1, 500)
    # Half the window stays for the member that lags.
    assert proposers.TrimWindow(Lsn(300)) in effects
    assert proposer.writable_size_bytes == 200
    assert proposers.TrimWindow(Lsn(500)) in acknowledge(proposer, 2, 500)
    assert proposer.writable_size_bytes == 400


def test_wal_that_all_have_leaves_the_window_with_a_heartbeat_at_the_latest() -> None:
    proposer = leader()
    for peer in range(3):
        adopt(proposer, peer, 100)
    proposer.wal_appended(Lsn(200), Lsn(200))
    for peer in range(3):
        assert not any(isinstance(e, proposers.TrimWindow) for e in acknowledge(proposer, peer, 200))
    assert proposers.TrimWindow(Lsn(200)) in proposer.tick()


def test_a_commit_is_announced_to_members_that_no_append_told() -> None:
    proposer = leader()
    for peer in range(3):
        adopt(proposer, peer, 100)
    proposer.wal_appended(Lsn(150), Lsn(150))
    acknowledge(proposer, 0, 150)
    acknowledge(proposer, 1, 150)
    sent = proposer.wal_appended(Lsn(190), Lsn(190))
    told = {effect.peer for effect in sent if isinstance(effect, proposers.SendWal)}
    assert told == {0, 1}, "the third one's answer is still on its way"
    announcement = wire.CommitAnnounce(wire.Term(1), Lsn(150), Lsn(100))
    (announced,) = proposer.announce()
    assert announced == proposers.Send(2, announcement)
    assert proposer.announce() == []


def test_a_member_below_all_wal_that_is_left_is_stranded() -> None:
    proposer = leader(flush=300)
    adopt(proposer, 0, 300, wal_start=200)
    adopt(proposer, 1, 300, wal_start=200)
    assert proposers.PeerStranded(2, Lsn(100)) in adopt(proposer, 2, 100)
    assert not any(isinstance(effect, proposers.PeerStranded) for effect in proposer.tick())


def test_what_one_donor_cannot_serve_is_asked_of_another_at_the_next_tick() -> None:
    proposer = leader(flush=300)
    adopt(proposer, 0, 300)
    adopt(proposer, 1, 300)
    read = proposers.Send(0, wire.ReadWalRequest(wire.Term(1), Lsn(100), Lsn(140)))
    assert read in adopt(proposer, 2, 100)
    assert proposer.receive(0, wire.WalChunk(wire.Term(1), Lsn(100), b"")) == []
    assert msgspec.structs.replace(read, peer=1) in proposer.tick()


def test_a_donor_that_disconnects_is_replaced() -> None:
    proposer = leader(flush=300)
    adopt(proposer, 0, 300)
    adopt(proposer, 1, 300)
    adopt(proposer, 2, 100)
    read = wire.ReadWalRequest(wire.Term(1), Lsn(100), Lsn(140))
    assert proposers.Send(1, read) in proposer.peer_disconnected(0)


def test_the_beginning_of_a_long_record_leaves_the_window_once_a_majority_has_it() -> None:
    proposer = leader()
    for peer in range(3):
        adopt(proposer, peer, 100)
    end_lsn = 100
    for _ in range(50):  # a record ten times as long as the window
        assert proposer.writable_size_bytes >= 100
        end_lsn += 100
        proposer.wal_appended(Lsn(end_lsn), Lsn(100))
        acknowledge(proposer, 0, end_lsn)
        acknowledge(proposer, 1, end_lsn)
    assert proposer.commit_lsn == 100
    proposer.wal_appended(Lsn(end_lsn + 8), Lsn(end_lsn + 8))
    acknowledge(proposer, 0, end_lsn + 8)
    assert proposers.CommitAdvanced(Lsn(end_lsn + 8)) in acknowledge(proposer, 1, end_lsn + 8)


def test_what_a_minority_has_flushed_stays_in_the_window() -> None:
    proposer = leader()
    for peer in range(3):
        adopt(proposer, peer, 100)
    proposer.wal_appended(Lsn(500), Lsn(100))
    acknowledge(proposer, 0, 500)
    assert proposer.writable_size_bytes == 0
    acknowledge(proposer, 1, 300)
    assert proposer.writable_size_bytes == 200


def test_wal_is_asked_of_postgres_again_only_when_a_majority_lacks_it() -> None:
    proposer = leader()
    for peer in range(3):
        adopt(proposer, peer, 100)
    proposer.wal_appended(Lsn(500), Lsn(100))
    for peer in range(3):
        acknowledge(proposer, peer, 500)
    proposer.wal_appended(Lsn(900), Lsn(100))
    for peer in range(3):  # all restart, and keep whole records only
        proposer.peer_disconnected(peer)
    assert proposer.peer_connected(0)
    proposer.receive(0, greeting(1, term=1))
    assert not any(isinstance(effect, proposers.RestartWindow) for effect in adopt(proposer, 0, 100))
    proposer.peer_connected(1)
    proposer.receive(1, greeting(2, term=1))
    assert proposers.RestartWindow(Lsn(100)) in adopt(proposer, 1, 100)
    assert proposer.writable_size_bytes == 400


def test_a_voter_with_a_newer_leaders_wal_fences_at_once() -> None:
    proposer = leader()
    adopt(proposer, 0, 100)
    acknowledge(proposer, 0, 100, term=9)
    history = (wire.TermStart(wire.Term(0), Lsn(100)), wire.TermStart(wire.Term(8), Lsn(100)))
    refusal = vote(term=wire.Term(9), granted=False, history=history)
    assert proposer.receive(0, refusal) == [proposers.Fenced(wire.Term(8))]


def test_a_promise_that_came_to_nothing_is_won_back_after_some_heartbeats() -> None:
    proposer = leader()
    for peer in range(2):
        adopt(proposer, peer, 100)
    assert proposer.receive(2, greeting(3)) != []
    acknowledge(proposer, 2, 100, term=9)
    for _ in range(LIMITS.renewal_tick_count - 1):
        proposer.tick()
        assert proposer.phase is proposers.Phase.LEADING
    requests = proposer.tick()
    assert [effect.message for effect in requests if isinstance(effect, proposers.Send)] == [
        wire.VoteRequest(wire.Term(10), wire.ProposerId(b"p" * 16))
    ] * 3
    assert proposer.writable_size_bytes == 0
    proposer.wal_appended(Lsn(150), Lsn(150))  # had been under way
    assert proposer.receive(0, vote(term=wire.Term(10))) == []
    renewed = proposer.receive(2, vote(term=wire.Term(10)))
    assert renewed[0] == proposers.Renewed(wire.Term(10), Lsn(150))
    assert proposer.phase is proposers.Phase.LEADING


def test_after_a_renewal_nothing_is_committed_before_a_majority_holds_wal_up_to_the_new_term() -> None:
    """Under its old history a member's shorter log could still lose to another's (Raft, figure 8)."""
    proposer = leader()
    for peer in range(2):
        adopt(proposer, peer, 100)
    proposer.wal_appended(Lsn(120), Lsn(120))
    proposer.wal_appended(Lsn(150), Lsn(150))
    proposer.receive(2, greeting(3))
    acknowledge(proposer, 2, 100, term=9)
    for _ in range(LIMITS.renewal_tick_count):
        proposer.tick()
    proposer.receive(0, vote(term=wire.Term(10)))
    assert proposers.Renewed(wire.Term(10), Lsn(150)) in proposer.receive(2, vote(term=wire.Term(10)))
    for peer in (0, 2):
        proposer.receive(peer, wire.ElectedResponse(wire.Term(10), Lsn(120), Lsn(100), Lsn(100), Lsn(0)))
    assert proposer.commit_lsn == 100
    acknowledge(proposer, 0, 150, term=10)
    assert proposers.CommitAdvanced(Lsn(150)) in acknowledge(proposer, 2, 150, term=10)
