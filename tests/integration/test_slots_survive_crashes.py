"""Replication slots over crashes: of PostgreSQL, of its manager, with the directory gone.

The consumers are PostgreSQL's own: pg_recvlogical, and a subscriber by pgoutput, who knows by LSN what it has
had. After a crash a consumer may get again what it has confirmed since the slot was saved; it misses nothing.
EXCIMER_PUBLISHER_VERSIONS chooses the versions.
"""

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.pgformat.replication_slot import unpack_slot
from excimer.safekeeper.control_file import read_control_file
from tests.integration.test_logical_publisher import VERSIONS, WRITE_16_MIB, Load
from tests.integration.test_wal_removal import end_lsn, flushed_lsn, main_timeline
from tests.kit.stack import Stack, running_stack

SLOTS = "select slot_name from pg_replication_slots where slot_name <> 'excimer_proposer' order by 1"
CHANGE = re.compile(r"table public\.log: INSERT: a\[integer\]:(\d+)")


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param, safekeepers=1) as stack:
        stack.text("tenant", "create", "--set-default")
        stack.text("tenant", "config", "--set", "flush_size_bytes=4194304", "--set", "flush_interval_s=1")
        stack.text(
            "endpoint", "create", "main", "--set", "wal_level=logical", "--set", "max_prepared_transactions=5"
        )
        stack.text("endpoint", "start", "main")
        stack.query("create table log (a int)")
        yield stack


def crash(stack: Stack, what: str) -> None:
    """Returns when the endpoint serves again."""
    if what == "postgres":
        pid = stack.postmaster_pid()
        os.kill(pid, signal.SIGKILL)
        stack.wait_until(lambda: stack.accepts() and stack.postmaster_pid() != pid, "another PostgreSQL")
        return
    stack.kill("endpoint-main")
    if what == "elsewhere":
        stack.evict("main")
    stack.text("endpoint", "start", "main")


class Consumer:
    """Follows a slot into a file, again and again, as one that was told to go on for ever."""

    def __init__(self, stack: Stack, slot: str, output: Path) -> None:
        self._stack = stack
        where = "-d", "postgres", "--slot", slot, "--start", "-f", str(output)
        self._arguments = (*where, "--fsync-interval=1", "--status-interval=1")
        self._output = output
        output.touch()
        self._process = self._begin()

    def _begin(self) -> "subprocess.Popen[str]":
        return self._stack.program("pg_recvlogical", *self._arguments)

    def rows(self) -> list[int]:
        return [int(row) for row in CHANGE.findall(self._output.read_text())]

    def wait_more(self) -> None:
        """Some twenty rows."""
        before = len(self.rows())
        self._stack.wait_until(lambda: len(self.rows()) > before + 20, "rows", report=self._report)

    def _report(self) -> str:
        slots = self._stack.query("select * from pg_replication_slots")
        active = self._stack.query("select pid, backend_type, wait_event, state, query from pg_stat_activity")
        postgres_log = (self._stack.directory / "endpoints/main/postgres.log").read_text()[-2000:]
        return f"ended: {self._process.poll()}, slots {slots}, {active}, {postgres_log}"

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)


@pytest.mark.parametrize("what", ["postgres", "elsewhere"])
def test_a_consumer_misses_nothing_over_crashes_under_load(stack: Stack, tmp_path: Path, what: str) -> None:
    slot = f"followed_{what}"
    stack.query(f"select pg_create_logical_replication_slot('{slot}', 'test_decoding')")
    consumer = Consumer(stack, slot, tmp_path / "changes")
    first = {"postgres": 0, "elsewhere": 200_000}[what]
    try:
        with Load(stack, first) as load:
            for _ in range(2):
                consumer.wait_more()
                stack.query("checkpoint")
                crash(stack, what)
            consumer.wait_more()
        stack.wait_until(lambda: load.committed[-1] in consumer.rows(), "the last row")
    finally:
        consumer.stop()
    rows = consumer.rows()
    assert set(load.committed) - set(rows) == set(), "rows are missing"
    in_branch = {row for (row,) in stack.query(f"select a from log where a > {first}")}
    assert set(rows) - in_branch == set(), "rows that the branch does not have"
    # What comes again is a stretch that it has had before, in the same order.
    last, repeats = -1, 0
    for row in rows:
        repeats += row < last
        last = row
    assert repeats <= 2, f"out of order {repeats} times"
    stack.query(f"select pg_drop_replication_slot('{slot}')")


