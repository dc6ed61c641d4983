"""Time as an object. Pure code takes instants as arguments; shells read them from a `Clock`."""

from typing import NewType, Protocol

Monotonic = NewType("Monotonic", float)
"""Seconds since an arbitrary start, never going back."""

UnixTime = NewType("UnixTime", float)
"""Seconds since 1970-01-01 UTC."""

POSTGRES_EPOCH_UNIX_S = 946_684_800
"""2000-01-01 UTC, the zero of PostgreSQL's TimestampTz, which counts microseconds."""


class Clock(Protocol):
    """Reads the time. `excimer.service.tasks.SystemClock` is the real one."""

    def monotonic(self) -> Monotonic: ...
    def now(self) -> UnixTime: ...


def unix_to_timestamptz(now: float) -> int:
    """PostgreSQL's TimestampTz: microseconds since 2000-01-01."""
    return round((now - POSTGRES_EPOCH_UNIX_S) * 1_000_000)


def timestamptz_to_unix(timestamptz: int) -> UnixTime:
    return UnixTime(timestamptz / 1_000_000 + POSTGRES_EPOCH_UNIX_S)
