"""An endpoint's life as a pure state machine: what to do when postgres, the quorum or the user acts.

::

    STARTING --started--> RUNNING --stop--> STOPPING --ended--> STOPPED
       ^  |                  |                                    ^
       |  +--failed----------+--ended (crash)--> WAITING ---stop--+
       +-------------------------delay over------+                |
    any --fenced, refused-----------------------------------------+
    any --revoked: as stop, and says why
    RUNNING --suspend: as stop, and is told apart from it

An *attempt* is one start of postgres on one data directory. It ends with exactly one of `Ended`,
`StartFailed` and `Fenced`, after its postgres is dead, and its directory is gone or closed for the next start
(H3).

There is no recovery path: a crashed compute starts afresh at the new end of WAL, with a delay that
doubles while it keeps failing. A fenced one never starts again, because a newer compute owns the
timeline (C1).
"""

from enum import Enum, auto
from typing import NamedTuple

RESTART_DELAY_S_MIN = 0.1
RESTART_DELAY_S_MAX = 10.0
STABLE_AFTER_S = 30.0
"""A compute that ran this long has not been failing: its next restart waits the least again."""

EXIT_CLEAN = 0
EXIT_REFUSED = 2
EXIT_FENCED = 3
EXIT_SUSPENDED = 4


class State(Enum):
    STARTING = auto()
    RUNNING = auto()
    WAITING = auto()
    STOPPING = auto()
    STOPPED = auto()


class Started(NamedTuple):
    at_s: float


class Ended(NamedTuple):
    at_s: float
    reason: str


class StartFailed(NamedTuple):
    reason: str
    may_retry: bool


class DelayOver(NamedTuple):
    pass


class StopRequested(NamedTuple):
    pass


class SuspendRequested(NamedTuple):
    """Nobody uses it. Whoever starts it again goes on where it was."""

    reason: str


class Revoked(NamedTuple):
    """The endpoint, or its branch, is no longer there."""

    reason: str


class Fenced(NamedTuple):
    reason: str


AttemptEnd = Ended | StartFailed | Fenced
Event = Started | AttemptEnd | DelayOver | StopRequested | SuspendRequested | Revoked


class Launch(NamedTuple):
    """Begin an attempt."""


class StopAttempt(NamedTuple):
    """Let the running attempt come to its end: a fast shutdown, or no start at all."""


class Wait(NamedTuple):
    delay_s: float
    reason: str


class Exit(NamedTuple):
    code: int
    reason: str


Effect = Launch | StopAttempt | Wait | Exit


class Endpoint:
    """The machine: feed events to `step`, carry out the effects in order."""

    def __init__(self) -> None:
        self.state = State.STARTING
        self._delay_s = RESTART_DELAY_S_MIN
        self._started_at_s = 0.0
        self._end = Exit(EXIT_CLEAN, "stopped")

    def begin(self) -> list[Effect]:
        return [Launch()]

    def step(self, event: Event) -> list[Effect]:
        if self.state is State.STOPPED:
            return []
        match event:
            case Fenced(reason):
                self.state = State.STOPPED
                return [Exit(EXIT_FENCED, reason)]
            case StopRequested():
                return self._stop(Exit(EXIT_CLEAN, "stopped"))
            case SuspendRequested(reason):
                return self._stop(Exit(EXIT_SUSPENDED, reason))
            case Revoked(reason):
                return self._stop(Exit(EXIT_REFUSED, reason))
            case Started(at_s):
                if self.state is State.STARTING:
                    self.state, self._started_at_s = State.RUNNING, at_s
                return []
            case StartFailed(reason, may_retry):
                return self._failed(reason) if may_retry else self._refused(reason)
            case Ended(at_s, reason):
                if at_s - self._started_at_s > STABLE_AFTER_S:
                    self._delay_s = RESTART_DELAY_S_MIN
                return self._failed(reason)
            case DelayOver():
                if self.state is not State.WAITING:
                    return []
                self.state = State.STARTING
                return [Launch()]

    def _stop(self, end: Exit) -> list[Effect]:
        """The first reason to stop is the one that is told."""
        if self.state is State.WAITING:
            self.state = State.STOPPED
            return [end]
        if self.state is State.STOPPING:
            return []
        self.state, self._end = State.STOPPING, end
        return [StopAttempt()]

    def _failed(self, reason: str) -> list[Effect]:
        if self.state is State.STOPPING:
            self.state = State.STOPPED
            return [self._end]
        self.state = State.WAITING
        delay_s, self._delay_s = self._delay_s, min(self._delay_s * 2, RESTART_DELAY_S_MAX)
        return [Wait(delay_s, reason)]

    def _refused(self, reason: str) -> list[Effect]:
        is_stopping = self.state is State.STOPPING
        self.state = State.STOPPED
        return [self._end if is_stopping else Exit(EXIT_REFUSED, reason)]
