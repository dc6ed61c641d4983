"""An endpoint that was stopped cleanly is as after a restart of stock PostgreSQL; any other starts afresh."""

import contextlib
import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from excimer.compute.activity_sampler import child_pids
from excimer.compute.arena import Arena
from excimer.compute.places import locate_places
from excimer.compute.stop_progress import STILL_S, checkpointer_work
from excimer.pageserver.bootstrap import initdb_template
from tests.kit.builds import ALL_VERSIONS, NEWEST_VERSION, build_of
from tests.kit.dying_manager import start_dying
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import copy_data_dir, stock_server

STATE = """
create extension if not exists pg_stat_statements;
create table t (a int primary key, pad text) with (autovacuum_enabled = off);
insert into t select g, repeat('x', 200) from generate_series(1, 20000) g;
delete from t where a % 2 = 0;
vacuum t;
create unlogged table u (a int);
insert into u select generate_series(1, 100);
create sequence s;
select nextval('s'), nextval('s')
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION) as stack:
        create_main(stack)
        yield stack


@pytest.fixture(scope="module")
def oldest_stack() -> Iterator[Stack]:
    with running_stack(min(ALL_VERSIONS), safekeepers=1) as stack:
        create_main(stack)
        yield stack


def create_main(stack: Stack) -> None:
    stack.text("tenant", "create", "--set-default")
    stack.text("endpoint", "create", "main", "--set", "wal_level=logical")
    stack.text("endpoint", "start", "main")
    stack.query("create table acknowledged (a int)")


def restart(stack: Stack, endpoint: str = "main") -> tuple[str, str | None]:
    stack.text("endpoint", "stop", endpoint)
    return start(stack, endpoint)


def start(stack: Stack, endpoint: str = "main") -> tuple[str, str | None]:
    """How it started: warm or cold, and why."""
    stack.text("endpoint", "start", endpoint)
    shown = stack.json("endpoint", "show", endpoint)
    return shown["start"], shown["start_reason"]


def script(stack: Stack, statements: str) -> None:
    """Each a transaction of its own."""
    with stack.connect() as connection:
        for statement in statements.split(";"):
            connection.execute(statement.encode())


def present_blocks(stack: Stack, path: str) -> list[bool]:
    """Of a file of the page store: which blocks the endpoint need not fetch."""
    arena = Arena.open(locate_places(stack.directory / "endpoints" / "main").arena)
    try:
        return arena.present_blocks(path)
    finally:
        arena.close()


def data_dir(stack: Stack, endpoint: str = "main") -> Path:
    """Of an endpoint that need not run."""
    return locate_places(stack.directory / "endpoints" / endpoint).data_dir


def acknowledge(stack: Stack, endpoint: str = "main") -> int:
    """One more row; how many there are then."""
    stack.query("insert into acknowledged values (1)", endpoint)
    return count(stack, endpoint)


def count(stack: Stack, endpoint: str = "main") -> int:
    return int(stack.query("select count(*) from acknowledged", endpoint)[0][0])


@pytest.mark.parametrize("name", ["stack", "oldest_stack"])
def test_nothing_is_forgotten(name: str, request: pytest.FixtureRequest) -> None:
    stack: Stack = request.getfixturevalue(name)
    script(stack, STATE)
    stack.query("select pg_create_logical_replication_slot('mine', 'test_decoding')")
    stack.query("insert into t values (-1, '')")
    stack.query("create extension pg_freespacemap")
    statistics = "select n_live_tup, n_dead_tup, n_tup_ins from pg_stat_user_tables where relname = 't'"
    stack.wait_until(lambda: stack.query(statistics)[0][2] == 20001, "the statistics to be told")
    asked = [
        statistics,
        "select sum(avail) from pg_freespace('t')",
        "select count(*) from u",
        "select calls from pg_stat_statements where query like '%create unlogged%'",
        "select restart_lsn, confirmed_flush_lsn from pg_replication_slots where slot_name = 'mine'",
    ]
    before = [stack.query(question) for question in asked]
    catalog = str(stack.query("select pg_relation_filepath('pg_class')")[0][0])
    fetched = present_blocks(stack, catalog)
    assert any(fetched)
    assert restart(stack) == ("warm", None)
    assert [stack.query(question) for question in asked] == before
    assert stack.query("select nextval('s')") == [(3,)]
    assert stack.query("select count(*) from t") == [(10001,)]
    assert all(now for was, now in zip(fetched, present_blocks(stack, catalog), strict=True) if was)
    changes = stack.query("select data from pg_logical_slot_get_changes('mine', null, null)")
    assert sum("a[integer]:-1" in row[0] for row in changes) == 1
    stack.query("select pg_drop_replication_slot('mine')")


ROUNDS = 20
GROWN = """
create table grown (a int, pad text) with (autovacuum_enabled = off);
insert into grown select g, repeat('x', 200) from generate_series(1, 10000) g
"""
MADE_FREE = "delete from grown where a % 20 = {0};vacuum grown"
FILLED = "insert into grown select 20 * g + {0}, repeat('y', 200) from generate_series(1, 500) g"
GROWN_TO = "select pg_relation_size('grown') / 8192"


def stock_blocks(root: Path) -> int:
    """How large the table becomes where stock PostgreSQL is restarted in each round."""
    build = build_of(NEWEST_VERSION)
    copy_data_dir(initdb_template(build), root)
    with stock_server(build, root, {}) as server:
        server.sql(GROWN)
    for number in range(ROUNDS):
        with stock_server(build, root, {}) as server:
            server.sql(MADE_FREE.format(number))
        with stock_server(build, root, {}) as server:
            server.sql(FILLED.format(number))
            (size,) = server.sql(GROWN_TO)
    return int(size[0])


@pytest.mark.parametrize("name", ["stack", "oldest_stack"])
def test_a_receiver_that_hangs_does_not_cost_the_slots(name: str, request: pytest.FixtureRequest) -> None:
    """PostgreSQL's shutdown waits until everybody has all WAL; killed meanwhile it would forget all slots."""
    stack: Stack = request.getfixturevalue(name)
    script(stack, "create table taken (a text)")
    stack.query("select pg_create_logical_replication_slot('slow', 'test_decoding')")
    arguments = ["--slot", "slow", "--start", "--no-loop", "-f", os.devnull]
    receiver = stack.program("pg_recvlogical", "-d", "postgres", *arguments)
    try:
        active = "select 1 from pg_replication_slots where slot_name = 'slow' and active"
        stack.wait_until(lambda: stack.query(active) == [(1,)], "a receiver")
        receiver.send_signal(signal.SIGSTOP)
        stack.query("insert into taken select repeat(md5(g::text), 100) from generate_series(1, 20000) g")
        assert restart(stack) == ("warm", None)
    finally:
        receiver.kill()
        receiver.communicate()
    changes = "pg_logical_slot_get_changes('slow', null, null) where data like '%INSERT%'"
    assert stack.query(f"select count(*) from {changes}") == [(20000,)]
    script(stack, "select pg_drop_replication_slot('slow'); drop table taken")


