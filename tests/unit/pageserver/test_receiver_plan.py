"""Choosing a WAL source: most WAL first, failed ones rest, a silent one is left when others have more."""

from excimer.base.address import Address
from excimer.base.clock import Monotonic
from excimer.base.ids import NodeId
from excimer.base.lsn import Lsn
from excimer.pageserver.receiver_plan import (
    BACKOFF_S_MAX,
    IDLE_S,
    STALL_TIMEOUT_S,
    Failure,
    Source,
    choose_source,
    confirmed_sources,
    is_idle,
    is_stalled,
    next_failure,
    wait_s,
)

A, B, C = (Address("h", port) for port in (1, 2, 3))
NOW = Monotonic(100.0)


def sources(**commit: int) -> list[Source]:
    return [Source({"a": A, "b": B, "c": C}[name], Lsn(lsn)) for name, lsn in commit.items()]


def test_the_highest_commit_lsn_wins_and_ties_are_stable() -> None:
    assert choose_source([], {}, NOW) is None
    assert choose_source(sources(a=5, b=9, c=7), {}, NOW) == Source(B, Lsn(9))
    assert choose_source(sources(c=5, a=5), {}, NOW) == Source(A, Lsn(5))


def test_a_failed_source_rests_and_then_comes_back() -> None:
    failures = {B: Failure(1, Monotonic(101.0))}
    assert choose_source(sources(a=5, b=9), failures, NOW) == Source(A, Lsn(5))
    assert choose_source(sources(b=9), failures, NOW) is None
    assert choose_source(sources(a=5, b=9), failures, Monotonic(101.0)) == Source(B, Lsn(9))
    assert choose_source(sources(a=9, b=9), {A: Failure(1, NOW)}, NOW) == Source(B, Lsn(9))


def test_back_off_doubles_up_to_a_bound() -> None:
    failure = None
    waits = []
    for _ in range(40):
        failure = next_failure(failure, NOW)
        waits.append(failure.until - NOW)
    assert waits[1] > 1.9 * waits[0]
    assert waits[-1] == BACKOFF_S_MAX


def test_silence_is_a_stall_only_if_another_has_more() -> None:
    late = Monotonic(NOW + STALL_TIMEOUT_S)
    assert is_stalled(sources(a=5, b=9), {A}, 5, NOW, late)
    assert not is_stalled(sources(a=5, b=9), {A}, 5, NOW, Monotonic(late - 0.1))
    assert not is_stalled(sources(a=9, b=5), {A}, 5, NOW, late)
    assert not is_stalled(sources(a=5, b=9), {A}, 9, NOW, late)
    assert not is_stalled(sources(a=5, b=9), {A, B}, 5, NOW, late), "b has shown that it has not"


def test_an_idle_timeline_connects_only_to_who_has_more_or_is_unknown() -> None:
    assert choose_source(sources(a=5, b=9), {}, NOW, Lsn(9)) is None
    assert choose_source(sources(a=5, b=9), {}, NOW, Lsn(8)) == Source(B, Lsn(9))
    assert choose_source(sources(a=5, c=0), {}, NOW, Lsn(9)) == Source(C, Lsn(0))


def test_a_connection_goes_when_all_is_here() -> None:
    late = Monotonic(NOW + IDLE_S)
    assert is_idle(sources(a=9, b=5), Lsn(9), NOW, late)
    assert not is_idle(sources(a=9), Lsn(9), NOW, Monotonic(late - 0.1))
    assert not is_idle(sources(a=9, b=10), Lsn(9), NOW, late)
    assert not is_idle(sources(a=0), Lsn(9), NOW, late)


MEMBERS = {NodeId(1): A, NodeId(2): B, NodeId(3): C}


def confirmed(**claims: int) -> list[int]:
    """Commit LSNs of the three members as they count."""
    ids = {"a": 1, "b": 2, "c": 3, "stranger": 4}
    numbers = {NodeId(ids[name]): Lsn(lsn) for name, lsn in claims.items()}
    return [source.commit_lsn for source in confirmed_sources(MEMBERS, numbers, {})]


def test_a_claim_counts_as_far_as_a_majority_claims_as_much() -> None:
    assert confirmed(a=5, b=9, c=7) == [5, 7, 7]
    assert confirmed(a=2**64 - 1, b=9, c=7) == [9, 9, 7], "one that boasts is one of those that have most"
    assert confirmed(a=2**64 - 1, b=9) == [9, 9, 0]
    assert confirmed(a=2**64 - 1) == [0, 0, 0]
    assert confirmed(a=5, b=5, stranger=2**64 - 1) == [5, 5, 0]
    assert confirmed() == [0, 0, 0]
    assert [each.claimed_lsn for each in confirmed_sources(MEMBERS, {NodeId(1): Lsn(99)}, {})] == [99, 0, 0]
    assert confirmed_sources({NodeId(1): A}, {NodeId(1): Lsn(9)}, {NodeId(1): Lsn(8)}) == [
        Source(A, Lsn(9), Lsn(8), Lsn(9))
    ]


def test_a_boast_wins_no_preference_and_wakes_an_idle_timeline_once() -> None:
    claims = {NodeId(3): Lsn(1 << 60), NodeId(1): Lsn(9), NodeId(2): Lsn(9)}
    boasting = confirmed_sources(MEMBERS, claims, {})
    assert choose_source(boasting, {}, NOW) == boasting[0]
    chosen = choose_source(boasting, {}, NOW, Lsn(9))
    assert chosen is not None
    assert chosen.address == C
    assert choose_source(boasting, {}, NOW, Lsn(9), Lsn(1 << 60)) is None
    assert is_idle(boasting, Lsn(9), NOW, Monotonic(NOW + IDLE_S))
    assert not is_stalled(boasting, {A}, 9, NOW, Monotonic(NOW + STALL_TIMEOUT_S))


def test_waiting_ends_when_a_source_has_rested() -> None:
    assert wait_s({}, NOW) is None
    failures = {
        A: Failure(1, Monotonic(103.0)),
        B: Failure(1, Monotonic(101.0)),
        C: Failure(1, Monotonic(99.0)),
    }
    assert wait_s(failures, NOW) == 1.0
