"""Read replicas: they show what their primary has committed, and no more, page by page.

`EXCIMER_REPLICA_VERSIONS` names versions of PostgreSQL; by default the newest.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from excimer.base.lsn import parse_lsn
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_REPLICA_VERSIONS", str(NEWEST_VERSION)).split(",")]
WRITES = """
update pgbench_accounts set abalance = abalance + 1 where aid % 11 = 3;
insert into churn select g, repeat('c', g % 300) from generate_series(1, 3000) g;
delete from churn where k % 3 = 1;
create index churn_late on churn(note);
vacuum churn;
drop index churn_late;
truncate rewritten;
insert into rewritten select g from generate_series(1, 3000) g;
vacuum full rewritten;
"""


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param) as running:
        running.text("tenant", "create", "--set-default")
        prepared = ("--set", "max_prepared_transactions=10")
        running.text("endpoint", "create", "main", "--suspend-after", "never", *prepared)
        running.text("endpoint", "start", "main")
        running.query("create table t(a int primary key, b int); insert into t values (0, 0)")
        yield running


def start_replica(stack: Stack, name: str, *options: str) -> None:
    stack.text("endpoint", "create", name, "--replica", "--suspend-after", "never", *options)
    stack.text("endpoint", "start", name)


@contextmanager
def replica(stack: Stack, name: str, *options: str) -> Iterator[None]:
    start_replica(stack, name, *options)
    try:
        yield
    finally:
        stack.text("endpoint", "stop", name, "--destroy")


def follow(stack: Stack, *names: str) -> None:
    """Until the replicas have replayed what the primary has committed now."""
    ((lsn,),) = stack.query("select pg_current_wal_flush_lsn()::text")

    def has_come(name: str) -> Callable[[], bool]:
        return lambda: stack.query(f"select pg_last_wal_replay_lsn() >= '{lsn}'", name) == [(True,)]

    for name in names:
        stack.wait_until(has_come(name), f"replica {name} to replay {lsn}")


def verified(stack: Stack, name: str) -> dict[str, Any]:
    result = stack.run("--json", "verify", name)
    assert result.stdout, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    assert answer["differences"] == [], json.dumps(answer["differences"][:10], indent=1)
    return answer


def test_open_transactions_are_told_from_aborted_ones(stack: Stack) -> None:
    """Of transactions that began before the replica did nothing is seen until they commit."""
    with stack.connect() as plain, stack.connect() as nested, stack.connect() as failing:
        for connection, value in ((plain, 1), (nested, 2), (failing, 3)):
            connection.execute("begin")
            connection.execute("insert into t values (%s, 0)", (value,))
        nested.execute("savepoint s")
        nested.execute("insert into t values (20, 0)")
        stack.query("begin; insert into t values (4, 0); prepare transaction 'p'")
        stack.query("insert into t values (5, 0)")
        with replica(stack, "early"), replica(stack, "other"):
            for name in ("early", "other"):
                assert stack.query("select a from t order by a", name) == [(0,), (5,)]
            plain.execute("commit")
            nested.execute("commit")
            failing.execute("rollback")
            stack.query("commit prepared 'p'")
            follow(stack, "early", "other")
            for name in ("early", "other"):
                expected = [(0,), (1,), (2,), (4,), (5,), (20,)]
                assert stack.query("select a from t order by a", name) == expected
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                    stack.query("insert into t values (6, 0)", name)


def test_what_the_primary_has_locked_is_locked(stack: Stack) -> None:
    stack.query("create table locked as select 1 as a")
    with stack.connect() as holder:
        holder.execute("begin")
        holder.execute("lock table locked in access exclusive mode")
        stack.query("checkpoint")  # a snapshot of what runs, the lock before it
        with replica(stack, "late"):
            with pytest.raises(psycopg.errors.LockNotAvailable):
                stack.query("set lock_timeout = '100ms'; select * from locked", "late")
            holder.execute("commit")
            follow(stack, "late")
            assert stack.query("select * from locked", "late") == [(1,)]


def test_pages_are_those_of_the_page_store_while_the_primary_writes(stack: Stack) -> None:
    stack.check_program("pgbench", "-i", "-q", "-s", "1")
    stack.query("create table churn(k int, note text); create table rewritten(a int)")
    is_over = threading.Event()

    def write() -> None:
        with stack.connect() as connection:
            while not is_over.is_set():
                for statement in WRITES.strip().split("\n"):
                    connection.execute(statement.encode())
                is_over.wait(0.5)

    clients = stack.program("pgbench", "-n", "-c", "2", "-R", "40", "-T", "600")
    writing = threading.Thread(target=write)
    writing.start()
    try:
        with replica(stack, "loaded"):
            stack.query("select count(*) from pgbench_accounts", "loaded")
            loaded = verified(stack, "loaded")
            assert loaded["pages"] > 1000
            is_over.set()
            clients.terminate()
            clients.communicate(timeout=60)
            writing.join(60)
            stack.query("create database copied" + " strategy file_copy" * (stack.pg_version >= 15))
            follow(stack, "loaded")
            assert stack.query("select count(*) > 300 from pg_class", "loaded", "copied") == [(True,)]
            for name in ("loaded", "main"):
                verified(stack, name)
            totals = "select sum(abalance), (select sum(hashtext(note)) from churn) from pgbench_accounts"
            assert stack.query(totals, "loaded") == stack.query(totals)
    finally:
        is_over.set()
        clients.terminate()
        writing.join(60)


def test_what_a_replica_still_sees_is_not_vacuumed_away(stack: Stack) -> None:
    """Replay cancels at once what it collides with; nothing that it meets does."""
    horizon = "select xmin is not null from pg_replication_slots where slot_name = 'excimer_proposer'"
    stack.query("create table seen as select g as a from generate_series(1, 1000) g")
    with replica(stack, "reader", "--set", "max_standby_streaming_delay=0"):
        with stack.connect("reader") as reading:
            reading.execute("begin isolation level repeatable read")
            assert reading.execute("select count(*) from seen").fetchall() == [(1000,)]
            stack.wait_until(lambda: stack.query(horizon) == [(True,)], "the primary to hear of the reader")
            stack.query("delete from seen where a > 10")
            stack.query("vacuum (freeze, truncate off) seen")
            follow(stack, "reader")
            assert reading.execute("select count(*) from seen").fetchall() == [(1000,)]
            reading.execute("commit")
        assert stack.query("select count(*) from seen", "reader") == [(10,)]
    stack.wait_until(lambda: stack.query(horizon) == [(False,)], "the primary to hear that nobody reads")


def test_history_is_held_back_only_while_a_replica_lives(stack: Stack) -> None:
    """With windows of nothing, a replica that has stopped to replay still reads what it has not read yet."""
    names = ("pitr_interval_s", "gc_horizon_bytes", "lsn_lease_length_s")
    stack.query("create table old as select g as a, repeat('x', 500) as b from generate_series(1, 3000) g")
    stack.query("vacuum freeze old")
    stack.stop_and_forget()
    stack.text("endpoint", "start", "main")
    stack.query("checkpoint")
    with replica(stack, "slow", "--set", "hot_standby_feedback=off"):
        follow(stack, "slow")
        stack.query("select pg_wal_replay_pause()", "slow")
        ((paused_lsn,),) = stack.query("select pg_last_wal_replay_lsn()::text", "slow")
        stack.query("update old set b = repeat('y', 500)")
        stack.query("vacuum old")
        stack.query("checkpoint")
        stack.json("tenant", "config", *(part for name in names[:2] for part in ("--set", f"{name}=0")))
        stack.json("tenant", "config", "--set", f"{names[2]}=1")

        def collected() -> int:
            return parse_lsn(stack.json("timeline", "gc")["cutoff_lsn"])

        stack.wait_until(lambda: not stack.run("timeline", "gc").returncode, "leases to be renewed")
        assert collected() <= parse_lsn(paused_lsn)
        assert stack.query("select count(*) from old where b like 'x%'", "slow") == [(3000,)]
        shown = stack.json("endpoint", "show", "slow")
        assert (shown["mode"], shown["lag_bytes"] > 100_000) == ("replica", True)
        stack.query("select pg_wal_replay_resume()", "slow")
        follow(stack, "slow")
        assert stack.query("select count(*) from old where b like 'y%'", "slow") == [(3000,)]
        stack.wait_until(lambda: stack.json("endpoint", "show", "slow")["lag_bytes"] == 0, "the lag to go")
        stack.query("select pg_wal_replay_pause()", "slow")
        stack.query("update old set b = ''")
        stack.text("endpoint", "stop", "slow")
        stack.query("checkpoint")
        assert collected() > parse_lsn(stack.query("select pg_current_wal_lsn()::text")[0][0]) - (1 << 16)
    stack.json("tenant", "config", *(part for name in names for part in ("--set", f"{name}=")))
    stack.text("endpoint", "create", "again", "--replica")
    starting = threading.Thread(target=stack.run, args=("endpoint", "start", "again"))
    starting.start()
    log = stack.directory / "logs" / "endpoint-again.log"

    def waits_or_runs() -> bool:
        """A snapshot that the primary makes by itself meanwhile lets it start."""
        return (log.exists() and "no longer kept" in log.read_text()) or stack.accepts("again")

    stack.wait_until(waits_or_runs, "a start that waits for a snapshot")
    stack.query("checkpoint")  # which says what runs, above the cutoff
    starting.join()
    assert stack.query("select pg_is_in_recovery()", "again") == [(True,)]
    stack.text("endpoint", "stop", "again", "--destroy")


def test_a_primary_with_more_connections_takes_its_replicas_along(stack: Stack) -> None:
    with replica(stack, "narrow", "--set", "max_connections=20"):
        assert stack.query("show max_connections", "narrow") == [("100",)]
        stack.text("endpoint", "config", "main", "set", "max_connections=130")
        stack.text("endpoint", "restart", "main")
        stack.query("insert into t values (100, 0)")

        def has_come() -> bool:
            try:
                return stack.query("select count(*) from t where a = 100", "narrow") == [(1,)]
            except psycopg.Error:
                return False

        stack.wait_until(has_come, "the replica to follow its primary")
        assert stack.query("show max_connections", "narrow") == [("130",)]
        verified(stack, "narrow")


def test_one_that_is_promoted_within_postgresql_begins_anew(stack: Stack) -> None:
    with replica(stack, "coup"):
        stack.query("select pg_promote(false)", "coup")
        stack.query("insert into t values (200, 0)")

        def follows() -> bool:
            try:
                seen = stack.query("select pg_is_in_recovery(), count(*) from t where a = 200", "coup")
            except psycopg.Error:
                return False
            return seen == [(True, 1)]

        stack.wait_until(follows, "the replica to follow again")


def test_a_suspended_replica_wakes_at_the_head(stack: Stack) -> None:
    with replica(stack, "sleepy"):
        assert stack.json("endpoint", "suspend", "sleepy")["suspended"]
        stack.query("insert into t values (300, 0)")
        stack.text("endpoint", "start", "sleepy")
        assert stack.query("select count(*) from t where a = 300", "sleepy") == [(1,)]


def test_a_replica_is_promoted_to_primary(stack: Stack) -> None:
    """The last test that needs `main` as the primary: both ways, and nothing is lost."""
    start_replica(stack, "heir")
    stack.query("insert into t values (400, 0)")
    assert "is no replica" in stack.run("endpoint", "promote", "main").stderr
    made = stack.json("endpoint", "promote", "heir")
    assert (made["mode"], made["former"]) == ("primary", "main")
    stack.forget("heir")
    stack.query("insert into t values (401, 0)", "heir")
    assert stack.query("select a from t where a >= 400 order by a", "heir") == [(400,), (401,)]
    assert "has a running primary, endpoint heir" in stack.run("endpoint", "start", "main").stderr
    with replica(stack, "next"):
        assert stack.query("select count(*) from t where a >= 400", "next") == [(2,)]
    stack.text("endpoint", "stop", "heir", "--destroy")
    stack.text("endpoint", "start", "main")
    assert stack.query("select a from t where a >= 400 order by a") == [(400,), (401,)]


def test_a_branch_that_nobody_wrote_has_nothing_to_follow(stack: Stack) -> None:
    stack.text("timeline", "branch", "--branch-name", "fresh")
    stack.text("endpoint", "create", "idle", "--replica", "--branch-name", "fresh")
    refused = stack.run("endpoint", "create", "both", "--replica", "--at", "-1s")
    assert (refused.returncode, "choose one" in refused.stderr) == (2, True)
    stack.text("endpoint", "delete", "idle")
