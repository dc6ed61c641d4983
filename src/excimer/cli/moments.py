"""Moments as people write them on the command line.

::

    moment   = "now" | absolute | relative | day [clock] | clock
    absolute = 2026-01-31T12:00:00Z | 2026-01-31 12:00 | 2026-01-31     ISO 8601; without zone: local
    relative = -5m | -1h30m | now-5m | 5m ago | 90 minutes ago          s, m, h, d, w and their names
    day      = today | yesterday | 2026-01-31
    clock    = 14:00 | 14:00:30                                         of today, unless a day is named

A day without a clock is its first moment; a day of a relative moment has 24 hours.

Rejected: dateparser and its like understand far more, take longer to import than the whole command line, and
guess: in a tool that restores databases "5/6" must be an error.
"""

import re
from datetime import UTC, datetime, time, timedelta
from typing import Final

_UNITS: Final = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), timedelta(seconds=1)),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), timedelta(minutes=1)),
    **dict.fromkeys(("h", "hour", "hours"), timedelta(hours=1)),
    **dict.fromkeys(("d", "day", "days"), timedelta(days=1)),
    **dict.fromkeys(("w", "week", "weeks"), timedelta(weeks=1)),
}
_SPAN: Final = r"(?:\d+(?:\.\d+)?\s*[a-z]+\s*)+"
_BEFORE: Final = re.compile(rf"(?:now)?\s*-\s*({_SPAN})|({_SPAN})\s*\bago", re.IGNORECASE)
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.IGNORECASE)
_DAY: Final = re.compile(r"(?:(today|yesterday)\s*)?(\d\d?:\d\d(?::\d\d)?)?", re.IGNORECASE)
_DASHED: Final = re.compile(r"-(?:\d+(?:\.\d+)?[smhdw])+", re.IGNORECASE)

EXAMPLES: Final = "2026-01-31T12:00:00Z, -5m or yesterday 14:00"


class MomentError(ValueError):
    """A text that is no moment, or one outside the years 1 to 9999."""


def parse_moment(text: str, now: datetime) -> datetime:
    """The moment in UTC. `now` has a zone, which is the local one. Raises `MomentError`."""
    plain = " ".join(text.split())
    try:
        moment = _relative(plain, now) or _day(plain, now) or _absolute(plain, now)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise MomentError(f"{text!r} is not a time like {EXAMPLES}") from error


def is_dashed(argument: str) -> bool:
    """Whether an argument that looks like options is a moment: ``-1h30m``."""
    return _DASHED.fullmatch(argument) is not None


def _relative(text: str, now: datetime) -> datetime | None:
    if text.lower() == "now":
        return now
    found = _BEFORE.fullmatch(text)
    if found is None:
        return None
    parts = _PART.findall(found[1] or found[2])
    if any(unit.lower() not in _UNITS for _, unit in parts):
        raise ValueError(text)
    span = sum((float(count) * _UNITS[unit.lower()] for count, unit in parts), timedelta())
    return now.astimezone(UTC) - span


def _day(text: str, now: datetime) -> datetime | None:
    found = _DAY.fullmatch(text)
    if not text or found is None:
        return None
    day = now.date() - timedelta(days=1 if (found[1] or "").lower() == "yesterday" else 0)
    return _at(datetime.combine(day, _clock(found[2] or "0:00")), now)


def _absolute(text: str, now: datetime) -> datetime:
    return _at(datetime.fromisoformat(text), now)


def _clock(text: str) -> time:
    hour, minute, second = (int(part) for part in (text + ":0").split(":")[:3])
    return time(hour, minute, second)


def _at(moment: datetime, now: datetime) -> datetime:
    """With the local zone where none is given: that of `now`, or the system's with its summer times."""
    if moment.tzinfo is not None:
        return moment
    fixed = now.tzinfo
    return moment.replace(tzinfo=fixed) if getattr(fixed, "key", None) else moment.astimezone()
