"""Choosing a WAL source: most WAL first, failed ones rest, a silent one is left when others have more."""

from excimer.base.address import Address
from excimer.base.clock import Monotonic
from excimer.base.lsn import Lsn
from excimer.pageserver.receiver_plan import (
    BACKOFF_S_MAX,
    STALL_TIMEOUT_S,
    Failure,
    Source,
    choose_source,
    is_stalled,
    next_failure,
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
    assert is_stalled(sources(a=5, b=9), A, 5, NOW, late)
    assert not is_stalled(sources(a=5, b=9), A, 5, NOW, Monotonic(late - 0.1))
    assert not is_stalled(sources(a=9, b=5), A, 5, NOW, late)
    assert not is_stalled(sources(a=5, b=9), A, 9, NOW, late)
