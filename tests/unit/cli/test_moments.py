"""Moments as people write them: each form of the grammar, and what is none."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.cli.moments import MomentError, is_dashed, parse_moment

BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 3, 30, 10, 0, tzinfo=BERLIN)
"""The day after the clocks went forward."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", "2026-03-30T08:00:00"),
        ("-5m", "2026-03-30T07:55:00"),
        ("now-5m", "2026-03-30T07:55:00"),
        ("now - 5 min", "2026-03-30T07:55:00"),
        ("-1h30m", "2026-03-30T06:30:00"),
        ("1.5h ago", "2026-03-30T06:30:00"),
        ("90 minutes ago", "2026-03-30T06:30:00"),
        ("2 days 3 hours ago", "2026-03-28T05:00:00"),
        ("-1w", "2026-03-23T08:00:00"),
        ("-1d", "2026-03-29T08:00:00"),
        ("today", "2026-03-29T22:00:00"),
        ("Today 9:30", "2026-03-30T07:30:00"),
        ("9:30:15", "2026-03-30T07:30:15"),
        ("yesterday 14:00", "2026-03-29T12:00:00"),
        ("yesterday 1:00", "2026-03-29T00:00:00"),
        ("yesterday", "2026-03-28T23:00:00"),
        ("2026-01-31", "2026-01-30T23:00:00"),
        ("2026-01-31 12:00", "2026-01-31T11:00:00"),
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00"),
        ("2026-01-31T12:00:00.25+05:30", "2026-01-31T06:30:00.250000"),
    ],
)
def test_moments(text: str, expected: str) -> None:
    assert parse_moment(text, NOW).isoformat() == f"{expected}+00:00"


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "5m", "-5", "-5x", "-m", "5 fortnights ago", "-5m ago", "tomorrow", "yesterday -5m"),
        *("25:00", "14", "5/6", "2026-02-30", "-99999999999w", "0001-01-01T00:00:00+14:00", "0/16B3748"),
        *("ago", "now now"),
    ],
)
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(MomentError, match="is not a time like"):
        parse_moment(text, NOW)


def test_without_a_zone_a_moment_is_of_the_local_zone() -> None:
    local = datetime.now(UTC).astimezone()
    assert parse_moment("2026-01-31 12:00", local) == datetime(2026, 1, 31, 12).astimezone()


@given(st.integers(0, 10**6), st.sampled_from("smhdw"))
def test_a_dashed_moment_is_no_option(count: int, unit: str) -> None:
    assert is_dashed(f"-{count}{unit}")
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[unit]
    span = timedelta(seconds=count * seconds)
    if span < timedelta(days=700_000):
        assert parse_moment(f"-{count}{unit}", NOW) == NOW.astimezone(UTC) - span


@pytest.mark.parametrize("text", ["-n", "-5", "--5m", "-m5", "-5m5", "-h", "5m", "-"])
def test_options_are_no_moments(text: str) -> None:
    assert not is_dashed(text)
