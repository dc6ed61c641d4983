"""TPC-B's invariant across stops, kills of every part under load, and branches into the past."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import psycopg
import pytest

from tests.kit import tpcb
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

SCALE = 10
FIRST_COMMITS = 200
"""Of a load, before something is done to it."""
COMMITS = 3200
COMMITS_BETWEEN = 1000
TABLES = "pgbench_accounts, pgbench_tellers, pgbench_branches, pgbench_history"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION) as stack:
        stack.create_main()
        tpcb.load(stack, SCALE)
        yield stack


def commits(stack: Stack) -> int:
    [[count]] = stack.query("select count(*) from pgbench_history")
    return int(count)


def wait_for_commits(stack: Stack, goal: int) -> None:
    stack.wait_until(lambda: commits(stack) >= goal, f"commit {goal}")


@contextlib.contextmanager
def load(stack: Stack, count: int = COMMITS) -> Iterator["subprocess.Popen[str]"]:
    """pgbench in the middle of its work; clients that lose their connection give up."""
    before = commits(stack)
    each = str(count // tpcb.CLIENTS)
    process = stack.program("pgbench", "-n", "-c", str(tpcb.CLIENTS), "-j", "2", "-t", each)
    try:
        wait_for_commits(stack, before + FIRST_COMMITS)
        yield process
    finally:
        process.kill()
        process.communicate()


def check_end(pgbench: "subprocess.Popen[str]") -> None:
    """It did all its work and noticed nothing."""
    assert pgbench.poll() is None, "it was over before anything could be noticed"
    output, _ = pgbench.communicate(timeout=120)
    assert pgbench.returncode == 0, output


def test_recorded_moments_can_be_branched(stack: Stack) -> None:
    """Sums and LSN are taken in one snapshot in mid-run; a branch there shows exactly those sums."""
    recorded: list[tuple[str, tpcb.Sums]] = []
    before = commits(stack)
    with load(stack, 4 * COMMITS_BETWEEN) as pgbench, stack.connect() as connection:
        for number in range(1, 4):
            wait_for_commits(stack, before + number * COMMITS_BETWEEN)
            with connection.transaction():
                connection.execute(f"lock {TABLES} in share mode".encode())
                [row] = connection.execute(tpcb.SUMS).fetchall()
                [[lsn]] = connection.execute("select pg_current_wal_insert_lsn()::text").fetchall()
            recorded.append((lsn, tpcb.Sums._make(int(value) for value in row)))
        check_end(pgbench)
    tpcb.check(stack)
    assert len({sums.transactions for _, sums in recorded}) == 3
    for number, (lsn, sums) in enumerate(recorded):
        name = f"past-{number}"
        stack.branch(name, at=lsn)
        assert sums.is_balanced
        assert tpcb.check(stack, name) == sums
        stack.text("endpoint", "stop", name, "--destroy")


def test_a_directory_may_go_while_its_endpoint_is_stopped(stack: Stack) -> None:
    before = tpcb.read_sums(stack)
    marker = stack.data_dir() / "marker-of-the-old-directory"
    marker.touch()
    directory = stack.data_dir()
    stack.stop_and_forget()
    assert not directory.exists()
    stack.text("endpoint", "start", "main")
    assert not (stack.data_dir() / marker.name).exists()
    assert tpcb.check(stack) == before


def test_kill_of_postgres(stack: Stack) -> None:
    with load(stack) as pgbench:
        os.kill(stack.postmaster_pid(), signal.SIGKILL)
        pgbench.communicate(timeout=60)
    stack.wait_until(lambda: stack.accepts(), "a fresh start after postgres was killed")
    tpcb.check(stack)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_kill_of_each_safekeeper_under_load(stack: Stack, number: int) -> None:
    """One dead of three changes nothing for the user."""
    before = tpcb.read_sums(stack)
    with load(stack) as pgbench:
        stack.kill(f"safekeeper-{number}")
        check_end(pgbench)
    assert tpcb.check(stack, amcheck=False).transactions > before.transactions
    stack.text("start")
    tpcb.check(stack)


def test_kill_of_the_pageserver_under_load(stack: Stack) -> None:
    with load(stack, 3 * COMMITS) as pgbench:
        stack.kill("pageserver")
        stack.text("start")
        check_end(pgbench)
    tpcb.check(stack)


def test_two_dead_safekeepers_block_commits_and_lose_nothing(stack: Stack) -> None:
    stack.query("create table if not exists blocked(a int)")
    committed = threading.Event()

    def commit() -> None:
        stack.query("insert into blocked values(1)")
        committed.set()

    stack.kill("safekeeper-1")
    stack.kill("safekeeper-3")
    writer = threading.Thread(target=commit, daemon=True)
    writer.start()
    assert not committed.wait(3), "a commit was acknowledged by one safekeeper of three (D1)"
    stack.text("start")
    assert committed.wait(30), "the commit goes on when a majority is back"
    assert stack.query("select count(*) from blocked") == [(1,)]


def test_kill_of_everything_at_once(stack: Stack) -> None:
    with load(stack) as pgbench:
        stack.kill_everything()
        pgbench.communicate(timeout=60)
    with pytest.raises(psycopg.OperationalError):
        stack.query("select 1")
    stack.text("start")
    stack.text("endpoint", "start", "main")
    tpcb.check(stack)
