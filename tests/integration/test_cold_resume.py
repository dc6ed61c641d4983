"""A cold start after a clean stop: nothing of the directory is left, and the endpoint is as a restarted
PostgreSQL.

What WAL does not carry comes from the state that the stop saved. EXCIMER_COLD_VERSIONS chooses the versions.
"""

import json
import os
import signal
from collections.abc import Iterator

import psycopg
import pytest

from excimer.compute.arena import Arena, Miss
from excimer.compute.places import locate_places
from tests.kit.builds import ALL_VERSIONS
from tests.kit.stack import Row, Stack, running_stack

VERSIONS = tuple(map(int, os.environ.get("EXCIMER_COLD_VERSIONS", "14,18").split(",")))


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    assert request.param in ALL_VERSIONS
    with running_stack(request.param, safekeepers=1) as stack:
        stack.text("tenant", "create", "--set-default")
        yield stack


@pytest.fixture
def name(stack: Stack, request: pytest.FixtureRequest) -> Iterator[str]:
    """An endpoint on a branch of its own, running."""
    name = request.node.name.removeprefix("test_").partition("[")[0].replace("_", "-")[:40]
    stack.branch(name)
    yield name
    stack.run("endpoint", "stop", name, "--destroy")


def restart_cold(stack: Stack, name: str) -> None:
    stack.text("endpoint", "stop", name)
    stack.evict(name)
    stack.text("endpoint", "start", name)


def log_of(stack: Stack, name: str) -> str:
    return stack.text("endpoint", "logs", name)


def one(stack: Stack, statement: str, name: str) -> object:
    return stack.query(statement, name)[0][0]


@pytest.mark.parametrize("stack", VERSIONS[-1:], indirect=True)
def test_tables_do_not_grow_over_suspends(stack: Stack, name: str) -> None:
    """Free space that VACUUM found is used. Each round puts back as many rows as it deleted, so that a lost
    map would cost a fifth of the table each time.
    """
    with stack.connect(name) as connection:
        connection.execute("create table t (a int, pad text) with (autovacuum_enabled = off)")
        connection.execute("insert into t select g, repeat('x', 200) from generate_series(1, 20000) g")
        connection.execute("delete from t where a % 5 = 4")
        connection.execute("vacuum t")
        connection.execute("create extension pg_freespacemap")
    size = "select pg_relation_size('t') / 8192"
    free = "select sum(avail) from pg_freespace('t')"
    blocks, free_bytes = one(stack, size, name), one(stack, free, name)
    assert isinstance(blocks, int)
    assert isinstance(free_bytes, int)
    restart_cold(stack, name)
    assert one(stack, free, name) == free_bytes
    for turn in range(20):
        with stack.connect(name) as connection:
            connection.execute(f"delete from t where a % 5 = {turn % 5}")
            connection.execute("vacuum t")
        restart_cold(stack, name)
        rows = f"select g, repeat('y', 200) from generate_series(1, 20000) g where g % 5 = {turn % 5}"
        stack.query(f"insert into t {rows}", name)
    grown = one(stack, size, name)
    assert isinstance(grown, int)
    assert grown <= blocks * 110 / 100, f"{blocks} blocks have become {grown}"


def counters(connection: "psycopg.Connection[Row]") -> list[Row]:
    """What the table's cumulative statistics say, autovacuum's decision included."""
    return connection.execute(
        "select n_live_tup, n_dead_tup, n_mod_since_analyze, n_tup_ins, n_tup_del from pg_stat_user_tables"
        " where relname = 't'"
    ).fetchall()


def test_statistics_are_kept_and_autovacuum_comes(stack: Stack, name: str) -> None:
    with stack.connect(name) as connection:
        connection.execute("create table t (a int) with (autovacuum_vacuum_threshold = 900)")
        connection.execute("alter table t set (autovacuum_vacuum_scale_factor = 0)")
        connection.execute("insert into t select generate_series(1, 2000)")
        connection.execute("delete from t where a <= 500")
        stack.wait_until(lambda: counters(connection)[0][4] == 500, "the delete is counted")
        before = counters(connection)
    restart_cold(stack, name)
    with stack.connect(name) as connection:
        assert counters(connection) == before
        connection.execute("delete from t where a <= 1000")  # with those of before, past the threshold
    stack.text("endpoint", "config", name, "set", "autovacuum_naptime=1s")
    vacuumed = "select last_autovacuum is not null from pg_stat_user_tables where relname = 't'"
    stack.wait_until(lambda: one(stack, vacuumed, name) is True, "autovacuum")


