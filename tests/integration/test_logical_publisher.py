"""An endpoint as a publisher: consumers of its changes miss none, and get none that the branch does not have.

EXCIMER_PUBLISHER_VERSIONS chooses the versions.
"""

import contextlib
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.io.processes import make_owned_dir
from excimer.postgres import run_initdb
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import StockServer, stock_server

VERSIONS = tuple(map(int, os.environ.get("EXCIMER_PUBLISHER_VERSIONS", str(NEWEST_VERSION)).split(",")))
TAKE = "select data from pg_logical_slot_get_changes('mine', null, null)"
PEEK = "select data from pg_logical_slot_peek_changes('mine', null, null)"


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param, safekeepers=1) as stack:
        stack.text("tenant", "create", "--set-default")
        stack.text("endpoint", "create", "main", "--set", "wal_level=logical")
        stack.text("endpoint", "start", "main")
        stack.query("create table log (a int)")
        stack.query("select pg_create_logical_replication_slot('mine', 'test_decoding')")
        yield stack


@pytest.fixture(scope="module")
def subscriber(stack: Stack) -> Iterator[StockServer]:
    """A stock server that subscribes to the endpoint's table, by pgoutput."""
    root = Path(tempfile.mkdtemp(prefix="excimer-subscriber-"))
    root.chmod(0o755)
    build = build_of(stack.pg_version)
    run_initdb(build, make_owned_dir(root / "cluster") / "data")
    settings = {"wal_retrieve_retry_interval": "100ms", "fsync": "off"}
    try:
        with stock_server(build, root / "cluster" / "data", settings) as server:
            where = stack.connection_environment()
            conninfo = " ".join(
                f"{name}={where[variable]}"
                for name, variable in (
                    ("host", "PGHOST"),
                    ("port", "PGPORT"),
                    ("user", "PGUSER"),
                    ("password", "PGPASSWORD"),
                    ("dbname", "PGDATABASE"),
                )
                if where[variable]
            )
            stack.query("create publication p for table log")
            server.sql("create table log (a int)")
            server.sql(f"create subscription s connection '{conninfo}' publication p")
            yield server
            server.sql("alter subscription s disable; alter subscription s set (slot_name = none)")
            server.sql("drop subscription s")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def published(stack: Stack) -> list[list[str]]:
    return [[str(row)] for (row,) in stack.query("select a from log order by a")]


def applied(subscriber: StockServer) -> list[list[str]]:
    return subscriber.sql("select a from log order by a")


def rows_in(changes: list[tuple[object, ...]]) -> list[int]:
    """The rows that were inserted, in the order of their commits."""
    texts = [str(row[0]) for row in changes]
    return [int(text.rpartition(":")[2]) for text in texts if text.startswith("table public.log: INSERT")]


def test_what_no_quorum_has_is_not_decoded(stack: Stack) -> None:
    """It could be lost, and the consumer would have it, or be ahead of what comes in its place."""
    stack.query("insert into log values (1)")
    assert rows_in(stack.query(TAKE)) == [1]
    safekeeper = stack.pid("safekeeper-1")
    written = "select pg_current_wal_flush_lsn()"

    def insert() -> None:
        with contextlib.suppress(psycopg.Error):
            stack.query("insert into log values (2)")

    with stack.connect() as consumer:
        before = consumer.execute(written).fetchone()
        os.kill(safekeeper, signal.SIGSTOP)
        writing = threading.Thread(target=insert)
        try:
            writing.start()
            stack.wait_until(lambda: consumer.execute(written).fetchone() != before, "WAL on the local disk")
            consumer.execute("set statement_timeout = '1s'")
            with pytest.raises(psycopg.Error):
                consumer.execute(PEEK).fetchall()
        finally:
            os.kill(safekeeper, signal.SIGCONT)
        writing.join()
        consumer.execute("reset statement_timeout")
        assert rows_in(consumer.execute(TAKE).fetchall()) == [2]


WRITE_16_MIB = (
    "select pg_logical_emit_message(false, 'bulk', repeat('x', 1 << 20)) from generate_series(1, 16)"
)


class Load:
    """Commits rows one by one, and knows which were acknowledged; who is cut off goes on."""

    def __init__(self, stack: Stack, first_row: int) -> None:
        self._stack = stack
        self.committed: list[int] = []
        self._row = first_row
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_done.is_set():
            with contextlib.suppress(psycopg.Error), self._stack.connect() as connection:
                while not self._is_done.is_set():
                    self._row += 1
                    connection.execute("insert into log values (%s)", (self._row,))
                    self.committed.append(self._row)


