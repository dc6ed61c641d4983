"""Settings of endpoints on the whole stack: by ALTER SYSTEM and the command line, live, kept, and refused."""

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.cli.controller_client import ControllerClient
from excimer.cli.installation import load_installation
from excimer.compute.places import locate_places
from tests.kit.builds import build_of
from tests.kit.stack import Stack, running_stack


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(18, safekeepers=1) as made:
        made.create_main()
        yield made


@pytest.fixture(scope="module", params=["main", "old"])
def endpoint(request: pytest.FixtureRequest, stack: Stack) -> str:
    """Of the newest and the oldest PostgreSQL."""
    if request.param == "old":
        build_of(14)
        stack.text("tenant", "create", "old", "--pg-version", "14")
        stack.text("endpoint", "create", "old", "--tenant", "old", "--set", "My.Own=first")
        stack.text("endpoint", "start", "old")
    return str(request.param)


def listed(stack: Stack, name: str) -> dict[str, str]:
    client = ControllerClient(load_installation(stack.directory))
    settings: dict[str, str] = client.get("endpoints", name, "settings")["settings"]
    return settings


def show(stack: Stack, setting: str, name: str) -> str:
    return str(stack.query(f"show {setting}", name)[0][0])


def test_alter_system_is_kept_over_stops_and_crashes(stack: Stack, endpoint: str) -> None:
    if endpoint == "old":
        assert show(stack, "my.own", endpoint) == "first"
    stack.query("alter system set work_mem = '9MB'", endpoint)
    stack.query("alter system set my.own = 'it''s \\ so'", endpoint)
    assert show(stack, "work_mem", endpoint) == "4MB", "as in stock PostgreSQL it wants a reload"
    stack.query("select pg_reload_conf()", endpoint)
    stack.wait_until(lambda: show(stack, "work_mem", endpoint) == "9MB", "the reload")
    assert listed(stack, endpoint) == {"work_mem": "9MB", "my.own": "it's \\ so"}
    stack.query("alter system set maintenance_work_mem = '99MB'", endpoint)
    os.kill(stack.postmaster_pid(endpoint), signal.SIGKILL)
    stack.wait_until(lambda: stack.accepts(endpoint), "a fresh start after a crash")
    assert show(stack, "maintenance_work_mem", endpoint) == "99MB"
    stack.query("alter system reset work_mem", endpoint)
    stack.kill(f"endpoint-{endpoint}")
    stack.text("endpoint", "start", endpoint)
    assert [show(stack, name, endpoint) for name in ("work_mem", "maintenance_work_mem", "my.own")] == [
        "4MB",
        "99MB",
        "it's \\ so",
    ]
    stack.query("alter system reset all", endpoint)
    assert listed(stack, endpoint) == {}


