"""How much is evicted, and how often it is looked."""

from hypothesis import given
from hypothesis import strategies as st

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.compute.cache_plan import (
    LOOK_S_MIN,
    NOTHING_SWEPT,
    QUIET_S,
    STUCK_S_MAX,
    CachePlan,
    Swept,
    blocks_to_evict,
)

MIB = 1 << 20
SIZES = st.integers(0, 1 << 50)


@given(used=SIZES, bound=SIZES)
def test_what_goes_brings_the_cache_within_its_bound_and_not_far_below(used: int, bound: int) -> None:
    blocks = blocks_to_evict(used, bound)
    if bound == 0 or used <= bound:
        assert blocks == 0
    else:
        left = used - blocks * BLOCK_SIZE_BYTES
        assert bound * 15 // 16 - BLOCK_SIZE_BYTES <= left <= bound


def wait_s(plan: CachePlan, swept: Swept = NOTHING_SWEPT, *, wanted: int = 5, changed: bool = False) -> float:
    return plan.wait_s(wanted=wanted, swept=swept, has_changed=changed, look_s=0.0)


def test_a_quiet_cache_is_looked_at_seldom_and_a_growing_one_at_once() -> None:
    plan = CachePlan()
    assert wait_s(plan, wanted=0) == QUIET_S
    assert wait_s(plan, wanted=0, changed=True) == LOOK_S_MIN


def test_where_nothing_can_go_it_is_looked_ever_less_often() -> None:
    plan = CachePlan()
    waits = [wait_s(plan, Swept(0, 9, 0, 0, 0)) for _ in range(20)]
    assert waits == sorted(waits)
    assert waits[-1] == STUCK_S_MAX
    assert wait_s(plan, Swept(1, 9, 0, 0, 0)) == LOOK_S_MIN
    assert wait_s(plan, Swept(0, 9, 0, 1, 0)) == LOOK_S_MIN


def test_a_look_that_takes_long_comes_seldom_within_the_bound() -> None:
    plan = CachePlan()
    assert plan.wait_s(wanted=0, swept=NOTHING_SWEPT, has_changed=True, look_s=0.05) == 0.5
    assert plan.wait_s(wanted=1, swept=NOTHING_SWEPT, has_changed=True, look_s=0.05) == LOOK_S_MIN


def test_postgres_is_asked_only_when_its_answer_can_help() -> None:
    assert CachePlan.asks(Swept(0, 0, 5, 1, 0), 5)
    assert CachePlan.asks(Swept(0, 5, 0, 0, 0), 5)
    assert not CachePlan.asks(Swept(5, 5, 0, 0, 0), 5)
    assert not CachePlan.asks(NOTHING_SWEPT, 5)
