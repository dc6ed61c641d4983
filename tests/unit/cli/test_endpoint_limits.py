"""How limits of CPU and memory are written and shown."""

from typing import Any

import pytest

from excimer.cli.commands.endpoint_limits import parse_limits, shown_limits, shown_size
from excimer.cli.errors import UsageError

NONE = dict.fromkeys(("cpu_min_milli", "cpu_max_milli", "memory_min_mib", "memory_max_mib"), 0)


@pytest.mark.parametrize(
    ("cpu", "memory", "limits", "shown"),
    [
        ("0.25..2", None, (250, 2000, 0, 0), "cpu 0.25..2"),
        ("1", "1GB", (1000, 1000, 1024, 1024), "cpu 1, memory 1GB"),
        (None, "512mb .. 4 GB", (0, 0, 512, 4096), "memory 512MB..4GB"),
        ("1.5..8", "unlimited", (1500, 8000, 0, 0), "cpu 1.5..8"),
    ],
)
def test_limits_are_read_and_shown(
    cpu: str | None, memory: str | None, limits: tuple[int, ...], shown: str
) -> None:
    found = NONE | parse_limits(cpu, memory)
    assert tuple(found.values()) == limits
    assert shown_limits(found) == shown


@pytest.mark.parametrize("text", ["", "1..", "..1", "0", "0..1", "1,5", "1.0001", "a..b", "1...2", "-1"])
def test_what_is_no_range_of_cores_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a range: write cores: 0\.25"):
        parse_limits(text, None)


@pytest.mark.parametrize("text", ["", "1", "1KB", "1.5GB", "1GB..", "0MB..1GB"])
def test_what_is_no_range_of_memory_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a range: write 512MB"):
        parse_limits(None, text)


def test_the_size_now_is_shown_and_what_is_not_enforced() -> None:
    row: dict[str, Any] = {"limits": NONE | parse_limits("0.25..2", "512MB..4GB"), "pid": 7}
    assert shown_size(row | {"cpu_milli": 500, "memory_mib": 1024}) == "0.5 CPU, 1GB"
    assert shown_size(row | {"cpu_milli": 500, "memory_mib": 0}) == "0.5 CPU, 4GB (not enforced)"
    assert shown_size(row | {"pid": None}) == "≤ 2 CPU, ≤ 4GB"
    assert shown_size({"limits": NONE, "pid": 7, "cpu_milli": 0, "memory_mib": 0}) == ""
