"""What a superuser can say in SQL does not make a compute acknowledge what the quorum does not have (D1)."""

import contextlib
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.io.processes import make_owned_dir
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION) as stack:
        stack.create_main()
        yield stack


def test_alter_system_cannot_end_the_wait_for_the_quorum(stack: Stack) -> None:
    for change in ("synchronous_standby_names = ''", "restart_after_crash = on"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="belongs to Excimer"):
            stack.query(f"alter system set {change}")
    stack.query("select pg_reload_conf()")
    stack.query("select pg_sleep(0.3)")
    assert stack.query("show synchronous_standby_names") == [("excimer_proposer",)]
    assert stack.query("show restart_after_crash") == [("off",)]


def test_a_commit_that_waits_for_the_quorum_cannot_be_cancelled_into_success(stack: Stack) -> None:
    stack.query("create table cancelled(a int)")
    acknowledged = threading.Event()

    def commit() -> None:
        stack.query("insert into cancelled values (1)")
        acknowledged.set()

    stack.kill("safekeeper-1")
    stack.kill("safekeeper-2")
    writer = threading.Thread(target=commit)
    writer.start()
    waiting = "select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'"
    stack.wait_until(lambda: bool(stack.query(waiting)), "a commit that waits")
    for _ in range(3):
        assert not acknowledged.wait(0.5), "a cancelled wait was answered with COMMIT (D1)"
        assert stack.query(waiting) == [(True,)]
    stack.text("start")
    writer.join(30)
    assert acknowledged.is_set()
    with stack.connect() as connection:
        connection.execute("set statement_timeout = '200ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("select pg_sleep(20)")


def test_unlogged_tables_are_empty_after_an_unclean_stop_and_usable(stack: Stack) -> None:
    stack.query("create unlogged table scratch(a int)")  # its init fork has no block
    stack.query("create unlogged table keyed(a int primary key)")
    for table in ("scratch", "keyed"):
        stack.query(f"insert into {table} select generate_series(1, 100)")
    stack.text("endpoint", "stop", "main", "--immediate")
    stack.text("endpoint", "start", "main")
    for table in ("scratch", "keyed"):
        assert stack.query(f"select count(*) from {table}") == [(0,)]
        stack.query(f"insert into {table} values (1)")


def test_user_tablespaces_are_refused_before_anything_is_written(stack: Stack) -> None:
    """Their relations would not come back at the next start."""
    location = Path("/tmp") / f"excimer-tablespace-{secrets.token_hex(8)}"
    make_owned_dir(location)
    try:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="tablespaces are not supported"):
            stack.query(f"create tablespace elsewhere location '{location}'")
        with stack.connect() as connection:
            connection.execute("set allow_in_place_tablespaces = on")
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="tablespaces are not supported"):
                connection.execute("create tablespace in_place location ''")
    finally:
        shutil.rmtree(location)
    assert stack.query("select count(*) from pg_tablespace") == [(2,)]


def test_a_promoted_static_endpoint_acknowledges_nothing(stack: Stack) -> None:
    stack.query("create table kept(a int)")
    [[lsn]] = stack.query("select pg_current_wal_insert_lsn()::text")
    stack.text("endpoint", "create", "past", "--lsn", lsn)
    stack.text("endpoint", "start", "past")
    stack.query("select pg_promote()", "past")
    acknowledged = threading.Event()

    def commit() -> None:
        with contextlib.suppress(psycopg.Error):  # its server is stopped before it answers
            stack.query("insert into kept values (1)", "past")
            acknowledged.set()

    threading.Thread(target=commit, daemon=True).start()
    assert not acknowledged.wait(2)
    stack.text("endpoint", "stop", "past", "--destroy", "--immediate")
    assert not acknowledged.is_set()
    assert stack.query("select count(*) from kept") == [(0,)]
