"""Safekeepers hold what is not in object storage yet, and little more: loaded, idle, with one away."""

import time
from collections.abc import Iterator

import pytest

from excimer.base.lsn import format_lsn, parse_lsn
from excimer.safekeeper.control_file import read_control_file
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

pytestmark = pytest.mark.timeout(300)
SEGMENT_SIZE_BYTES = 16 << 20
LIMIT_MIB = 16
MEMORY_S = 4.0
"""How long a flush may lie back until safekeepers have heard of it and have removed what it covers."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION) as made:
        made.create_main()
        made.text("tenant", "config", "--set", "flush_size_bytes=8388608", "--set", "flush_interval_s=2")
        made.query("create table t(a int, b text)")
        yield made


def wal_sizes(stack: Stack, timeline_id: str) -> list[int]:
    """What each safekeeper's segments of the timeline take."""
    return [
        SEGMENT_SIZE_BYTES * len(list(directory.glob("0*")))
        for directory in stack.directory.glob(f"safekeepers/*/*/{timeline_id}")
    ]


def wal_bounds(stack: Stack, timeline_id: str) -> str:
    """What each safekeeper knows, for the message of a test that fails."""
    records = [read_control_file(path) for path in stack.directory.glob(f"safekeepers/*/*/{timeline_id}")]
    return "; ".join(
        f"safekeeper {record.node_id}: WAL from {format_lsn(record.wal_start_lsn)}, durable "
        f"{format_lsn(record.durable_lsn)}, horizon {format_lsn(record.horizon_lsn)}, commit "
        f"{format_lsn(record.commit_lsn)}"
        for record in records
    )


def wait_trimmed(stack: Stack, timeline_id: str, what: str) -> None:
    """Two segments are left on each safekeeper."""
    try:
        stack.wait_until(lambda: max(wal_sizes(stack, timeline_id)) <= 2 * SEGMENT_SIZE_BYTES, what)
    except AssertionError as error:
        raise AssertionError(f"{wal_bounds(stack, timeline_id)}\n{error}") from error


def main_timeline(stack: Stack) -> str:
    rows = stack.json("timeline", "list")["branches"]
    return str(next(row for row in rows if row["name"] == "main")["timeline_id"])


def end_lsn(stack: Stack) -> int:
    (row,) = stack.query("select pg_current_wal_lsn()")
    return int(parse_lsn(row[0]))


def flushed_lsn(stack: Stack) -> int:
    return int(parse_lsn(stack.json("layers", "main")["disk_consistent_lsn"]))


def write(stack: Stack, rows: int = 14_000) -> None:
    """About 16 MiB of WAL."""
    stack.query(f"insert into t select g, repeat(md5(g::text), 30) from generate_series(1, {rows}) g")


def test_a_long_load_holds_twice_what_is_not_flushed_and_an_idle_branch_two_segments(stack: Stack) -> None:
    timeline_id = main_timeline(stack)
    flushed = [(time.monotonic(), flushed_lsn(stack))]
    for _ in range(8):
        write(stack)
        sizes, end = wal_sizes(stack, timeline_id), end_lsn(stack)
        heard_lsn = max(
            (lsn for at, lsn in flushed if at < time.monotonic() - MEMORY_S), default=flushed[0][1]
        )
        assert len(sizes) == 3
        assert max(sizes) <= 2 * (end - heard_lsn) + 2 * SEGMENT_SIZE_BYTES, (sizes, end - heard_lsn)
        flushed.append((time.monotonic(), flushed_lsn(stack)))
    assert flushed[-1][1] - flushed[0][1] > 3 * SEGMENT_SIZE_BYTES, "it was flushed meanwhile"
    wait_trimmed(stack, timeline_id, "an idle branch is trimmed")


def test_everything_goes_on_from_what_is_left(stack: Stack) -> None:
    timeline_id = main_timeline(stack)
    write(stack)
    (before,) = stack.query("select count(*), sum(hashtext(b)) from t")
    wait_trimmed(stack, timeline_id, "it is trimmed")
    stack.branch("twig")
    assert stack.query("select count(*), sum(hashtext(b)) from t", "twig") == [before]
    stack.text("endpoint", "stop", "twig", "--destroy")
    stack.kill("pageserver")
    stack.text("start")
    for part in ("safekeeper-1", "safekeeper-2", "safekeeper-3"):
        stack.kill(part)
    stack.text("start")
    stack.stop_and_forget()
    stack.text("endpoint", "start", "main")
    assert stack.query("select count(*), sum(hashtext(b)) from t") == [before]
    write(stack)
    wait_trimmed(stack, timeline_id, "it is trimmed")


def test_wal_that_a_safekeeper_lacks_is_kept_until_it_is_back(stack: Stack) -> None:
    timeline_id = main_timeline(stack)
    stack.kill("safekeeper-3")
    for _ in range(4):
        write(stack)
    time.sleep(MEMORY_S)
    assert sorted(wal_sizes(stack, timeline_id))[1] >= 4 * SEGMENT_SIZE_BYTES
    stack.text("start")
    wait_trimmed(stack, timeline_id, "it is trimmed")


def test_an_idle_branch_without_a_compute_and_an_archived_one_are_trimmed(stack: Stack) -> None:
    timeline_ids = {name: str(stack.branch(name)["timeline_id"]) for name in ("idle", "archived")}
    for name in timeline_ids:
        for _ in range(3):
            stack.query(
                "insert into t select g, repeat(md5(g::text), 30) from generate_series(1, 14000) g", name
            )
    for name in timeline_ids:
        stack.text("endpoint", "stop", name, "--destroy")
    stack.text("timeline", "archive", "archived")
    for name, timeline_id in timeline_ids.items():
        wait_trimmed(stack, timeline_id, f"the {name} branch is trimmed")


def test_a_safekeeper_that_stays_away_holds_a_bounded_part_and_is_brought_back(stack: Stack) -> None:
    """It skips what is gone, which is in object storage, and is as good a member as before."""
    timeline_id = main_timeline(stack)
    stack.text("stop")
    config = stack.directory / "config.toml"
    config.write_text(f"lagging_safekeeper_wal_max_mib = {LIMIT_MIB}\n" + config.read_text())
    stack.text("start")
    stack.text("endpoint", "start", "main")
    stack.kill("safekeeper-3")
    for _ in range(6):
        write(stack)
    bound_bytes = (LIMIT_MIB << 20) + 2 * SEGMENT_SIZE_BYTES
    try:
        stack.wait_until(lambda: sorted(wal_sizes(stack, timeline_id))[-1] <= bound_bytes, "it is bounded")
    except AssertionError as error:
        raise AssertionError(f"{wal_bounds(stack, timeline_id)}\n{error}") from error
    assert "another safekeeper lacks" in stack.run("doctor").stdout
    (before,) = stack.query("select count(*), sum(hashtext(b)) from t")
    stack.text("start")
    wait_trimmed(stack, timeline_id, "it is trimmed")
    stack.kill("safekeeper-1")
    write(stack)  # which needs the one that has skipped
    stack.text("start")
    stack.text("endpoint", "restart", "main")
    (after,) = stack.query("select count(*), sum(hashtext(b)) from t")
    assert after[0] == before[0] + 14_000
