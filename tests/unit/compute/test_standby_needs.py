"""What hot standbys need, as several safekeepers tell it."""

from excimer.compute.standby_needs import HOLDS_S, StandbysNeeds
from excimer.safekeeper.standby_needs import StandbyNeeds
from excimer.wire.replication import NOTHING_NEEDED, HotStandbyFeedback

OLD, NEW = HotStandbyFeedback(700, 0), HotStandbyFeedback(900, 300)


def test_the_oldest_counts_until_its_safekeeper_says_otherwise_or_falls_silent() -> None:
    needs = StandbysNeeds()
    assert needs.tell(0, NEW, 0.0)
    assert needs.tell(1, OLD, 1.0)
    assert needs.oldest == HotStandbyFeedback(700, 300)
    assert not needs.tell(1, OLD, 2.0), "nothing new"
    assert needs.forget_old(HOLDS_S)
    assert needs.oldest == OLD
    assert needs.tell(1, NOTHING_NEEDED, HOLDS_S + 1)
    assert needs.oldest == NOTHING_NEEDED


def test_a_standby_that_leaves_needs_nothing_more() -> None:
    needs = StandbyNeeds()
    first, second, third = object(), object(), object()
    assert needs.tell(first, OLD) == OLD
    assert needs.tell(second, NEW) == HotStandbyFeedback(700, 300)
    assert needs.leave(third) is None
    assert needs.leave(first) == NEW
    assert needs.leave(second) == NOTHING_NEEDED
    assert needs.leave(second) is None
