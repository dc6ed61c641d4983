"""A pageserver behind what is committed: by how much at most, who waits for it, what works all the same."""

import contextlib
import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator

import psycopg
import pytest

from excimer.base.lsn import WAL_PAGE_HEADER_SHORT_BYTES, WAL_PAGE_SIZE_BYTES, format_lsn, parse_lsn
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

LOAD = "insert into loaded select {batch}, repeat(md5(g::text), 20) from generate_series(1, 5000) g"

LAG_MAX_BYTES = 64 << 20
SMALL_LAG_MIB = 16
START_LIMIT_S = 30
"""Ingest of so much, with a core of its own, takes a second."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION) as stack:
        stack.create_main()
        stack.query("create table loaded (batch int, filler text)")
        stack.query("create table marks (number int)")
        yield stack


def complaints(stack: Stack) -> list[str]:
    """Lines of all logs that are more than information."""
    return [
        f"{path.name}: {line}"
        for path in sorted((stack.directory / "logs").glob("*.log"))
        for line in path.read_text().splitlines()
        if not line.startswith("{") or json.loads(line)["level"] not in ("info", "debug")
    ]


def test_a_clean_stop_and_a_start_complain_of_nothing(stack: Stack) -> None:
    """First, while nothing has happened that one could complain of."""
    stack.text("stop")
    stack.text("start")
    stack.text("endpoint", "start", "main")
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "start", "main")
    assert complaints(stack) == []


def ingest_lag(stack: Stack) -> float:
    """In bytes, as the endpoint's manager knows it."""
    url = f"http://127.0.0.1:{stack.endpoint('main')['http_port']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found = re.search(r"^excimer_compute_ingest_lag_bytes (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


class Loader:
    """Commits bulk loads one after the other until it is left."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._load)
        self.count = 0
        """Of loads."""
        self.failure: psycopg.Error | None = None

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _load(self) -> None:
        try:
            with self._stack.connect() as connection:
                while not self._stopped.is_set():
                    connection.execute(LOAD.format(batch=self.count).encode())
                    self.count += 1
        except psycopg.Error as error:
            self.failure = error


def branch_at(stack: Stack, name: str, lsn: str) -> int:
    made = stack.json("timeline", "branch", "--branch-name", name, "--at", lsn)
    return parse_lsn(made["ancestor_lsn"])


def test_every_lsn_that_postgres_names_can_be_branched_from_under_load(stack: Stack) -> None:
    with Loader(stack) as loader:
        for number in range(4):
            stack.query(f"insert into marks values ({number})")
            lsn = str(stack.query("select pg_current_wal_lsn()")[0][0])
            assert branch_at(stack, f"load{number}", lsn) <= parse_lsn(lsn)
        flushed = parse_lsn(str(stack.query("select pg_current_wal_flush_lsn()")[0][0]))
        border = flushed - flushed % WAL_PAGE_SIZE_BYTES
        for offset in (0, 8, WAL_PAGE_HEADER_SHORT_BYTES):
            assert branch_at(stack, f"border{offset}", format_lsn(border + offset)) == border
        assert branch_at(stack, "within", format_lsn(border - 1000 & ~7)) == border - 1000 & ~7
        stack.query("select pg_switch_wal()")
        inserted = str(stack.query("select pg_current_wal_insert_lsn()")[0][0])
        branch_at(stack, "switched", inserted)
    assert loader.failure is None
    stack.text("endpoint", "create", "load3", "--branch-name", "load3")
    stack.text("endpoint", "start", "load3")
    assert stack.query("select array_agg(number order by number) from marks", "load3") == [([0, 1, 2, 3],)]
    stack.text("endpoint", "stop", "load3")


def test_an_lsn_within_a_record_that_nobody_finishes_is_the_end_of_the_last_whole_one(stack: Stack) -> None:
    """WAL of a transaction that stands still is written up to a page's border, within a record."""
    with stack.connect() as standing, standing.transaction():
        standing.execute(LOAD.format(batch=-1).encode())
        for number in range(2):
            lsn = str(stack.query("select pg_current_wal_lsn()")[0][0])
            assert branch_at(stack, f"standing{number}", lsn) <= parse_lsn(lsn)


def test_three_loaders_do_not_run_away_from_the_pageserver(stack: Stack) -> None:
    lags, slowest_s = [], 0.0
    with contextlib.ExitStack() as loading, stack.connect() as small:
        loaders = [loading.enter_context(Loader(stack)) for _ in range(3)]
        until = time.monotonic() + 10
        while time.monotonic() < until:
            started = time.monotonic()
            small.execute("insert into marks values (-1)")
            slowest_s = max(slowest_s, time.monotonic() - started)
            lags.append(ingest_lag(stack))
    assert [loader.failure for loader in loaders] == [None] * 3
    assert 0 < max(lags) <= LAG_MAX_BYTES
    assert slowest_s < 10


class Marker:
    """Commits one row after the other until its connection is lost or it is left."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._mark)
        self.count = 0
        """Acknowledged."""

    def __enter__(self) -> "Marker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _mark(self) -> None:
        with contextlib.suppress(psycopg.OperationalError), self._stack.connect() as connection:
            while not self._stopped.is_set():
                connection.execute(f"insert into kept values ({self.count})".encode())
                self.count += 1


def test_a_pageserver_that_stands_still_holds_writers_only_and_a_start_waits_for_the_lag(
    stack: Stack,
) -> None:
    stack.query("create table kept (number int)")
    stack.text("endpoint", "stop", "main")
    config = stack.directory / "config.toml"
    config.write_text(f"pageserver_lag_max_mib = {SMALL_LAG_MIB}\n" + config.read_text())
    stack.text("endpoint", "start", "main")
    pageserver = stack.pid("pageserver")
    with stack.connect() as reader, contextlib.ExitStack() as writing:
        reader.execute("select count(*) from kept")
        marker = writing.enter_context(Marker(stack))
        loaders = [writing.enter_context(Loader(stack)) for _ in range(2)]
        # Until they have connected, and fetched what they need.
        stack.wait_until(lambda: min(marker.count, *(each.count for each in loaders)) >= 3, "they all write")
        os.kill(pageserver, signal.SIGSTOP)
        try:
            wanted = (SMALL_LAG_MIB << 20) * 5 / 8
            stack.wait_until(lambda: ingest_lag(stack) >= wanted, "the lag is what it may be", 60)
            time.sleep(2)
            assert ingest_lag(stack) <= SMALL_LAG_MIB << 20
            started = time.monotonic()
            assert reader.execute("select count(*) from kept").fetchone() is not None
            assert time.monotonic() - started < 2
            stack.kill("endpoint-main")
        finally:
            os.kill(pageserver, signal.SIGCONT)
    started = time.monotonic()
    stack.text("endpoint", "start", "main")
    assert time.monotonic() - started < START_LIMIT_S
    (kept,) = stack.query("select count(*) from kept")[0]
    assert marker.count <= kept <= marker.count + 1
