"""A bounded cache: data ten times its size work, the disk stays bounded, and no page is ever a wrong one.

`EXCIMER_CACHE_VERSIONS` names versions of PostgreSQL; by default the newest.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from excimer.compute.places import locate_places
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_CACHE_VERSIONS", str(NEWEST_VERSION)).split(",")]
CACHE_MIB = 16
SCALE = 11
"""Of pgbench:"""
DATA_MIB = 165
MIB = 1 << 20
WAIT_S = 120.0
MIX = """
\\set id random(1, 100000 * :scale)
update pgbench_accounts set abalance = abalance + 1 where aid = :id;
insert into churn(k, note) values (:id, repeat('c', :id % 300));
delete from churn where k = :id - 1;
select nextval('churn_seq');
select count(*) from pgbench_accounts where aid between :id and :id + 200;
"""
SCHEMA = """
create table churn(id serial primary key, k int, note text);
create sequence churn_seq;
create unlogged table forgotten as select g, repeat('u', 500) as note from generate_series(1, 2000) g;
create index on forgotten(g);
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def data_dir(stack: Stack, name: str = "main") -> Path:
    return locate_places(stack.directory / "endpoints" / name).data_dir


def metrics(stack: Stack, name: str = "main") -> dict[str, float]:
    port = stack.endpoint(name)["http_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {key: float(value) for key, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


def allocated(stack: Stack, name: str = "main") -> int:
    """Bytes of the main forks of relations on the disk, without those of unlogged relations."""
    total = 0
    for directory in (data_dir(stack, name) / "base").iterdir():
        names = set(os.listdir(directory))
        for entry in names:
            if re.fullmatch(r"[0-9]+(\.[0-9]+)?", entry) and entry.split(".")[0] + "_init" not in names:
                total += (directory / entry).stat().st_blocks * 512
    return total


class Watcher:
    """Looks at the disk for as long as the block runs."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most = 0

    def _watch(self) -> None:
        while not self._is_over.wait(0.05):
            try:
                self.most = max(self.most, allocated(self._stack))
            except FileNotFoundError:
                continue

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def verified(stack: Stack, name: str = "main") -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(stack.run("--json", "verify", name).stdout)
    return answer


def assert_right(stack: Stack) -> None:
    answer = verified(stack)
    assert answer["differences"] == [], json.dumps(answer["differences"][:10], indent=1)


@contextmanager
def load(stack: Stack, root: Path) -> Iterator["subprocess.Popen[str]"]:
    """Clients that update, insert, delete and read a little everywhere, until the block ends."""
    script = root / "mix.sql"
    script.write_text(MIX)
    process = stack.program("pgbench", "-n", "-c", "3", "-T", "600", "-f", str(script))
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def scan(stack: Stack) -> None:
    assert stack.query("select count(filler) from pgbench_accounts") == [(SCALE * 100000,)]


def evicted(stack: Stack) -> float:
    return metrics(stack)["excimer_cache_evicted_total"]


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param) as running:
        running.text("tenant", "create", "--set-default")
        running.text(
            *("endpoint", "create", "main", "--suspend-after", "never", "--cache-size", f"{CACHE_MIB}MB"),
            *("--set", "shared_buffers=8MB", "--set", "max_wal_size=64MB", "--set", "autovacuum_naptime=2s"),
        )
        running.text("endpoint", "start", "main")
        running.check_program("pgbench", "-i", "-q", "-s", str(SCALE))
        for statement in SCHEMA.strip().split(";\n"):
            running.query(statement.rstrip(";"))
        yield running


def test_ten_times_the_cache(stack: Stack, tmp_path: Path) -> None:
    """What one big COPY wrote is brought within the bound; what is read and written then stays there."""
    wait_until(lambda: 0 < metrics(stack)["excimer_cache_used_bytes"] <= CACHE_MIB * MIB)
    unlogged = stack.query("select count(*), sum(g) from forgotten")
    before = evicted(stack)
    with Watcher(stack) as watcher, load(stack, tmp_path) as process:
        for _ in range(3):
            scan(stack)
            stack.query("vacuum churn")
        assert process.poll() is None
    assert evicted(stack) - before > 2 * CACHE_MIB * MIB / 8192
    assert watcher.most < DATA_MIB * MIB / 2
    wait_until(lambda: metrics(stack)["excimer_cache_used_bytes"] <= CACHE_MIB * MIB)
    assert stack.query("select count(*), sum(g) from forgotten") == unlogged
    assert_right(stack)


def test_it_is_shown(stack: Stack) -> None:
    rows = stack.query("select name, setting from pg_settings where name like 'excimer.cache%'")
    shown = {str(name): str(setting) for name, setting in rows}
    assert shown["excimer.cache_size"] == str(CACHE_MIB * MIB)
    assert int(shown["excimer.cache_used"]) > 0
    assert int(shown["excimer.cache_evicted"]) > 0
    assert 0 < int(shown["excimer.cache_misses"]) < int(shown["excimer.cache_reads"])
    assert 0 < float(shown["excimer.cache_hit_rate"]) < 1
    assert stack.endpoint("main")["cache_size_mib"] == CACHE_MIB
    assert "16MB" in stack.text("endpoint", "list")
    assert re.search(r"cache size +16MB", stack.text("endpoint", "show", "main"))


def test_what_is_in_no_wal_stays_whole(stack: Stack) -> None:
    """Unlogged relations have no hole where PostgreSQL wrote; evictions went on beside them."""
    paths = [
        path
        for name in ("forgotten", "forgotten_g_idx")
        for ((path,),) in [stack.query(f"select pg_relation_filepath('{name}')")]
    ]
    before = evicted(stack)
    stack.query("checkpoint")
    scan(stack)
    wait_until(lambda: evicted(stack) > before)
    for path in paths:
        status = (data_dir(stack) / str(path)).stat()
        assert status.st_blocks * 512 >= status.st_size > 0


def test_a_bound_changes_while_it_runs(stack: Stack) -> None:
    assert "24MB" in stack.text("endpoint", "cache", "main", "24MB")
    wait_until(lambda: metrics(stack)["excimer_cache_size_bytes"] == 24 * MIB)
    stack.text("endpoint", "cache", "main", f"{CACHE_MIB}MB")
    assert "is not a cache size" in stack.run("endpoint", "cache", "main", "7").stderr
    assert "16 MiB" in stack.run("endpoint", "cache", "main", "7MB").stderr


def test_rows_of_a_transaction_that_wrote_more_than_the_cache(stack: Stack) -> None:
    """Its own commands are told apart by numbers that are in no WAL: such pages must wait for its end."""
    with stack.connect() as connection, connection.transaction():
        connection.execute("create table own(id int, n int)")
        connection.execute("insert into own select g, 0 from generate_series(1, 250000) g")
        for _ in range(2):
            connection.execute("update own set n = n + 1")
        scan(stack)
        row = connection.execute("select count(*), min(n), max(n) from own").fetchone()
        assert row == (250000, 2, 2)
    stack.query("drop table own")


@pytest.mark.parametrize("victim", ["pageserver", "postgres", "manager"])
def test_a_death_in_the_middle_of_evictions(stack: Stack, tmp_path: Path, victim: str) -> None:
    stack.query("create table if not exists kept(id serial primary key, n int)")
    before = evicted(stack)
    with load(stack, tmp_path):
        scan(stack)
        wait_until(lambda: evicted(stack) > before)
        (acknowledged,) = stack.query("insert into kept(n) values (1) returning id")[0]
        if victim == "postgres":
            os.kill(stack.postmaster_pid(), signal.SIGKILL)
        elif victim == "manager":
            stack.kill("endpoint-main")
        else:
            os.kill(stack.pid("pageserver"), signal.SIGKILL)
    if victim == "manager":
        stack.text("endpoint", "start", "main")
    stack.wait_until(stack.accepts, "answers")
    scan(stack)
    assert stack.query(f"select n from kept where id = {acknowledged}") == [(1,)]
    wait_until(lambda: metrics(stack)["excimer_cache_used_bytes"] <= CACHE_MIB * MIB)
    assert_right(stack)
