"""What WAL and acknowledgements move at a leader, against the sentences that define it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.lsn import Lsn
from excimer.consensus.leader_state import LeaderState, Member
from excimer.consensus.quorum import majority
from excimer.consensus.term_history import TermHistory
from excimer.wire.safekeeping import Term, TermStart

START = Lsn(0x1000)
CHUNK = 64
IN_FLIGHT = 256


def leader_of(count: int) -> LeaderState:
    members = [Member(index) for index in range(count)]
    for member in members:
        member.connected = member.adopted = True
        member.sent_lsn = member.flush_lsn = START
    return LeaderState(
        members,
        start_lsn=START,
        history=TermHistory((TermStart(Term(1), START),)),
        chunk_size_bytes=CHUNK,
        in_flight_size_bytes_max=IN_FLIGHT,
    )


@pytest.mark.parametrize(
    ("lsns", "reached"),
    [
        ([120, 90, 70], 90),
        ([70, None, 120], 70),
        ([None, 120, None], 0),
        ([120], 120),
        ([None, None, None], 0),
        ([1, 2, 3, 4, 5], 3),
    ],
)
def test_a_majority_counts_members_with_this_terms_history(lsns: list[int | None], reached: int) -> None:
    leader = leader_of(len(lsns))
    for member, lsn in zip(leader.members, lsns, strict=True):
        member.adopted = lsn is not None
        member.flush_lsn = Lsn(1 << 40 if lsn is None else lsn)
    assert leader.majority_flush_lsn() == reached


@given(
    count=st.sampled_from([1, 3, 5]),
    record_sizes=st.lists(st.integers(1, 90), max_size=200),
    data=st.data(),
)
def test_commits_are_record_ends_that_a_majority_has_flushed(
    count: int, record_sizes: list[int], data: st.DataObject
) -> None:
    leader = leader_of(count)
    assert leader.advance_commit()
    assert leader.commit_lsn == START
    ends = [START]
    end_lsn = START
    for size in record_sizes:
        end_lsn = Lsn(end_lsn + size)
        ends.append(end_lsn)
        window_end_lsn = Lsn(end_lsn + data.draw(st.integers(0, size - 1)))
        leader.wal_appended(max(window_end_lsn, leader.window_end_lsn), end_lsn)
        member = data.draw(st.sampled_from(leader.members))
        flush_lsn = Lsn(data.draw(st.integers(member.flush_lsn, leader.window_end_lsn)))
        leader.answered(member, flush_lsn, START)
        before = leader.commit_lsn
        has_risen = leader.advance_commit()
        held = sorted((each.flush_lsn for each in leader.members), reverse=True)[majority(count) - 1]
        assert leader.commit_lsn == max(lsn for lsn in ends if lsn <= held)
        assert has_risen == (leader.commit_lsn > before)
        assert leader.boundaries == [lsn for lsn in ends if lsn > leader.commit_lsn]
        assert leader.newest_boundary_lsn == end_lsn


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=60))
def test_wal_goes_out_once_in_order_and_gathers_while_an_append_is_under_way(
    steps: list[tuple[bool, int]],
) -> None:
    leader = leader_of(1)
    (member,) = leader.members
    sent: list[tuple[Lsn, Lsn]] = []
    for is_answer, amount in steps:
        under_way = sent[-1][1] - member.flush_lsn if sent else 0
        if is_answer:
            leader.answered(member, Lsn(min(member.flush_lsn + amount, member.flush_lsn + under_way)), START)
        else:
            end_lsn = Lsn(leader.window_end_lsn + amount)
            leader.wal_appended(end_lsn, end_lsn)
        while (wal := leader.next_append(member)) is not None:
            begin_lsn, end_lsn = wal
            assert begin_lsn == (sent[-1][1] if sent else START)
            assert begin_lsn < end_lsn <= min(begin_lsn + CHUNK, leader.window_end_lsn)
            assert begin_lsn < member.flush_lsn + IN_FLIGHT
            assert begin_lsn == member.flush_lsn or end_lsn - begin_lsn == CHUNK
            sent.append(wal)
        waits = leader.window_end_lsn - (member.sent_lsn or START)
        assert waits < CHUNK or (sent[-1][1] - member.flush_lsn) >= IN_FLIGHT or not waits
        assert member.flush_lsn < (member.sent_lsn or 0) or not waits


@pytest.mark.parametrize("lacks", ["connection", "history", "place", "window"])
def test_nothing_goes_to_a_member_that_cannot_take_it(lacks: str) -> None:
    leader = leader_of(3)
    member = leader.members[0]
    leader.wal_appended(Lsn(START + 10), Lsn(START + 10))
    member.connected = lacks != "connection"
    member.adopted = lacks != "history"
    if lacks == "place":
        member.sent_lsn = None
    if lacks == "window":
        leader.window_start_lsn = Lsn(START + 1)
    assert leader.next_append(member) is None
    assert leader.next_append(leader.members[1]) == (None if lacks == "window" else (START, START + 10))


def test_an_answer_from_beyond_what_counts_as_sent_moves_that_too() -> None:
    leader = leader_of(1)
    leader.wal_appended(Lsn(START + 10), Lsn(START + 10))
    leader.answered(leader.members[0], Lsn(START + 10), START)
    assert leader.members[0].sent_lsn == START + 10


def test_record_ends_may_be_set() -> None:
    leader = leader_of(1)
    leader.boundaries = [Lsn(START + lsn) for lsn in range(1, 200)]
    assert leader.boundaries == [START + lsn for lsn in range(1, 200)]
    assert leader.newest_boundary_lsn == START + 199
