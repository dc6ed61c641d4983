"""The life of an endpoint: crashes restart with growing delays, fencing is final, stop always ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.compute.core import (
    EXIT_CLEAN,
    EXIT_FENCED,
    EXIT_REFUSED,
    EXIT_SUSPENDED,
    RESTART_DELAY_S_MAX,
    RESTART_DELAY_S_MIN,
    STABLE_AFTER_S,
    DelayOver,
    Ended,
    Endpoint,
    Event,
    Exit,
    Fenced,
    Launch,
    Revoked,
    Started,
    StartFailed,
    State,
    StopAttempt,
    StopRequested,
    SuspendRequested,
    Wait,
)


def crash(at_s: float) -> Ended:
    return Ended(at_s, "killed")


def test_a_crash_leads_to_a_fresh_start() -> None:
    endpoint = Endpoint()
    assert endpoint.begin() == [Launch()]
    assert endpoint.step(Started(0.0)) == []
    assert endpoint.state is State.RUNNING
    assert endpoint.step(crash(1.0)) == [Wait(RESTART_DELAY_S_MIN, "killed")]
    assert endpoint.step(DelayOver()) == [Launch()]


def test_delays_double_and_are_bounded_until_it_ran_for_a_while() -> None:
    endpoint = Endpoint()
    delays = []
    for _ in range(12):
        [wait] = endpoint.step(StartFailed("no quorum", may_retry=True))
        assert isinstance(wait, Wait)
        delays.append(wait.delay_s)
        endpoint.step(DelayOver())
    assert delays[:3] == [RESTART_DELAY_S_MIN, RESTART_DELAY_S_MIN * 2, RESTART_DELAY_S_MIN * 4]
    assert max(delays) == RESTART_DELAY_S_MAX
    endpoint.step(Started(100.0))
    assert endpoint.step(crash(101.0 + STABLE_AFTER_S)) == [Wait(RESTART_DELAY_S_MIN, "killed")]


@pytest.mark.parametrize("before", [[], [Started(0.0)], [Started(0.0), crash(1.0)]])
def test_fencing_is_final(before: list[Event]) -> None:
    endpoint = Endpoint()
    for event in before:
        endpoint.step(event)
    assert endpoint.step(Fenced("term 4 exists")) == [Exit(EXIT_FENCED, "term 4 exists")]
    assert endpoint.step(DelayOver()) == []


def test_a_refused_start_is_not_tried_again() -> None:
    assert Endpoint().step(StartFailed("no PostgreSQL 13", may_retry=False)) == [
        Exit(EXIT_REFUSED, "no PostgreSQL 13")
    ]


def test_a_suspend_stops_it_and_is_told_apart_from_a_stop() -> None:
    endpoint = Endpoint()
    endpoint.step(Started(0.0))
    assert endpoint.step(SuspendRequested("idle")) == [StopAttempt()]
    assert endpoint.step(StopRequested()) == []
    assert endpoint.step(crash(1.0)) == [Exit(EXIT_SUSPENDED, "idle")]


def test_a_crash_before_the_suspend_leaves_it_suspended() -> None:
    endpoint = Endpoint()
    endpoint.step(Started(0.0))
    endpoint.step(crash(1.0))
    assert endpoint.step(SuspendRequested("idle")) == [Exit(EXIT_SUSPENDED, "idle")]


def test_a_stop_that_came_first_is_a_stop() -> None:
    endpoint = Endpoint()
    endpoint.step(Started(0.0))
    endpoint.step(StopRequested())
    assert endpoint.step(SuspendRequested("idle")) == []
    assert endpoint.step(crash(1.0)) == [Exit(EXIT_CLEAN, "stopped")]


def test_stop_waits_for_the_attempt_to_end() -> None:
    endpoint = Endpoint()
    endpoint.step(Started(0.0))
    assert endpoint.step(StopRequested()) == [StopAttempt()]
    assert endpoint.step(StopRequested()) == []
    assert endpoint.step(crash(1.0)) == [Exit(EXIT_CLEAN, "stopped")]


def test_stop_while_waiting_ends_at_once() -> None:
    endpoint = Endpoint()
    endpoint.step(crash(1.0))
    assert endpoint.step(StopRequested()) == [Exit(EXIT_CLEAN, "stopped")]


def test_an_endpoint_whose_branch_is_gone_stops_and_says_so() -> None:
    endpoint = Endpoint()
    endpoint.step(Started(0.0))
    assert endpoint.step(Revoked("deleted")) == [StopAttempt()]
    assert endpoint.step(StopRequested()) == []
    assert endpoint.step(crash(1.0)) == [Exit(EXIT_REFUSED, "deleted")]
    waiting = Endpoint()
    waiting.step(crash(1.0))
    assert waiting.step(Revoked("deleted")) == [Exit(EXIT_REFUSED, "deleted")]
    stopping = Endpoint()
    stopping.step(StopRequested())
    assert stopping.step(Revoked("deleted")) == []
    assert stopping.step(crash(1.0)) == [Exit(EXIT_CLEAN, "stopped")]


EVENTS = st.sampled_from(
    [
        Started(1.0),
        crash(2.0),
        StartFailed("x", may_retry=True),
        DelayOver(),
        StopRequested(),
        Revoked("z"),
        Fenced("y"),
    ]
)


@given(st.lists(EVENTS))
def test_at_most_one_attempt_runs_and_the_end_is_final(events: list[Event]) -> None:
    """An attempt's end is only reported while one runs, as the shell does; then nothing overlaps."""
    endpoint = Endpoint()
    running = True
    for event in events:
        if isinstance(event, Started | Ended | StartFailed | Fenced) and not running:
            continue
        if isinstance(event, Ended | StartFailed | Fenced):
            running = False
        for effect in endpoint.step(event):
            if isinstance(effect, Launch):
                assert not running
                running = True
            if isinstance(effect, Exit):
                assert not running
                assert endpoint.state is State.STOPPED
