"""What an acceptor refuses, and how it caps what it says. Its life is told in tests/scenarios/consensus."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from excimer.base.errors import CorruptionError, RefusedError
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.consensus import acceptor as acceptors
from excimer.consensus.term_history import HistoryMismatchError
from excimer.wire import safekeeping as wire

IDENTITY = wire.TimelineIdentity(
    tenant_id=TenantId("aa" * 16),
    timeline_id=TimelineId("bb" * 16),
    pg_version=18,
    system_id=7,
    wal_segment_size_bytes=1 << 24,
)
HERE = acceptors.ConnectionId(1)


def new_acceptor(recovered_end: int = 100, commit: int = 100) -> acceptors.Acceptor:
    return acceptors.Acceptor(
        node_id=NodeId(1),
        identity=IDENTITY,
        timeline_start_lsn=Lsn(100),
        state=replace(acceptors.AcceptorState.bootstrap(Lsn(100)), commit_lsn=Lsn(commit)),
        recovered_end_lsn=Lsn(recovered_end),
    )


def elected(*history: tuple[int, int]) -> wire.ProposerElected:
    entries = tuple(wire.TermStart(wire.Term(term), Lsn(start)) for term, start in history)
    return wire.ProposerElected(entries[-1].term, entries)


def append(term: int, begin: int, size: int, commit: int = 0) -> wire.AppendRequest:
    return wire.AppendRequest(wire.Term(term), Lsn(begin), Lsn(commit), Lsn(0), bytes(size))


def greeting(**changes: Any) -> wire.ProposerGreeting:
    identity = msgspec.structs.replace(IDENTITY, **changes)
    return wire.ProposerGreeting(identity=identity, proposer_id=wire.NO_PROPOSER, token="")


def messages(effects: list[acceptors.AcceptorEffect]) -> list[wire.AcceptorMessage]:
    return [effect.message for effect in effects if isinstance(effect, acceptors.Send)]


def test_less_wal_than_is_committed_is_corruption() -> None:
    with pytest.raises(acceptors.CommittedWalMissingError, match="ends at 0/64, but is committed up to 0/C8"):
        new_acceptor(recovered_end=100, commit=200)


def test_a_history_that_cuts_committed_wal_is_refused_and_changes_nothing() -> None:
    acceptor = new_acceptor(recovered_end=200, commit=200)
    before = acceptor.state
    with pytest.raises(acceptors.DivergenceBelowCommitError, match="below its commit LSN 0/C8"):
        acceptor.receive(HERE, elected((0, 100), (5, 150)))
    assert acceptor.state == before
    assert acceptor.flush_lsn == 200


def test_a_stranger_history_is_refused() -> None:
    with pytest.raises(HistoryMismatchError):
        new_acceptor().receive(HERE, elected((3, 100), (5, 150)))
    with pytest.raises(RefusedError, match="ends with term 1"):
        new_acceptor().receive(HERE, wire.ProposerElected(wire.Term(2), elected((0, 100), (1, 100)).history))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pg_version": 17}, "PostgreSQL version"),
        ({"system_id": 8}, "system id"),
        ({"wal_segment_size_bytes": 1 << 20}, "WAL segment size"),
        ({"timeline_id": "cc" * 16}, "timeline"),
    ],
)
def test_another_postgresql_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(acceptors.IdentityMismatchError, match=f"the proposer's {what} is"):
        new_acceptor().receive(HERE, greeting(**changes))


def test_a_proposer_may_ask_who_it_is_talking_to() -> None:
    unknown = greeting(pg_version=0, system_id=0, wal_segment_size_bytes=0)
    [answer] = messages(new_acceptor().receive(HERE, unknown))
    assert isinstance(answer, wire.AcceptorGreeting)
    assert answer.identity == IDENTITY


def test_another_protocol_version_is_refused() -> None:
    with pytest.raises(RefusedError, match="protocol version 3"):
        new_acceptor().receive(HERE, msgspec.structs.replace(greeting(), version=3))


def test_wal_of_an_older_term_is_not_written() -> None:
    acceptor = new_acceptor()
    acceptor.receive(HERE, elected((0, 100), (1, 100)))
    acceptor.receive(HERE, wire.VoteRequest(wire.Term(2), wire.NO_PROPOSER))
    effects = acceptor.receive(HERE, append(1, 100, 10))
    assert effects == [acceptors.Send(HERE, wire.AppendResponse(wire.Term(2), Lsn(100), Lsn(100)))]


def test_wal_before_the_history_and_wal_behind_a_gap_are_rejected() -> None:
    acceptor = new_acceptor()
    assert messages(acceptor.receive(HERE, append(1, 100, 10))) == [wire.AppendRejected(wire.Term(0), Lsn(0))]
    acceptor.receive(HERE, elected((0, 100), (1, 100)))
    assert messages(acceptor.receive(HERE, append(1, 101, 10))) == [
        wire.AppendRejected(wire.Term(1), Lsn(100))
    ]


def test_wal_that_is_here_already_is_not_written_again() -> None:
    acceptor = new_acceptor()
    acceptor.receive(HERE, elected((0, 100), (1, 100)))
    acceptor.receive(HERE, append(1, 100, 10))
    [write, flush] = acceptor.receive(HERE, append(1, 105, 10))
    assert isinstance(write, acceptors.WriteWal)
    assert (write.lsn, len(write.wal)) == (110, 5)
    assert flush == acceptors.FlushWal(Lsn(115), 0)
    assert messages(acceptor.receive(HERE, append(1, 100, 15))) == [
        wire.AppendResponse(wire.Term(1), Lsn(100), Lsn(100))
    ]


def test_commit_is_capped_at_a_durable_record_boundary() -> None:
    acceptor = new_acceptor()
    acceptor.receive(HERE, elected((0, 100), (1, 100)))
    [_, flush] = acceptor.receive(HERE, append(1, 100, 50, commit=130))
    assert isinstance(flush, acceptors.FlushWal)
    assert acceptor.state.commit_lsn == 100
    acceptor.wal_flushed(acceptors.FlushWal(Lsn(125), 0), Lsn(120))
    assert acceptor.state.commit_lsn == 120
    acceptor.wal_flushed(flush, Lsn(130))
    assert acceptor.state.commit_lsn == 130


def test_a_record_end_beyond_the_flush_is_an_error_of_the_shell() -> None:
    acceptor = new_acceptor()
    acceptor.receive(HERE, elected((0, 100), (1, 100)))
    acceptor.receive(HERE, append(1, 100, 50))
    with pytest.raises(CorruptionError, match="the last record's end"):
        acceptor.wal_flushed(acceptors.FlushWal(Lsn(125), 0), Lsn(126))


def test_reads_are_of_durable_wal_of_the_adopted_term() -> None:
    acceptor = new_acceptor(recovered_end=200)
    acceptor.receive(HERE, elected((0, 100), (1, 200)))

    def read(term: int, start: int, end: int) -> list[acceptors.AcceptorEffect]:
        return acceptor.receive(HERE, wire.ReadWalRequest(wire.Term(term), Lsn(start), Lsn(end)))

    assert read(1, 150, 300) == [acceptors.ReadWal(HERE, wire.Term(1), Lsn(150), Lsn(200))]
    for term, start, end in [(0, 150, 200), (1, 200, 300), (1, 180, 170)]:
        assert messages(read(term, start, end)) == [wire.WalChunk(wire.Term(1), Lsn(start), b"")]
    # WAL that has been removed: the answer says where it begins.
    assert messages(read(1, 99, 200)) == [wire.WalChunk(wire.Term(1), Lsn(100), b"")]


def test_a_gone_connection_gets_no_answers() -> None:
    acceptor = new_acceptor()
    acceptor.receive(HERE, elected((0, 100), (1, 100)))
    [_, flush] = acceptor.receive(HERE, append(1, 100, 50))
    acceptor.disconnected(HERE)
    assert isinstance(flush, acceptors.FlushWal)
    assert acceptor.wal_flushed(flush, Lsn(150)) == []
    assert acceptor.flush_lsn == 150
