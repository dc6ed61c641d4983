"""When an idle endpoint is suspended, against a world that says who was really there at each moment."""

from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from excimer.base.clock import Monotonic
from excimer.compute.idle_policy import SAMPLE_WAIT_S_MAX, IdlePolicy, Sample, Stay, Suspend

SESSIONS: Final = "client sessions"
VACUUM: Final = "autovacuum workers"

spans = st.lists(
    st.tuples(
        st.floats(0, 400, allow_nan=False),  # when it begins
        st.floats(0, 60, allow_nan=False),  # how long it lasts
        st.sampled_from([SESSIONS, VACUUM, "unknown"]),
    ),
    max_size=8,
)
delays = st.one_of(st.floats(0.5, 100), st.just(300.0))


class World:
    """Sessions and maintenance at fixed times; each session is one login, when it begins."""

    def __init__(self, happenings: list[tuple[float, float, str]]) -> None:
        self.happenings = happenings

    def sample(self, at_s: float) -> Sample:
        present = [kind for begin_s, lasts_s, kind in self.happenings if begin_s <= at_s < begin_s + lasts_s]
        logins = sum(begin_s <= at_s and kind == SESSIONS for begin_s, _, kind in self.happenings)
        sessions, vacuums = present.count(SESSIONS), present.count(VACUUM)
        return Sample(
            Monotonic(at_s),
            logins,
            {SESSIONS: sessions} if sessions else {},
            {VACUUM: vacuums} if vacuums else {},
            is_known="unknown" not in present,
        )

    def last_use_s(self, at_s: float) -> float:
        """The end of the newest use that began before `at_s`, or 0, when it was started."""
        ends = [b + lasts for b, lasts, kind in self.happenings if kind == SESSIONS and b <= at_s]
        return min(at_s, max([0.0, *ends]))

    @property
    def end_s(self) -> float:
        return max([0.0, *(begin_s + lasts_s for begin_s, lasts_s, _ in self.happenings)])


def run(world: World, delay_s: float, until_s: float) -> tuple[float | None, list[float]]:
    """When it is suspended (None: not by then), and the times of all samples."""
    policy = IdlePolicy(Monotonic(0.0), delay_s)
    at_s, times = 0.0, []
    while at_s <= until_s:
        times.append(at_s)
        decision = policy.step(world.sample(at_s))
        if isinstance(decision, Suspend):
            return at_s, times
        assert 0 < decision.wait_s <= SAMPLE_WAIT_S_MAX
        at_s += decision.wait_s
    return None, times


@given(spans, delays)
@settings(max_examples=300)
def test_nobody_is_ever_suspended_who_was_used_within_the_delay(
    happenings: list[tuple[float, float, str]], delay_s: float
) -> None:
    """However short a session was, and wherever it fell between two samples."""
    world = World(happenings)
    suspended_s, _ = run(world, delay_s, world.end_s + 3 * delay_s + 60)
    if suspended_s is None:
        return
    sample = world.sample(suspended_s)
    assert not sample.uses
    assert not sample.holds
    assert sample.is_known
    assert suspended_s - world.last_use_s(suspended_s) >= delay_s * (1 - 1e-9)


@given(spans, delays)
@settings(max_examples=300)
def test_who_is_idle_is_suspended_within_the_delay_and_a_few_samples(
    happenings: list[tuple[float, float, str]], delay_s: float
) -> None:
    """Maintenance holds it, and does not begin the delay anew."""
    world = World(happenings)
    step_s = max(0.05, min(delay_s / 10, SAMPLE_WAIT_S_MAX))
    suspended_s, _ = run(world, delay_s, world.end_s + delay_s + 10 * step_s)
    assert suspended_s is not None
    obstacles = [b + lasts for b, lasts, kind in happenings if b <= suspended_s and kind != SESSIONS]
    free_s = max([world.last_use_s(suspended_s) + delay_s, *obstacles])
    assert suspended_s <= free_s + 4 * step_s


@given(spans)
def test_a_delay_of_zero_is_never(happenings: list[tuple[float, float, str]]) -> None:
    suspended_s, times = run(World(happenings), 0.0, 1000.0)
    assert suspended_s is None
    assert len(times) <= 1000 / SAMPLE_WAIT_S_MAX + 2, (
        "an endpoint that is never suspended is seldom looked at"
    )


@given(st.floats(1, 100), st.floats(1, 100), st.floats(0, 200))
def test_a_delay_that_is_changed_counts_from_the_last_use(
    before_s: float, after_s: float, at_s: float
) -> None:
    policy = IdlePolicy(Monotonic(0.0), before_s)
    policy.step(Sample(Monotonic(0.0), 0, {}, {}))
    policy.delay_s = after_s
    decision = policy.step(Sample(Monotonic(at_s), 0, {}, {}))
    assert isinstance(decision, Suspend) == (at_s >= after_s)


def test_a_login_between_the_two_looks_keeps_it_awake() -> None:
    """Who came while the door was held is gone again, or not yet in pg_stat_activity."""
    policy = IdlePolicy(Monotonic(0.0), 10.0)
    assert isinstance(policy.step(Sample(Monotonic(11.0), 4, {}, {})), Suspend)
    assert isinstance(policy.step(Sample(Monotonic(11.1), 5, {}, {})), Stay)
    assert isinstance(policy.step(Sample(Monotonic(12.0), 5, {}, {})), Stay)
    assert isinstance(policy.step(Sample(Monotonic(21.9), 5, {}, {})), Stay)
    assert isinstance(policy.step(Sample(Monotonic(22.1), 5, {}, {})), Suspend)