def test_tables_grow_as_with_restarts_of_stock(stack: Stack) -> None:
    """The free space that a vacuum has found is used after a stop."""
    with tempfile.TemporaryDirectory(prefix="excimer-grown-") as root:
        Path(root).chmod(0o755)
        theirs = stock_blocks(Path(root) / "data")
    script(stack, GROWN)
    for number in range(ROUNDS):
        script(stack, MADE_FREE.format(number))
        assert restart(stack) == ("warm", None)
        script(stack, FILLED.format(number))
    ours = int(stack.query(GROWN_TO)[0][0])
    assert abs(ours - theirs) <= 0.1 * theirs


def test_prepared_transactions_and_a_superuser_of_another_name_stay(stack: Stack) -> None:
    stack.text("endpoint", "config", "main", "set", "max_prepared_transactions=5")
    assert restart(stack) == ("warm", None)
    with stack.connect() as connection:
        connection.execute("begin")
        connection.execute("insert into acknowledged values (2)")
        connection.execute("prepare transaction 'two'")
    before = count(stack)
    stack.query("create role another superuser login password 'p'")
    assert restart(stack) == ("warm", None)
    stack.query("commit prepared 'two'")
    assert count(stack) == before + 1


STOP_STEPS = [
    ("excimer.compute.endpoint_directory:write_record", "before", "cold"),
    ("excimer.compute.endpoint_directory:write_record", "after", "warm"),
]
START_STEPS = [
    ("excimer.compute.endpoint_directory:take_record", "before", "warm"),
    ("excimer.compute.endpoint_directory:take_record", "after", "cold"),
    ("excimer.compute.directory_preparation:remove_pair", "before", "cold"),
    ("excimer.compute.attempt:prepare_kept", "after", "cold"),
    ("excimer.compute.attempt:PostgresProcess.wait_ready", "before", "cold"),
    ("excimer.compute.attempt:find_superuser", "before", "cold"),
]
REASONS = {"warm": None, "cold": "it was not shut down cleanly"}


