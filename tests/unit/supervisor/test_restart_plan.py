"""When a service that has ended is started again."""

import signal

import pytest

from excimer.supervisor.restart_plan import (
    FIRST_WAIT_S,
    PROVEN_S,
    START_S,
    WAIT_MAX_S,
    Leave,
    Life,
    Restart,
    plan_restart,
)


@pytest.mark.parametrize("lived_s", [0.0, START_S, 10 * PROVEN_S])
@pytest.mark.parametrize("is_restart", [False, True])
@pytest.mark.parametrize("code", [0, -signal.SIGTERM])
def test_a_stop_was_meant(lived_s: float, is_restart: bool, code: int) -> None:
    assert plan_restart(Life(lived_s, code, is_restart), 3) == Leave(is_failure=False)


def test_who_cannot_start_is_left_alone() -> None:
    assert plan_restart(Life(0.1, 1, is_restart=False), 0) == Leave(is_failure=True)
    assert plan_restart(Life(START_S, 1, is_restart=False), 0) == Restart(FIRST_WAIT_S, 1)


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, None])
def test_who_was_killed_comes_back_at_any_age(code: int | None) -> None:
    for lived_s in (0.0, START_S, PROVEN_S):
        assert plan_restart(Life(lived_s, code, is_restart=False), 0) == Restart(FIRST_WAIT_S, 1)


def test_a_restart_that_fails_is_tried_again_later_and_later() -> None:
    """The disk may be full for an hour and then not."""
    failures, waits = 0, []
    for _ in range(12):
        plan = plan_restart(Life(0.1, 1, is_restart=True), failures)
        assert isinstance(plan, Restart)
        failures = plan.failures
        waits.append(plan.wait_s)
    assert waits[:3] == [FIRST_WAIT_S, 2 * FIRST_WAIT_S, 4 * FIRST_WAIT_S]
    assert waits == sorted(waits)
    assert waits[-1] == WAIT_MAX_S
    assert plan_restart(Life(0.1, 1, is_restart=True), 10**6) == Restart(WAIT_MAX_S, 10**6 + 1)


def test_a_long_life_makes_up_for_failures() -> None:
    assert plan_restart(Life(PROVEN_S, 1, is_restart=True), 9) == Restart(FIRST_WAIT_S, 1)