def changes(stack: Stack, slot: str, endpoint: str = "main") -> list[str]:
    taken = f"select data from pg_logical_slot_get_changes('{slot}', null, null)"
    return [row for (row,) in stack.query(taken, endpoint)]


def take(stack: Stack, slot: str, endpoint: str = "main") -> list[int]:
    return [int(match[1]) for line in changes(stack, slot, endpoint) if (match := CHANGE.match(line))]


def test_a_slot_finds_what_was_open_and_old_catalogs(stack: Stack) -> None:
    """A transaction that was open where decoding begins again, and one that changed a catalog before that was
    rewritten: without the snapshot the one is skipped, without the mappings the other cannot be decoded.
    """
    stack.query("truncate log")
    stack.query("select pg_create_logical_replication_slot('mine', 'test_decoding')")
    with stack.connect() as connection, stack.connect() as other:
        other.autocommit = False
        other.execute("select txid_current()")  # open, and nothing of it is decoded yet
        for row in (2, 3):
            connection.execute("checkpoint")
            connection.execute("insert into log values (%s)", (row,))
            assert take(stack, "mine") == [row]
        connection.execute("checkpoint")  # saves how far it was taken
        other.execute("insert into log values (1)")
        other.commit()
        with connection.transaction():
            connection.execute("create table old (a int)")
            connection.execute("insert into old values (7)")
            connection.execute("alter table old add column b text default 'b'")
            connection.execute("insert into old values (8)")
        connection.execute("drop table old")
        connection.execute("vacuum full pg_class")
        connection.execute("vacuum full pg_attribute")
        connection.execute("vacuum")
        connection.execute("insert into log values (4)")
    crash(stack, "elsewhere")
    assert [row for row in changes(stack, "mine") if "INSERT" in row] == [
        "table public.log: INSERT: a[integer]:1",
        "table public.old: INSERT: a[integer]:7",
        "table public.old: INSERT: a[integer]:8 b[text]:'b'",
        "table public.log: INSERT: a[integer]:4",
    ]
    stack.query("insert into log values (5)")
    assert take(stack, "mine") == [5]
    stack.text("endpoint", "stop", "main")  # and over a clean stop after that
    stack.evict("main")
    stack.text("endpoint", "start", "main")
    stack.query("insert into log values (6)")
    assert take(stack, "mine") == [6]
    stack.query("select pg_drop_replication_slot('mine')")


def test_kinds_of_slots_after_a_crash(stack: Stack) -> None:
    """What was made last is there, what was dropped is not, temporary ones are not, branches have none."""
    with stack.connect() as connection:
        connection.execute("select pg_create_physical_replication_slot('bytes', true)")
        connection.execute("select pg_create_logical_replication_slot('dropped', 'test_decoding')")
        connection.execute("select pg_create_logical_replication_slot('short', 'test_decoding', true)")
        connection.execute(
            "select pg_create_logical_replication_slot('prepared', 'test_decoding', false, true)"
        )
        connection.execute("select pg_drop_replication_slot('dropped')")
    for _ in range(2):
        crash(stack, "elsewhere")
        assert stack.query(SLOTS) == [("bytes",), ("prepared",)]
    with stack.connect() as connection:
        connection.execute("begin")
        connection.execute("insert into log values (90)")
        connection.execute("prepare transaction 'later'")
    crash(stack, "here")
    assert any(row.startswith("PREPARE TRANSACTION 'later'") for row in changes(stack, "prepared"))
    stack.query("commit prepared 'later'")
    assert any(row.startswith("COMMIT PREPARED 'later'") for row in changes(stack, "prepared"))
    stack.branch("child")
    assert stack.query(SLOTS, "child") == []
    stack.run("endpoint", "stop", "child", "--destroy")
    for slot in ("bytes", "prepared"):
        stack.query(f"select pg_drop_replication_slot('{slot}')")
    crash(stack, "elsewhere")
    assert stack.query(SLOTS) == []