def test_unlogged_tables_and_sequences_are_exact(stack: Stack, name: str) -> None:
    with stack.connect(name) as connection:
        connection.execute("create unlogged table u (a int primary key, pad text)")
        connection.execute("insert into u select g, repeat('u', 50) from generate_series(1, 5000) g")
        connection.execute("create sequence s")
        connection.execute("select nextval('s') from generate_series(1, 5)")
        connection.execute("create unlogged table big (pad text)")
        connection.execute("alter table big alter pad set storage plain")
        connection.execute("insert into big select repeat(md5(g::text), 100) from generate_series(1, 6000) g")
    restart_cold(stack, name)
    assert stack.query("select count(*), sum(a) from u", name) == [(5000, 12502500)]
    assert one(stack, "select a from u where a = 4711", name) == 4711
    assert one(stack, "select nextval('s')", name) == 6
    assert one(stack, "select count(*) from big", name) == 0  # more than a state may hold of such
    stack.query("insert into big values ('works')", name)
    assert "unlogged relations base/" in log_of(stack, name)
    restart_cold(stack, name)  # again, with a sequence that has only been read
    assert one(stack, "select last_value from s", name) == 6
    assert one(stack, "select nextval('s')", name) == 7
    assert one(stack, "select count(*) from big", name) == 1
    with stack.connect(name) as connection:
        connection.execute("insert into u values (5001, 'x')")
        connection.execute("select nextval('s')")
        connection.execute("create table durable ()")
    stack.kill(f"endpoint-{name}")
    stack.text("endpoint", "start", name)
    assert one(stack, "select count(*) from u", name) == 0  # PostgreSQL's own promise after a crash
    after = one(stack, "select nextval('s')", name)
    assert isinstance(after, int)
    assert 8 < after <= 8 + 33


def test_unlogged_rows_of_before_the_start_do_not_come_back_after_a_crash(stack: Stack, name: str) -> None:
    """What changed them since is in no WAL, which may still end where it did at the start."""
    safekeeper = stack.pid("safekeeper-1")
    stack.query("create unlogged table u (a int)", name)
    for is_cold in (False, True):
        stack.query("insert into u select generate_series(1, 100)", name)
        stack.text("endpoint", "stop", name)
        if is_cold:
            stack.evict(name)
        stack.text("endpoint", "start", name)
        os.kill(safekeeper, signal.SIGSTOP)
        try:
            assert one(stack, "select count(*) from u", name) == 100
            stack.query("delete from u", name)
            stack.kill(f"endpoint-{name}")
        finally:
            os.kill(safekeeper, signal.SIGCONT)
        stack.text("endpoint", "start", name)
        assert one(stack, "select count(*) from u", name) == 0


def test_a_stop_succeeds_when_nothing_can_be_saved(stack: Stack, name: str) -> None:
    with stack.connect(name) as connection:
        connection.execute("create table t as select generate_series(1, 100) as a")
        connection.execute("create unlogged table u as select generate_series(1, 100) as a")
    stack.kill("pageserver")
    stack.text("endpoint", "stop", name)
    assert "what WAL does not carry was not saved" in log_of(stack, name)
    stack.evict(name)
    stack.text("start")
    stack.text("endpoint", "start", name)
    assert one(stack, "select count(*) from t", name) == 100
    assert one(stack, "select count(*) from u", name) == 0  # as after a crash


def test_slots_give_what_was_not_taken(stack: Stack, name: str) -> None:
    stack.text("endpoint", "config", name, "set", "wal_level=logical")
    stack.text("endpoint", "restart", name)
    with stack.connect(name) as connection, stack.connect(name) as other:
        connection.execute("create table t (a int primary key)")
        connection.execute("select pg_create_logical_replication_slot('mine', 'test_decoding')")
        connection.execute("select pg_create_physical_replication_slot('bytes', true)")
        connection.execute("insert into t values (1)")
        taken = connection.execute("select count(*) from pg_logical_slot_get_changes('mine', null, null)")
        assert taken.fetchall()[0][0] > 0
        other.autocommit = False
        other.execute("insert into t values (2)")  # open where the slot will begin to read again
        connection.execute("insert into t values (3)")
        connection.execute("checkpoint")
        connection.execute("select count(*) from pg_logical_slot_get_changes('mine', null, null)")
        other.commit()
        connection.execute("insert into t values (4)")
    for _ in range(2):
        restart_cold(stack, name)
        slots = "select slot_name, restart_lsn is not null from pg_replication_slots where slot_name <> %s"
        with stack.connect(name) as connection:
            found = connection.execute(f"{slots} order by 1".encode(), ["excimer_proposer"]).fetchall()
        assert found == [("bytes", True), ("mine", True)]
    changes = "select data from pg_logical_slot_get_changes('mine', null, null) where data like 'table %'"
    got = [row[0].rpartition(":")[2] for row in stack.query(changes, name)]
    assert got == ["2", "4"]
    stack.query("insert into t values (5)", name)
    assert [row[0].rpartition(":")[2] for row in stack.query(changes, name)] == ["5"]


