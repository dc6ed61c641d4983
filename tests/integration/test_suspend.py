"""An endpoint that nobody uses is suspended: what keeps it awake, who comes too late, and what is left of it.

EXCIMER_SUSPEND_VERSIONS names older versions of PostgreSQL that are suspended too; by default the oldest and
the last but one.

Delays are a second. That something keeps an endpoint awake is waited for by the number of times that its
manager has looked: ten to a delay.
"""

import contextlib
import json
import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from excimer.compute.activity_sampler import EXTENSIONS, MAINTENANCE, REPLICATION, SESSIONS, SUBSCRIPTIONS
from excimer.compute.idle_policy import SAMPLES_PER_DELAY
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.job_worker import JOB, WORKER, job_worker
from tests.kit.stack import Stack, running_stack

DELAY = "1s"
OLDER_VERSIONS = [int(text) for text in os.environ.get("EXCIMER_SUSPEND_VERSIONS", "14,17").split(",")]
CALLERS = 4
LATE_ROUNDS = 3
SAMPLES_OF_THREE_DELAYS = 3 * SAMPLES_PER_DELAY


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1) as stack:
        stack.text("tenant", "create", "--set-default")
        stack.text("endpoint", "create", "main", "--suspend-after", DELAY, "--set", "wal_level=logical")
        yield stack


@pytest.fixture
def main(stack: Stack) -> Iterator[Stack]:
    """Running, and suspended by itself when a test is over."""
    stack.text("endpoint", "config", "main", "unset", "shared_preload_libraries")
    stack.text("endpoint", "suspend", "main", "--after", DELAY)
    stack.text("endpoint", "start", "main")
    yield stack
    with contextlib.suppress(AssertionError):
        stack.text("endpoint", "stop", "main")


def row(stack: Stack, name: str = "main") -> Any:
    """As the command line shows it now."""
    return next(each for each in stack.json("endpoint", "list")["endpoints"] if each["name"] == name)


def awaken(stack: Stack, name: str = "main") -> "psycopg.Connection[Any]":
    """A session on the endpoint, which may have been suspended in this moment."""
    while True:
        stack.text("endpoint", "start", name)
        try:
            return stack.connect(name)
        except psycopg.OperationalError as error:
            if not is_clear(error):
                raise


def is_clear(error: psycopg.OperationalError) -> bool:
    """Whether a client that came too late hears that it is to try again, or nobody was there to say so.

    Who has connected when the postmaster exits, and was not accepted, is disconnected by the kernel.
    """
    words = ("being suspended", "shutting down", "refused", "closed the connection unexpectedly", "reset by")
    return any(each in str(error) for each in words)


def wait_suspended(stack: Stack, name: str = "main") -> Any:
    stack.wait_until(lambda: bool(row(stack, name)["state"] == "suspended"), f"the suspend of {name}")
    return row(stack, name)