def segments(stack: Stack) -> int:
    (directory,) = stack.directory.glob(f"safekeepers/*/*/{main_timeline(stack)}")
    return len(list(directory.glob("0*")))


def test_wal_is_held_from_the_beginning_of_a_slots_creation(stack: Stack) -> None:
    """It waits for a transaction while WAL becomes durable, and lasts from where it began."""
    state = stack.data_dir() / "pg_replslot/slow/state"

    def is_kept() -> bool:
        return state.exists() and unpack_slot(state.read_bytes(), stack.pg_version).needs_wal

    making = threading.Thread(
        target=stack.query, args=("select pg_create_logical_replication_slot('slow', 'test_decoding')",)
    )
    with stack.connect() as open_one:
        open_one.execute("begin")
        open_one.execute("insert into log values (450)")
        making.start()
        stack.wait_until(is_kept, "the beginning")
        restart_lsn = unpack_slot(state.read_bytes(), stack.pg_version).restart_lsn
        kept_lsn = end_lsn(stack)
        for _ in range(4):  # what is durable is told while the next part is written
            stack.query(WRITE_16_MIB)
            end = end_lsn(stack)
            stack.wait_until(lambda end=end: flushed_lsn(stack) >= end, "durable WAL")  # type: ignore[misc]
        stack.wait_until(lambda: told_lsn(stack) >= restart_lsn, "the safekeeper hears of it")
        assert told_lsn(stack) <= kept_lsn
        open_one.execute("commit")
    making.join()
    stack.query("insert into log values (451)")
    crash(stack, "elsewhere")
    assert take(stack, "slow") == [451]
    stack.query("select pg_drop_replication_slot('slow')")


def told_lsn(stack: Stack) -> int:
    """What the safekeeper was told to be durable and of no use to slots."""
    (path,) = stack.directory.glob(f"safekeepers/*/*/{main_timeline(stack)}")
    return read_control_file(path).durable_lsn


def test_wal_is_held_for_a_slot_and_let_go_with_it(stack: Stack) -> None:
    """Beyond what safekeepers hold otherwise, and what a clean stop saves; no more than the limit."""
    stack.wait_until(lambda: segments(stack) <= 2, "only the end of WAL is held")
    for slot in ("lazy", "forgotten"):
        stack.query(f"select pg_create_logical_replication_slot('{slot}', 'test_decoding')")
    stack.query("insert into log values (500)")
    for _ in range(5):
        stack.query(WRITE_16_MIB)
    stack.query("insert into log values (501)")
    stack.text("endpoint", "stop", "main")
    stack.evict("main")
    stack.text("endpoint", "start", "main")  # 64 MiB are what a saved state may hold
    assert segments(stack) >= 6
    crash(stack, "elsewhere")
    assert segments(stack) >= 6
    assert take(stack, "lazy") == [500, 501]
    stack.query("select pg_drop_replication_slot('lazy')")
    with limited(stack, slot_wal_max_mib=32):
        stack.wait_until(lambda: stack.query(SLOTS) == [], "the forgotten slot is given up")
    stack.wait_until(lambda: segments(stack) <= 2, "its WAL is let go")


@contextlib.contextmanager
def limited(stack: Stack, **settings: int) -> Iterator[None]:
    config = stack.directory / "config.toml"
    before = config.read_text()
    config.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()) + before)
    try:
        stack.text("endpoint", "restart", "main")
        yield
    finally:
        config.write_text(before)


def test_a_promoted_replica_has_the_slots(stack: Stack) -> None:
    """The last test that needs `main` as the primary. Nobody was connected to the slot for its whole life."""
    stack.query("select pg_create_logical_replication_slot('idle', 'test_decoding')")
    stack.query("insert into log values (600)")
    stack.text("endpoint", "create", "heir", "--replica", "--branch-name", "main")
    stack.text("endpoint", "start", "heir")
    stack.text("endpoint", "promote", "heir")
    stack.forget("heir")
    stack.query("insert into log values (601)", "heir")
    assert take(stack, "idle", "heir") == [600, 601]
