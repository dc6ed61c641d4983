"""When an endpoint that nobody uses is to be suspended. Pure: samples and delays in, decisions out.

A *sample* says who is there at one moment. What counts:

===========================================  ============================================================
what a sample finds                          then
===========================================  ============================================================
the number of logins is another one          it was used, if only between two samples
`uses`: client sessions, replication          it is used: the delay begins anew when they are gone
clients, subscriptions
`holds`: maintenance, an extension's work    it is not suspended now, but the delay goes on: an idle
                                             PostgreSQL starts some of that by itself, again and again
`unknown`: PostgreSQL did not say            as `holds`: who cannot see must not judge
===========================================  ============================================================

A suspend wants the same answer twice: `Suspend` after a sample that is taken while clients go in, then, while
they are held, after another one that was asked of PostgreSQL itself. A login in between changes the count, so
that the second answer is another one.

Not here: how samples are taken (`activity_sampler`), how clients are held (`admission`).
"""

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

from excimer.base.clock import Monotonic

SAMPLES_PER_DELAY: Final = 10
SAMPLE_WAIT_S_MIN: Final = 0.05
SAMPLE_WAIT_S_MAX: Final = 5.0

STARTED: Final = "it was started"
LOGINS: Final = "clients that logged in"
UNKNOWN: Final = "PostgreSQL does not say who is there"


class Sample(NamedTuple):
    """Who was there, by kind: ``{"client sessions": 2}``."""

    at_s: Monotonic
    logins: int
    """Since PostgreSQL started."""
    uses: Mapping[str, int]
    holds: Mapping[str, int]
    is_known: bool = True
    """False: it could not be found out; the rest then says what is known all the same."""


class Stay(NamedTuple):
    wait_s: float
    """Until the next sample is worth its cost."""


class Suspend(NamedTuple):
    idle_s: float


Decision: TypeAlias = Stay | Suspend


class IdlePolicy:
    """Of one life of PostgreSQL. `awake_for` says what keeps, or kept, the endpoint awake."""

    def __init__(self, started_s: Monotonic, delay_s: float) -> None:
        """`delay_s` 0: never suspend. A start counts as use: who was woken sleeps again after the delay."""
        self.delay_s = delay_s
        self.last_active_s = started_s
        self.awake_for = STARTED
        self.present: Mapping[str, int] = {}
        """Of the newest sample: who keeps it awake."""
        self._logins: int | None = None
        self._is_used = False

    def step(self, sample: Sample) -> Decision:
        """Samples come in the order of their times."""
        has_logins = self._logins is not None and sample.logins != self._logins
        self._logins = sample.logins
        self.present = {**sample.uses, **sample.holds}
        was_used, self._is_used = self._is_used, bool(sample.uses) or has_logins
        if was_used or self._is_used:  # it ended at some moment since the sample before
            self.last_active_s = sample.at_s
        if self._is_used:
            self.awake_for = _said(sample.uses) if sample.uses else LOGINS
            return self._stay(self.delay_s)
        idle_s = sample.at_s - self.last_active_s
        if self.delay_s <= 0 or idle_s < self.delay_s:
            return self._stay(self.delay_s - idle_s)
        if sample.holds or not sample.is_known:
            self.awake_for = _said(sample.holds) if sample.holds else UNKNOWN
            return self._stay(self.delay_s)
        return Suspend(idle_s)

    def _stay(self, left_s: float) -> Stay:
        """Until the end of an idle time is seen a part of the delay may pass, and no more."""
        most_s = (
            min(self.delay_s / SAMPLES_PER_DELAY, SAMPLE_WAIT_S_MAX) if self.delay_s else SAMPLE_WAIT_S_MAX
        )
        return Stay(max(SAMPLE_WAIT_S_MIN, min(left_s, most_s) if self.delay_s else most_s))


def _said(found: Mapping[str, int]) -> str:
    """``2 client sessions, 1 replication clients``: for people, who forgive the plural."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