def test_a_slot_that_needs_more_than_a_state_may_hold_is_there(stack: Stack, name: str) -> None:
    stack.text("endpoint", "config", name, "set", "wal_level=logical")
    stack.text("endpoint", "restart", name)
    with stack.connect(name) as connection:
        connection.execute("select pg_create_logical_replication_slot('far_behind', 'test_decoding')")
        connection.execute("create table t as select md5(g::text) from generate_series(1, 1200000) g")
        connection.execute("select pg_create_logical_replication_slot('near', 'test_decoding')")
    restart_cold(stack, name)
    slots = "select slot_name from pg_replication_slots where plugin is not null order by 1"
    assert stack.query(slots, name) == [("far_behind",), ("near",)]
    assert "replication slot far_behind" not in log_of(stack, name)


def test_a_branch_gets_facts_and_neither_slots_nor_unlogged_rows(stack: Stack, name: str) -> None:
    with stack.connect(name) as connection:
        connection.execute("create extension pg_freespacemap")
        connection.execute("create table t (a int, pad text) with (autovacuum_enabled = off)")
        connection.execute("insert into t select g, repeat('x', 200) from generate_series(1, 5000) g")
        connection.execute("delete from t where a % 2 = 0")
        connection.execute("vacuum t")
        connection.execute("create unlogged table u as select 1 as a")
        connection.execute("create unlogged table empty (a int primary key)")
        connection.execute("create sequence s")
        connection.execute("select nextval('s')")
        connection.execute("select pg_create_physical_replication_slot('bytes', true)")
        free = connection.execute("select sum(avail) from pg_freespace('t')").fetchall()
        stack.wait_until(lambda: counters(connection)[0][4] == 2500, "the delete is counted")
        before = counters(connection)
    stack.text("endpoint", "stop", name)
    stack.text("timeline", "branch", "--branch-name", "child", "--ancestor", name)
    stack.text("endpoint", "start", name)
    stack.query("insert into t values (1)", name)
    stack.text("endpoint", "stop", name)  # its next state does not take away what the branch begins with
    stack.text("endpoint", "create", "child", "--branch-name", "child")
    stack.text("endpoint", "start", "child")
    with stack.connect("child") as connection:
        assert connection.execute("select sum(avail) from pg_freespace('t')").fetchall() == free
        assert counters(connection) == before
        assert connection.execute("select nextval('s')").fetchall() == [(2,)]
        assert connection.execute("select count(*) from u").fetchall() == [(0,)]
        assert connection.execute("select count(*) from empty").fetchall() == [(0,)]
        connection.execute("insert into empty values (1)")
        slots = "select count(*) from pg_replication_slots where slot_name = 'bytes'"
        assert connection.execute(slots).fetchall() == [(0,)]
    stack.text("endpoint", "stop", "child", "--destroy")


def fetched_entries(stack: Stack, name: str) -> list[dict[str, object]]:
    lines = (stack.directory / "logs" / f"endpoint-{name}.log").read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in entries if entry["event"] == "hot blocks are fetched"]


def misses_of_a_scan(stack: Stack, name: str) -> list[Miss]:
    """Of the table t and its index: who waited for their blocks since the start."""
    with stack.connect(name) as connection:
        connection.execute("set max_parallel_workers_per_gather = 0")
        assert connection.execute("select count(*), sum(a) from t").fetchall() == [(20000, 200010000)]
        connection.execute("set enable_seqscan = off")
        connection.execute("select * from t where a = 4711")
        path = "select pg_relation_filepath('t'), pg_relation_filepath('t_pkey')"
        paths = connection.execute(path).fetchall()[0]
    arena = Arena.open(locate_places(stack.directory / "endpoints" / name).arena)
    try:
        return [miss for miss in arena.misses() if miss.path in paths]
    finally:
        arena.close()


def test_hot_blocks_are_fetched_before_anybody_asks(stack: Stack, name: str) -> None:
    with stack.connect(name) as connection:
        connection.execute("create table t (a int primary key, pad text)")
        connection.execute("insert into t select g, repeat('t', 200) from generate_series(1, 20000) g")
        connection.execute("vacuum t")
    for starts in (1, 2):  # of blocks that PostgreSQL wrote, and of blocks that it only read
        restart_cold(stack, name)
        stack.wait_until(lambda: len(fetched_entries(stack, name)) == starts, "prefetch")  # noqa: B023
        assert fetched_entries(stack, name)[-1]["end"] == "all of it is here"
        assert misses_of_a_scan(stack, name) == []
    stack.kill(f"endpoint-{name}")
    stack.text("endpoint", "start", name)
    stack.wait_until(lambda: len(fetched_entries(stack, name)) == 3, "prefetch after a crash")
    assert misses_of_a_scan(stack, name) == []
    stack.text("endpoint", "stop", name)
    stack.text("endpoint", "start", name)  # warm: all is there
    assert misses_of_a_scan(stack, name) == []
    assert len(fetched_entries(stack, name)) == 3