@pytest.mark.parametrize(("where", "when", "then"), STOP_STEPS)
def test_a_manager_that_is_killed_while_it_stops(stack: Stack, where: str, when: str, then: str) -> None:
    rows = acknowledge(stack)
    stack.text("endpoint", "stop", "main")
    manager = start_dying(stack, "main", where, when)
    stack.wait_until(lambda: stack.accepts("main"), "its start")
    rows = acknowledge(stack)
    manager.send_signal(signal.SIGTERM)
    assert manager.wait(60) == -signal.SIGKILL
    assert start(stack) == (then, REASONS[then])
    assert count(stack) == rows


@pytest.mark.parametrize(("where", "when", "then"), START_STEPS)
def test_a_manager_that_is_killed_while_it_starts(stack: Stack, where: str, when: str, then: str) -> None:
    restart(stack)
    rows = acknowledge(stack)
    stack.text("endpoint", "stop", "main")
    assert start_dying(stack, "main", where, when).wait(60) == -signal.SIGKILL
    assert start(stack) == (then, REASONS[then])
    assert count(stack) == rows


def checkpointer_pid(stack: Stack) -> int:
    return checkpointer_work(child_pids(stack.postmaster_pid()))[0]


def test_a_stop_whose_last_checkpoint_takes_long_is_waited_for(stack: Stack) -> None:
    """Beyond every limit that holds while nothing moves: it is clean, and the next start a warm one."""
    rows = acknowledge(stack)
    script(stack, "create table wide (pad text);alter table wide alter pad set storage plain;checkpoint")
    stack.query("insert into wide select repeat('x', 6000) from generate_series(1, 6000)")
    checkpointer = checkpointer_pid(stack)
    os.kill(checkpointer, signal.SIGSTOP)
    stopping = threading.Thread(target=stack.text, args=("endpoint", "stop", "main"))
    stopping.start()
    with contextlib.suppress(ProcessLookupError):  # it has come to its end
        for _ in range(4):
            time.sleep(STILL_S / 2)  # it has not moved for so long, each time anew
            before = checkpointer_work([checkpointer])
            os.kill(checkpointer, signal.SIGCONT)
            while checkpointer_work([checkpointer]) == before:
                pass
            os.kill(checkpointer, signal.SIGSTOP)
        os.kill(checkpointer, signal.SIGCONT)
    stopping.join()
    assert start(stack) == ("warm", None)
    assert count(stack) == rows


def test_a_stop_that_postgres_does_not_end_cleanly_is_said(stack: Stack) -> None:
    """Its checkpointer hangs, so that it is killed: what a quorum has is there, and the log says so."""
    rows = acknowledge(stack)
    os.kill(checkpointer_pid(stack), signal.SIGSTOP)
    stack.text("endpoint", "stop", "main")
    log = (stack.directory / "logs" / "endpoint-main.log").read_text()
    assert "postgres did not stop cleanly: the next start is cold" in log
    assert start(stack) == ("cold", "it was not shut down cleanly")
    assert count(stack) == rows


def test_what_a_kill_or_an_immediate_stop_leaves_is_not_used(stack: Stack) -> None:
    rows = acknowledge(stack)
    stack.kill("endpoint-main")
    assert start(stack) == ("cold", "it was not shut down cleanly")
    assert count(stack) == rows
    stack.text("endpoint", "stop", "main", "--immediate")
    assert not data_dir(stack).exists()
    assert start(stack) == ("cold", "it was not shut down cleanly")
    assert restart(stack) == ("warm", None), "told once"
    assert count(stack) == rows


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_pageserver_that_is_away_does_not_keep_a_warm_start_back(
    stack: Stack, number: signal.Signals
) -> None:
    rows = acknowledge(stack)
    stack.text("endpoint", "stop", "main")
    pageserver = stack.pid("pageserver")
    try:
        os.kill(pageserver, number) if number is signal.SIGSTOP else stack.kill("pageserver")
        assert start(stack) == ("warm", None)
        assert count(stack) == rows
    finally:
        os.kill(pageserver, signal.SIGCONT) if number is signal.SIGSTOP else stack.text("start")


def test_a_crash_of_postgres_starts_afresh(stack: Stack) -> None:
    rows = acknowledge(stack)
    before = stack.postmaster_pid()
    os.kill(before, signal.SIGKILL)
    stack.wait_until(lambda: stack.accepts() and stack.postmaster_pid() != before, "a fresh start")
    shown = stack.json("endpoint", "show", "main")
    assert (shown["start"], shown["start_reason"]) == ("cold", "it was not shut down cleanly")
    assert count(stack) == rows