def test_what_alter_system_may_not_set_is_an_error_with_its_reason(stack: Stack, endpoint: str) -> None:
    for setting, said in (
        ("fsync = on", "fsync belongs to Excimer and cannot be changed: the local directory is a cache"),
        ("archive_mode = on", "an archive made from it would have gaps"),
        ("shared_preload_libraries = 'nosuch'", "has no library nosuch"),
        ("max_connections = 3", "connections are reserved"),
        ("max_wal_senders = 1", "must be at least 2"),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as refused:
            stack.query(f"alter system set {setting}", endpoint)
        assert said in str(refused.value)
    assert listed(stack, endpoint) == {}
    assert not (stack.data_dir(endpoint) / "postgresql.auto.conf.tmp").exists()
    stack.query("alter system reset fsync", endpoint)


def test_the_command_line_and_sql_change_one_list(stack: Stack) -> None:
    done = stack.json("endpoint", "config", "main", "set", "work_mem=11MB", "shared_buffers=64MB")
    assert (done["in_force"], done["restart_pending"]) == (True, ["shared_buffers"])
    stack.wait_until(lambda: show(stack, "work_mem", "main") == "11MB", "the reload")
    assert show(stack, "shared_buffers", "main") == "128MB"
    stack.query("alter system set lock_timeout = '7s'", "main")
    assert listed(stack, "main") == {"work_mem": "11MB", "shared_buffers": "64MB", "lock_timeout": "7s"}
    assert "shared_buffers  64MB   after restart" in stack.text("endpoint", "config", "main")
    stack.text("endpoint", "stop", "main")
    said = stack.text("endpoint", "config", "main", "unset", "lock_timeout")
    assert said == "endpoint main: lock_timeout kept; in force at its next start\n"
    stack.text("endpoint", "start", "main")
    assert [show(stack, name, "main") for name in ("work_mem", "shared_buffers", "lock_timeout")] == [
        "11MB",
        "64MB",
        "0",
    ]
    for wrong, said in (
        ("work_mem=lots", 'invalid value for parameter "work_mem": "lots"'),
        ("worc_mem=1MB", "has no setting worc_mem; did you mean work_mem?"),
        ("hba_file=/tmp/x", "hba_file belongs to Excimer"),
    ):
        result = stack.run("endpoint", "config", "main", "set", wrong)
        assert (result.returncode, said in result.stderr) == (1, True), result.stderr
    done = stack.json("endpoint", "config", "main", "unset", "--all")
    assert (done["settings"], done["restart_pending"]) == ({}, ["shared_buffers"])


def test_no_setting_that_is_allowed_stops_commits(stack: Stack) -> None:
    timeouts = (
        "statement_timeout",
        "idle_session_timeout",
        "idle_in_transaction_session_timeout",
        "lock_timeout",
    )
    hostile = [f"{name}=1ms" for name in ("wal_sender_timeout", *timeouts)]
    stack.text("endpoint", "config", "main", "set", *hostile)
    refused = stack.run("endpoint", "config", "main", "set", "transaction_timeout=9s")
    assert "at least 10s" in refused.stderr
    role_options = "-c statement_timeout=0 -c idle_session_timeout=0 -c idle_in_transaction_session_timeout=0"
    with psycopg.connect(stack.url("main"), autocommit=True, options=role_options) as connection:
        for name in (*timeouts, "transaction_timeout"):
            connection.execute(f"alter role postgres set {name} = '1ms'".encode())
    assert stack.json("role", "list", "--endpoint", "main")["roles"]
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "start", "main")
    options = f"{role_options} -c transaction_timeout=0"
    with psycopg.connect(stack.url("main"), autocommit=True, options=options) as connection:
        connection.execute("create table written (at int)")
        for number in range(50):
            connection.execute("insert into written values (%s)", (number,))
        assert stack.json("role", "create", "unhurried", "--endpoint", "main")["url"]
        connection.execute("alter role postgres reset all")
    stack.text("endpoint", "config", "main", "unset", "--all")
    stack.wait_until(lambda: show(stack, "statement_timeout", "main") == "0", "the reload")