@pytest.mark.parametrize("end", ["stop", "stop and eviction", "crash and eviction"])
def test_a_subscriber_gets_each_row_once_over_starts(stack: Stack, subscriber: StockServer, end: str) -> None:
    """On the directory of before, or in a new one; under load, and while it is behind by a WAL segment."""

    def restart() -> None:
        if "crash" in end:
            stack.kill("endpoint-main")
        else:
            stack.text("endpoint", "stop", "main")
        if "eviction" in end:
            stack.evict("main")
        stack.text("endpoint", "start", "main")

    with Load(stack, {"stop": 10_000, "stop and eviction": 20_000, "crash and eviction": 40_000}[end]):
        before = len(applied(subscriber))
        stack.wait_until(lambda: len(applied(subscriber)) > before, "rows")
        restart()
        before = len(applied(subscriber))
        stack.wait_until(lambda: len(applied(subscriber)) > before, "more rows")
    subscriber.sql("alter subscription s disable")
    active = "select active from pg_replication_slots where slot_name = 's'"
    stack.wait_until(lambda: stack.query(active) == [(False,)], "the subscriber's going")
    stack.query("insert into log values (1000)")
    stack.query(WRITE_16_MIB)
    stack.query("insert into log values (1001)")
    restart()
    subscriber.sql("alter subscription s enable")
    stack.wait_until(lambda: len(applied(subscriber)) >= len(published(stack)), "all rows")
    assert applied(subscriber) == published(stack)


def test_a_subscriber_has_no_row_that_the_branch_lost(stack: Stack, subscriber: StockServer) -> None:
    """The endpoint dies before a majority has a commit that is on its own disk."""
    assert applied(subscriber) == published(stack)
    safekeeper = stack.pid("safekeeper-1")

    def insert() -> None:
        with contextlib.suppress(psycopg.Error):
            stack.query("insert into log values (30000)")

    with stack.connect() as watching:
        before = watching.execute("select pg_current_wal_flush_lsn()").fetchone()
        os.kill(safekeeper, signal.SIGSTOP)
        writing = threading.Thread(target=insert)
        try:
            writing.start()
            stack.wait_until(
                lambda: watching.execute("select pg_current_wal_flush_lsn()").fetchone() != before,
                "WAL on the local disk",
            )
            for _ in range(3):
                subscriber.sql("select pg_sleep(0.3)")
                assert ["30000"] not in applied(subscriber)
            stack.kill("endpoint-main")
        finally:
            os.kill(safekeeper, signal.SIGCONT)
        writing.join()
    stack.text("endpoint", "start", "main")
    assert [row for row in applied(subscriber) if row not in published(stack)] == []


SLOTS = "select slot_name from pg_replication_slots where slot_name in ('followed', 'forgotten')"


def test_a_forgotten_slot_does_not_hold_wal_for_ever(stack: Stack) -> None:
    """One with a consumer may hold more. What is said is in status."""
    config = stack.directory / "config.toml"
    before = config.read_text()
    config.write_text(f"slot_wal_max_mib = 24\n{before}")
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "start", "main")
    config.write_text(before)
    for name in ("followed", "forgotten"):
        stack.query(f"select pg_create_logical_replication_slot('{name}', 'test_decoding')")
    consumer = stack.program(
        "pg_recvlogical", "-d", "postgres", "--slot", "followed", "--start", "-f", "-", "--no-loop"
    )
    try:
        reading = "select active from pg_replication_slots where slot_name = 'followed'"
        stack.wait_until(lambda: stack.query(reading) == [(True,)], "the consumer")
        os.kill(consumer.pid, signal.SIGSTOP)  # it is there, and confirms nothing
        stack.query(WRITE_16_MIB)
        stack.wait_until(lambda: "slot_wal_max_mib" in stack.run("status").stdout, "the warning")
        assert {name for (name,) in stack.query(SLOTS)} == {"followed", "forgotten"}
        stack.query(WRITE_16_MIB)
        told = re.compile(r"gone: .*forgotten \(\d\d MiB\).* needs a new slot")
        stack.wait_until(lambda: told.search(stack.run("status").stdout) is not None, "what is told of it")
        assert stack.query(SLOTS) == [("followed",)]
    finally:
        os.kill(consumer.pid, signal.SIGCONT)
        consumer.terminate()
        consumer.communicate(timeout=60)
