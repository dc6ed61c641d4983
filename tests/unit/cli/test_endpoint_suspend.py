"""Delays as people write them, and last uses as they read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.cli.commands.endpoint_suspend import last_active_at, parse_delay, shown_delay, shown_use
from excimer.cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "delay_s"),
    [("0", 0), ("never", 0), ("300", 300), ("45s", 45), ("5m", 300), ("2h", 7200), ("1d", 86400)],
)
def test_delays_are_seconds_or_have_a_unit(text: str, delay_s: int) -> None:
    assert parse_delay(text) == delay_s


@pytest.mark.parametrize("text", ["", "-5", "5 m", "m", "1.5h", "5min", "Never", "1" * 10, "٣", "5m\n"])
def test_what_is_no_delay_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(UsageError, match="write 300"):
        parse_delay(text)


@given(st.integers(0, 604800))
def test_a_delay_is_shown_as_it_is_read(delay_s: int) -> None:
    assert parse_delay(shown_delay(delay_s)) == delay_s


@pytest.mark.parametrize(
    ("ago_s", "text"),
    [
        *((-3, "0 s ago"), (0, "0 s ago"), (119, "119 s ago"), (120, "2 min ago"), (7199, "119 min ago")),
        *((7200, "2 h ago"), (172799, "47 h ago"), (172800, "2 d ago")),
    ],
)
def test_uses_are_told_by_their_age(ago_s: int, text: str) -> None:
    assert shown_use("2001-09-09T01:46:40Z", 1e9 + ago_s) == text


def test_what_never_ran_has_no_last_use() -> None:
    assert shown_use(None, 1e9) == ""
    assert last_active_at({}) == last_active_at({"last_active_at": ""}) == {}
    assert last_active_at({"last_active_at": "1000000000"}) == {"last_active_at": "2001-09-09T01:46:40+00:00"}