def test_what_cannot_be_kept_is_an_io_error(stack: Stack) -> None:
    stack.kill("controller")
    with pytest.raises(psycopg.errors.IoError, match="the setting cannot be kept: the controller is not"):
        stack.query("alter system set work_mem = '13MB'")
    stack.text("start")
    manager = stack.pid("endpoint-main")
    os.kill(manager, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(psycopg.errors.IoError, match="the endpoint's manager did not say in time"):
        stack.query("alter system set work_mem = '14MB'")
    assert time.monotonic() - begun < 15
    os.kill(manager, signal.SIGCONT)
    stack.query("alter system set work_mem = '15MB'")
    assert listed(stack, "main")["work_mem"] == "15MB"


def test_a_static_endpoint_and_a_branch_have_lists_of_their_own(stack: Stack) -> None:
    stack.query("alter system set work_mem = '15MB'")
    stack.branch("dev")
    assert listed(stack, "dev") == {}
    lsn = stack.query("select pg_current_wal_flush_lsn()")[0][0]
    stack.text("endpoint", "create", "past", "--lsn", str(lsn), "--set", "max_connections=20")
    stack.text("endpoint", "start", "past")
    stack.query("alter system set work_mem = '16MB'", "past")
    assert listed(stack, "past") == {"max_connections": "20", "work_mem": "16MB"}
    assert show(stack, "max_connections", "past") == "100", "a standby offers what its primary had"
    assert show(stack, "work_mem", "dev") == "4MB"
    for name in ("dev", "past"):
        stack.text("endpoint", "stop", name, "--immediate")


def test_a_setting_that_stops_postgres_is_named_at_once_and_does_not_loop(stack: Stack) -> None:
    """Stored by an older Excimer, or for another build: nothing that is checked today gets there.

    PostgreSQL has changed nothing then, and what the last clean stop has kept is not lost.
    """
    stack.query("create unlogged table kept as select 1")
    stack.text("endpoint", "stop", "main")
    assert stack.run("endpoint", "config", "main", "unset", "--all").returncode == 0
    for stored, said in (
        ('{"work_mem": "lots"}', "does not start with the setting work_mem"),
        ('{"shared_preload_libraries": "gone"}', "does not start with the setting shared_preload_libraries"),
        ('{"archive_mode": "on"}', "archive_mode belongs to Excimer"),
    ):
        _store(stack, stored)
        begun = time.monotonic()
        result = stack.run("endpoint", "start", "main")
        assert (result.returncode, said in result.stderr) == (1, True), result.stderr
        assert time.monotonic() - begun < 10
        [row] = [row for row in stack.json("endpoint", "list")["endpoints"] if row["name"] == "main"]
        assert (row["state"], said in row["reason"]) == ("ended", True)
    assert stack.run("endpoint", "config", "main", "unset", "--all").returncode == 0
    stack.text("endpoint", "start", "main")
    assert stack.json("endpoint", "show", "main")["start"] == "warm"
    assert stack.query("table kept") == [(1,)]


def test_a_halted_manager_is_stopped_in_seconds_and_leaves_nothing(stack: Stack) -> None:
    postgres, sockets = stack.postmaster_pid(), stack.data_dir().parent / "settings.sock"
    places = locate_places(stack.directory / "endpoints" / "main")
    assert sockets.exists()
    assert places.socket_dir.exists()
    os.kill(stack.pid("endpoint-main"), signal.SIGSTOP)
    begun = time.monotonic()
    stack.text("endpoint", "stop", "main")
    assert time.monotonic() - begun < 10
    with contextlib.suppress(FileNotFoundError):  # nobody may have waited for it yet
        assert Path(f"/proc/{postgres}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    for left in (places.socket_dir, places.data_dir, places.arena, sockets):
        assert not left.exists()
    begun_at = stack.json("endpoint", "restart", "main")
    assert (begun_at["was_running"], stack.query("select 1")) == (False, [(1,)])


def test_an_endpoint_of_a_moment_ago_and_of_a_program(stack: Stack) -> None:
    """Not so many seconds ago: how long it takes until the command reads its clock is unknown."""
    stack.query("create table moments as select 1")
    moment = stack.query("select clock_timestamp()")[0][0]
    stack.query("drop table moments")
    stack.json("endpoint", "create", "ago", "--at", moment.isoformat())
    assert stack.json("endpoint", "restart", "ago")["mode"] == "static"
    assert stack.query("select count(*) from moments", "ago") == [(1,)]
    assert "database system is ready" in stack.text("endpoint", "logs", "ago", "--postgres")
    assert "ready" in stack.text("endpoint", "logs", "ago", "--json")
    stack.text("endpoint", "stop", "ago", "--immediate", "--destroy")
    assert stack.text("pg", "exec", "14", "pg_dump", "--version").startswith("pg_dump (PostgreSQL) 14")
    assert stack.text("pg", "exec", "psql", "-V").startswith("psql (PostgreSQL) 18")


def _store(stack: Stack, settings: str) -> None:
    database = sqlite3.connect(stack.directory / "controller" / "metadata.sqlite")
    with database:
        database.execute("UPDATE endpoint SET postgres_settings = ? WHERE name = 'main'", (settings,))
    database.close()