def metrics(stack: Stack, name: str = "main") -> dict[str, float]:
    port = stack.endpoint(name)["http_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def kept_by(kind: str) -> str:
    return f'excimer_compute_kept_awake_by{{kind="{kind}"}}'


def outlasts_three_delays(stack: Stack, kind: str) -> None:
    """It stays awake, and says for what."""
    stack.wait_until(lambda: kept_by(kind) in metrics(stack), f"to be kept awake by {kind}")
    pid = stack.postmaster_pid()
    before = metrics(stack)["excimer_compute_idle_samples_total"]
    stack.wait_until(
        lambda: metrics(stack)["excimer_compute_idle_samples_total"] >= before + SAMPLES_OF_THREE_DELAYS,
        "three delays",
    )
    assert kept_by(kind) in metrics(stack)
    assert stack.postmaster_pid() == pid


# The whole round


def test_an_endpoint_that_nobody_uses_is_suspended_and_woken(main: Stack) -> None:
    with awaken(main) as connection:
        connection.execute("create table kept as select generate_series(1, 1000) n")
    pid = main.pid("endpoint-main")
    asleep = wait_suspended(main)
    assert (asleep["pid"], asleep["suspend_reason"]) == (None, "idle")
    assert not Path(f"/proc/{pid}").exists(), "a suspended endpoint has no process"
    parts = {part["part"]: part for part in main.json("status")["parts"]}
    assert (parts["endpoint-main"]["state"], parts["endpoint-main"]["pid"]) == ("suspended", None)
    assert parts["endpoint-main"]["last_active_at"] == asleep["last_active_at"] is not None
    assert "suspended" in main.text("endpoint", "list")
    with awaken(main) as connection:
        assert connection.execute("select count(*) from kept").fetchall() == [(1000,)]
        connection.execute("drop table kept")
    assert wait_suspended(main)["suspends"] >= asleep["suspends"] + 1


def test_a_woken_endpoint_that_nobody_used_sleeps_again(main: Stack) -> None:
    before = wait_suspended(main)
    main.text("endpoint", "start", "main")
    assert wait_suspended(main)["suspends"] == before["suspends"] + 1


def test_psql_of_the_command_line_wakes_it_and_a_stopped_one_stays_stopped(main: Stack) -> None:
    wait_suspended(main)
    assert main.text("psql", "main", "--", "-Atc", "select 1") == "1\n"
    wait_suspended(main)
    main.text("endpoint", "stop", "main")
    assert row(main)["state"] == "stopped"
    result = main.run("psql", "main", "--", "-Atc", "select 1")
    assert result.returncode != 0
    assert "excimer endpoint start main" in result.stderr


def test_a_person_suspends_as_by_a_fast_stop(main: Stack) -> None:
    main.text("endpoint", "suspend", "main", "--after", "never")
    main.text("endpoint", "start", "main")
    with main.connect() as session:
        session.execute("select 1")
        assert "endpoint main suspended" in main.text("endpoint", "suspend", "main")
        with pytest.raises(psycopg.errors.AdminShutdown):
            session.execute("select 1")
    assert (row(main)["state"], row(main)["suspend_reason"]) == ("suspended", "asked")
    assert "suspended already" in main.text("endpoint", "suspend", "main")
    main.text("endpoint", "stop", "main")
    refused = main.run("endpoint", "suspend", "main")
    assert "nothing to suspend" in refused.stderr


@pytest.mark.parametrize("version", OLDER_VERSIONS)
def test_older_versions_are_suspended_too_and_stay_awake_for_a_session(version: int, stack: Stack) -> None:
    """Their processes have other names."""
    name = f"of{version}"
    stack.text("tenant", "create", name, "--pg-version", str(version))
    stack.text("endpoint", "create", name, "--tenant", name, "--suspend-after", DELAY)
    with awaken(stack, name) as session:
        samples = "excimer_compute_idle_samples_total"
        begun = metrics(stack, name)[samples]
        stack.wait_until(lambda: metrics(stack, name)[samples] > begun + SAMPLES_OF_THREE_DELAYS, "3 delays")
        assert session.execute("select 1").fetchall() == [(1,)]
        assert metrics(stack, name)[kept_by(SESSIONS)] == 1
    wait_suspended(stack, name)


# What keeps it awake


@pytest.mark.parametrize(
    "statements",
    [["listen news"], ["begin", "select 1"], ["select pg_advisory_lock(7)"], ["prepare p as select 1"], []],
    ids=["listen", "idle in transaction", "advisory lock", "prepared statement", "connected"],
)
def test_a_session_keeps_it_awake_whatever_it_does(main: Stack, statements: list[str]) -> None:
    with awaken(main) as session:
        for statement in statements:
            session.execute(statement.encode())
        outlasts_three_delays(main, SESSIONS)
        session.execute("select 1")
    wait_suspended(main)


def test_a_consumer_of_logical_replication_keeps_it_awake(main: Stack) -> None:
    with awaken(main) as session:
        session.execute("select pg_create_logical_replication_slot('changes', 'test_decoding')")
        client = main.program(
            "pg_recvlogical", "-d", "postgres", "--slot", "changes", "--start", "-f", "-", "--no-loop"
        )
        reading = "select count(*) from pg_replication_slots where slot_name = 'changes' and active"
        main.wait_until(lambda: session.execute(reading).fetchall() == [(1,)], "the consumer")
    try:
        outlasts_three_delays(main, REPLICATION)
        assert client.poll() is None
    finally:
        client.terminate()
        client.communicate(timeout=60)
    wait_suspended(main)


def test_an_enabled_subscription_keeps_it_awake_also_while_its_publisher_is_away(main: Stack) -> None:
    with awaken(main) as session:
        session.execute(
            "create subscription away connection 'host=127.0.0.1 port=1' publication p"
            " with (connect = false, slot_name = 'nowhere')"
        )
        session.execute("alter subscription away enable")
    outlasts_three_delays(main, SUBSCRIPTIONS)
    with main.connect() as session:
        session.execute("alter subscription away disable")
    wait_suspended(main)
    with awaken(main) as session:
        session.execute("alter subscription away set (slot_name = none)")
        session.execute("drop subscription away")


def test_autovacuum_comes_to_its_end_first(main: Stack) -> None:
    with awaken(main) as session:
        session.execute("alter system set autovacuum_naptime = '1s'")
        session.execute("select pg_reload_conf()")
        session.execute(
            "create table worn with (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0,"
            " autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)"
            " as select generate_series(1, 200000) n"
        )
        session.execute("delete from worn where n % 2 = 0")
        vacuum = (
            "select count(*) from pg_stat_activity"
            " where backend_type = 'autovacuum worker' and query like '%worn%'"
        )
        main.wait_until(lambda: session.execute(vacuum).fetchall() == [(1,)], "autovacuum of the table")
    outlasts_three_delays(main, MAINTENANCE)
    assert metrics(main)["excimer_compute_idle_seconds"] > 1, "it is idle, and only waits"
    with main.connect() as session:
        session.execute("drop table worn")  # which cancels autovacuum
        session.execute("alter system reset autovacuum_naptime")
        session.execute("select pg_reload_conf()")
    wait_suspended(main)


def test_a_worker_of_an_extension_keeps_it_awake_while_it_works_and_not_by_being_there(main: Stack) -> None:
    """So a scheduler of jobs sleeps with its endpoint, and no job is cut off in the middle."""
    main.text("endpoint", "suspend", "main", "--after", "never")
    main.text("endpoint", "config", "main", "set", f"shared_preload_libraries={job_worker(build_of(18))}")
    main.text("endpoint", "restart", "main")
    job = main.data_dir() / JOB
    workers = f"select xact_start is not null from pg_stat_activity where backend_type = '{WORKER}'"
    main.wait_until(lambda: main.query(workers) == [(False,)], "the worker")
    job.touch()
    main.wait_until(lambda: main.query(workers) == [(True,)], "the job")
    main.text("endpoint", "suspend", "main", "--after", DELAY)
    outlasts_three_delays(main, EXTENSIONS)
    job.unlink()
    wait_suspended(main)


def test_a_prepared_transaction_sleeps_and_is_there_when_it_wakes(main: Stack) -> None:
    """It is in the WAL, so it needs no process: locks and all are back before anybody is let in."""
    main.text("endpoint", "config", "main", "set", "max_prepared_transactions=5")
    main.text("endpoint", "suspend", "main", "--after", "never")
    main.text("endpoint", "restart", "main")
    main.query("create table promised(a int)")
    with main.connect() as session:
        for statement in ("begin", "insert into promised values (1)", "prepare transaction 'promise'"):
            session.execute(statement.encode())
    main.text("endpoint", "suspend", "main", "--after", DELAY)
    wait_suspended(main)
    with awaken(main) as session:
        assert session.execute("select gid from pg_prepared_xacts").fetchall() == [("promise",)]
        with pytest.raises(psycopg.errors.LockNotAvailable), session.transaction():
            session.execute("lock table promised in access exclusive mode nowait")
        session.execute("commit prepared 'promise'")
        assert session.execute("select * from promised").fetchall() == [(1,)]
        session.execute("drop table promised")
    wait_suspended(main)


# Who comes too late


def test_clients_that_come_as_it_goes_to_sleep_are_served_or_told_at_the_door(main: Stack) -> None:
    """Each serves itself whole, or hears before its session begins that it is to try again."""
    url, chance = main.url(), random.Random(7)
    outcomes: list[str] = []

    def call(after_s: float) -> None:
        time.sleep(after_s)
        try:
            session = psycopg.connect(url, autocommit=True, connect_timeout=30)
        except psycopg.OperationalError as error:
            outcomes.append("refused" if is_clear(error) else f"at the door: {error}")
            return
        try:
            with session:
                session.execute("create temp table mine(a int)")
                session.execute("insert into mine values (1)")
                session.execute("select pg_sleep(0.02)")
                assert session.execute("select count(*) from mine").fetchall() == [(1,)]
            outcomes.append("served")
        except psycopg.Error as error:
            outcomes.append(f"in the middle: {error}")

    for _ in range(LATE_ROUNDS):
        awaken(main).close()
        while "refused" not in outcomes[-CALLERS:]:
            before = len(outcomes)
            around_s = chance.uniform(0.95, 1.25)  # a delay after the last use, and a sample
            callers = [
                threading.Thread(target=call, args=(around_s + 0.01 * number,), daemon=True)
                for number in range(CALLERS)
            ]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join(100)
            assert len(outcomes) == before + CALLERS
        wait_suspended(main)
        outcomes += ["asleep"] * CALLERS
    assert set(outcomes) == {"served", "refused", "asleep"}, outcomes


def test_while_the_controller_is_away_it_stays_awake_and_lets_clients_in(main: Stack) -> None:
    words = "cannot be told that the endpoint is suspended"
    before = log(main).count(words)
    try:
        with awaken(main):
            main.text("stop", "controller")
        main.wait_until(lambda: log(main).count(words) > before, "a suspend that is put off")
        main.wait_until(main.accepts, "the endpoint to let somebody in")
    finally:
        main.text("start")
    wait_suspended(main)


def log(stack: Stack, part: str = "endpoint-main") -> str:
    return (stack.directory / "logs" / f"{part}.log").read_text()


def test_a_manager_that_is_killed_in_the_middle_of_a_suspend_is_started_again(main: Stack) -> None:
    """The controller was told, PostgreSQL has not come to its end: the next start loses nothing."""
    with awaken(main) as session:
        session.execute("create table survivors as select generate_series(1, 100) n")
    manager, postmaster = main.pid("endpoint-main"), main.postmaster_pid()
    # A checkpointer that stands still cannot write the shutdown checkpoint.
    checkpointer = child_of(postmaster, "checkpointer")
    os.kill(checkpointer, signal.SIGSTOP)
    main.wait_until(lambda: "it is suspended" in log(main).rpartition('"ready"')[2], "the suspend to begin")
    os.kill(manager, signal.SIGKILL)
    main.wait_until(lambda: row(main)["state"] == "suspended", "the state that the controller was told")
    with awaken(main) as session:
        assert session.execute("select count(*) from survivors").fetchall() == [(100,)]
        session.execute("drop table survivors")
    wait_suspended(main)
    assert not Path(f"/proc/{postmaster}").exists()


def child_of(postmaster: int, title: str) -> int:
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    return next(int(pid) for pid in children if title in Path(f"/proc/{pid}/cmdline").read_text())


# Settings, and the installation around it


def test_a_new_delay_is_in_force_without_a_restart(main: Stack) -> None:
    main.text("endpoint", "suspend", "main", "--after", "never")
    main.text("endpoint", "start", "main")
    pid = main.pid("endpoint-main")
    assert row(main)["suspend_delay_s"] == 0
    main.wait_until(lambda: metrics(main)["excimer_compute_idle_seconds"] > 3, "three seconds without use")
    shown = main.json("endpoint", "suspend", "main", "--after", "1h")
    assert (shown["in_force"], shown["suspend_delay_s"]) == (True, 3600)
    assert metrics(main)["excimer_compute_suspend_delay_seconds"] == 3600
    assert main.pid("endpoint-main") == pid
    main.text("endpoint", "suspend", "main", "--after", DELAY)
    wait_suspended(main)
    for wrong in ("-1", "1week", "8d"):
        refused = main.run("endpoint", "suspend", "main", "--after", wrong)
        assert refused.returncode != 0
        assert "delay" in refused.stderr or "never (0)" in refused.stderr


def test_static_endpoints_are_not_suspended_and_say_why(main: Stack) -> None:
    with awaken(main) as session:
        ((lsn,),) = session.execute("select pg_current_wal_insert_lsn()::text").fetchall()
    refused = main.run("endpoint", "create", "past", "--at", lsn, "--suspend-after", "5m")
    assert "a static endpoint is not suspended" in refused.stderr
    made = main.json("endpoint", "create", "past", "--at", lsn)
    assert made["suspend_delay_s"] == 0
    assert "static" in main.run("endpoint", "suspend", "past").stderr
    main.text("endpoint", "stop", "past", "--destroy")


def test_what_is_suspended_stays_so_over_a_stop_of_everything(main: Stack) -> None:
    wait_suspended(main)
    main.text("stop")
    main.text("start")
    assert row(main)["state"] == "suspended"
    assert json.loads(main.text("--json", "status"))["well"]
    with awaken(main) as session:
        assert session.execute("select 1").fetchall() == [(1,)]
