"""When statuses are told: soon after a change, then ever more rarely, and all of them when asked."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from excimer.service.announcements import REPEAT_MOST_S, Announcements


def test_a_change_is_told_at_once_and_then_ever_more_rarely() -> None:
    announcements = Announcements[str]()
    announcements.changed("a", 10.0)
    told = [now for now in range(10, 1200) if announcements.due(now)]
    assert told[:6] == [10, 11, 13, 17, 25, 41]
    assert max(later - now for now, later in pairwise(told)) == REPEAT_MOST_S


def test_changes_keep_their_distance_and_begin_anew() -> None:
    announcements = Announcements[str](spacing_s=0.5)
    announcements.changed("a", 0.0)
    assert announcements.due(0.0) == ["a"]
    announcements.changed("a", 0.1)
    announcements.changed("a", 0.2)
    assert announcements.due(0.4) == []
    assert announcements.due(0.5) == ["a"]
    assert announcements.due(1.4) == []
    assert announcements.due(1.5) == ["a"]


def test_who_asks_is_told_everything_that_is_still_there() -> None:
    announcements = Announcements[str]()
    for key in ("a", "b", "c"):
        announcements.changed(key, 0.0)
    assert sorted(announcements.due(0.0)) == ["a", "b", "c"]
    announcements.forget("b")
    announcements.tell_all(0.5)
    assert sorted(announcements.due(0.5)) == ["a", "c"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0, 3), st.sampled_from(["changed", "forget", "due"]))
    )
)
def test_no_change_is_left_untold(steps: list[tuple[str, float, str]]) -> None:
    announcements = Announcements[str](spacing_s=0.5)
    now, untold = 0.0, set[str]()
    for key, wait_s, what in steps:
        now += wait_s
        if what == "changed":
            announcements.changed(key, now)
            untold.add(key)
        elif what == "forget":
            announcements.forget(key)
            untold.discard(key)
        else:
            untold -= set(announcements.due(now))
    assert untold <= set(announcements.due(now + 0.5))