def test_who_wrote_meanwhile_is_not_overlooked(stack: Stack) -> None:
    stack.text("endpoint", "create", "other")
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "start", "other")
    rows = acknowledge(stack, "other")
    stack.text("endpoint", "stop", "other")
    how, reason = start(stack)
    assert how == "cold"
    assert reason is not None
    assert re.search("the branch's WAL ends at .*, and it was shut down at", reason)
    assert count(stack) == rows
    stack.text("endpoint", "delete", "other")
    assert not data_dir(stack, "other").exists()


def test_a_branch_that_has_another_state_now_is_another_timeline(stack: Stack) -> None:
    rows = acknowledge(stack)
    lsn = str(stack.query("select pg_current_wal_lsn()")[0][0])
    acknowledge(stack)
    stack.text("timeline", "restore", "main", "--to", lsn, "--stop-endpoints")
    stack.forget("main")
    assert start(stack) == ("cold", "the endpoint is on another timeline now")
    assert count(stack) == rows


def test_a_directory_that_was_changed_is_not_used(stack: Stack) -> None:
    rows = acknowledge(stack)
    places = locate_places(stack.directory / "endpoints" / "main")
    control = places.data_dir / "global" / "pg_control"

    def reverse() -> None:
        control.write_bytes(control.read_bytes()[::-1])

    def empty() -> None:
        places.arena.write_bytes(b"")

    damages = [
        (reverse, "it has been changed since it was shut down"),
        (empty, "its arena cannot be read"),
        (places.arena.unlink, "its arena cannot be read"),
    ]
    for damage, reason in damages:
        restart(stack)
        stack.text("endpoint", "stop", "main")
        damage()
        assert start(stack) == ("cold", reason)
        assert count(stack) == rows


def test_a_directory_of_another_boot_or_build_is_not_used(stack: Stack) -> None:
    rows = acknowledge(stack)
    record_path = locate_places(stack.directory / "endpoints" / "main").shutdown_record
    changes: list[tuple[dict[str, Any], str]] = [
        ({"boot_id": "another"}, "the machine has been started anew since"),
        ({"version": 99}, "another version of Excimer left it"),
    ]
    for change, reason in changes:
        restart(stack)
        stack.text("endpoint", "stop", "main")
        record_path.write_text(json.dumps(json.loads(record_path.read_text()) | change))
        assert start(stack) == ("cold", reason)
        assert count(stack) == rows


def test_configuration_is_of_the_start(stack: Stack) -> None:
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "config", "main", "set", "work_mem=17MB")
    (data_dir(stack) / "standby.signal").touch()
    (data_dir(stack) / "postgresql.conf").write_text("no such thing")
    assert start(stack) == ("warm", None)
    assert stack.query("show work_mem") == [("17MB",)]
    stack.query("alter system set work_mem = '18MB'")
    assert restart(stack) == ("warm", None)
    assert stack.query("show work_mem") == [("18MB",)]
    acknowledge(stack)


def test_directories_of_stopped_endpoints_are_bounded(stack: Stack) -> None:
    config = stack.directory / "config.toml"
    before = config.read_text()
    config.write_text(f"stopped_directories_max_mib = 0\n{before}")
    restart(stack)
    stack.text("endpoint", "stop", "main")
    assert list(data_dir(stack).parent.glob("*")) == []
    config.write_text(before)
    assert start(stack) == ("cold", "it was removed to make room on the disk")


def test_the_proposers_slot_lets_old_wal_go(stack: Stack) -> None:
    stack.query("create table if not exists bulk (pad text)")
    for _ in range(3):
        stack.query(
            "insert into bulk select repeat('x', 1000) from generate_series(1, 20000); select pg_switch_wal()"
        )
        assert restart(stack)[0] == "warm"
    stack.query("checkpoint")
    behind = (
        "select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) from pg_replication_slots "
        "where slot_name = 'excimer_proposer' and active"
    )
    stack.wait_until(lambda: stack.query(behind)[0][0] < 1 << 20, "the proposer's slot to follow")


def test_a_static_endpoint_keeps_nothing(stack: Stack) -> None:
    lsn = str(stack.query("select pg_current_wal_lsn()")[0][0])
    stack.text("endpoint", "create", "then", "--at", lsn)
    assert start(stack, "then") == ("cold", None)
    stack.text("endpoint", "stop", "then")
    assert not data_dir(stack, "then").exists()
    stack.text("endpoint", "delete", "then")


def test_deleted_endpoints_leave_nothing(stack: Stack) -> None:
    stack.text("timeline", "branch", "--branch-name", "gone")
    stack.text("endpoint", "create", "gone", "--branch-name", "gone")
    stack.text("endpoint", "start", "gone")
    stack.text("endpoint", "stop", "gone")
    kept = data_dir(stack, "gone")
    assert kept.exists()
    stack.text("endpoint", "stop", "gone", "--destroy")
    assert not kept.exists()
