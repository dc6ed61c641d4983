"""Page truth (S1) end to end: thousands of (page, LSN) pairs over a whole run of a real installation.

Everything happens that PostgreSQL can do to pages, while endpoint, pageserver and postgres stop and die; what
the page service then says about moments of the whole run is what stock servers, recovered to those moments
from a safekeeper's WAL, have on disk. `EXCIMER_TRUTH_LSNS`, `EXCIMER_TRUTH_PAGES` and `EXCIMER_TRUTH_SEED`
make it a longer sweep, or another one.
"""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.cli.commands.endpoint import create_endpoint
from excimer.cli.installation import load_installation
from excimer.pgformat.wal_record import Rmgr
from tests.kit import ingest_workload, redo_workload
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory
from tests.kit.page_truth import Comparison, recover
from tests.kit.stack import Stack, running_stack
from tests.kit.stack_truth import (
    Branch,
    EndpointServer,
    StackHistory,
    branch_of,
    compare_stack,
    compare_with,
    stack_history,
)

LSNS = int(os.environ.get("EXCIMER_TRUTH_LSNS", "8"))
PAGES = int(os.environ.get("EXCIMER_TRUTH_PAGES", "400"))
SEED = int(os.environ.get("EXCIMER_TRUTH_SEED", "1"))
ARRIVAL_TIMEOUT_S = 60.0
RATE = 100
"""Transactions per second of pgbench: the run needs its records, not their number."""

SETTINGS = {
    "max_prepared_transactions": "10",
    "track_commit_timestamp": "on",
    "autovacuum_naptime": "2s",
    "checkpoint_timeout": "30s",
    "wal_compression": "pglz",
}

XIDS = """
do $$ begin
  for i in 1..33000 loop
    begin insert into subxact_t values (-i); exception when raise_exception then null; end;
  end loop;
end $$;
"""
"""More than a page of pg_xact holds, all named by one commit record."""

AFTER_RESTART = """
commit prepared 'left';
rollback prepared 'left as well';
create database after_restart template origin strategy file_copy;
truncate truncated_t;
insert into truncated_t select g, 'after the restart' from generate_series(1, 2000) g;
drop table copied_t;
begin; insert into subxact_t values (2001); savepoint a; insert into subxact_t values (2002);
prepare transaction 'over the crash';
"""
AFTER_CRASH = """
commit prepared 'over the crash';
alter table gist_t set tablespace pg_default;
vacuum full heap_t;
cluster child_t using child_t_pkey;
reindex database postgres;
"""


class Run:
    """The finished run, all of whose WAL the pageserver has, and what a stock server makes of it."""

    def __init__(self, stack: Stack, branch: Branch, history: StackHistory, root: Path) -> None:
        self.stack = stack
        self.branch = branch
        self.history = history
        self.root = root


@contextlib.contextmanager
def pgbench(stack: Stack, seconds: int) -> Iterator["subprocess.Popen[str]"]:
    arguments = ["-n", "-c", "3", "-R", str(RATE), "-T", str(seconds)]
    process = stack.program("pgbench", *arguments)
    try:
        time.sleep(0.5)
        yield process
        process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()


def live(stack: Stack, root: Path) -> None:
    """The run: about 40 seconds."""
    body = {
        "name": "main",
        "tenant": "",
        "branch": "main",
        "mode": "primary",
        "lsn": None,
        "pg_version": None,
        "postgres_settings": SETTINGS,
    }
    create_endpoint(load_installation(stack.directory), body, None)
    stack.text("endpoint", "start", "main")
    server = EndpointServer(stack, root)
    stack.check_program("pgbench", "-i", "-q", "-s", "1")
    with pgbench(stack, 8) as load:
        ingest_workload.run(server)
        stack.kill("pageserver")
        stack.text("start")
        assert load.wait(60) == 0, "the pageserver's death is seen by nobody"
    arrive(branch_of(stack), parse_lsn(server.sql("select pg_current_wal_flush_lsn()")[0][0]))
    branch_of(stack).flush()
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "start", "main")
    with pgbench(stack, 6):
        server.sql("drop database copy_1")
        server.sql(AFTER_RESTART)
        server.sql(XIDS)
        server.sql(redo_workload.ROUND.format(round=3))
        stack.kill("pageserver")
        os.kill(stack.postmaster_pid(), signal.SIGKILL)
        stack.text("start")
    stack.wait_until(lambda: stack.accepts(), "a fresh start after postgres was killed")
    server.sql(AFTER_CRASH)
    stack.text("endpoint", "stop", "main")


def arrive(branch: Branch, lsn: Lsn) -> None:
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    while parse_lsn((known := branch.at_pageserver())["last_record_lsn"]) < lsn:
        assert time.monotonic() < deadline, f"{format_lsn(lsn)} did not arrive: {known}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished() -> Iterator[Run]:
    with running_stack(NEWEST_VERSION) as stack, reachable_directory() as root:
        stack.text("tenant", "create", "--set-default")
        live(stack, root)
        branch = branch_of(stack)
        history = stack_history(branch, build_of(NEWEST_VERSION), root)
        arrive(branch, history.record_ends[-1])
        yield Run(stack, branch, history, root)


@pytest.mark.slow
def test_the_run_was_worth_comparing(finished: Run) -> None:
    """Every resource manager wrote, three proposers were elected, and most of it lies in layers."""
    idle = {Rmgr.TBLSPC, Rmgr.REPLORIGIN}
    assert [manager for manager in Rmgr if manager not in finished.history.managers() | idle] == []
    assert finished.branch.at_safekeeper(1)["term"] >= 3
    middle = finished.history.start_lsn + len(finished.history.wal) // 3
    assert parse_lsn(finished.branch.at_pageserver()["disk_consistent_lsn"]) > middle


@pytest.mark.slow
def test_pages_of_the_whole_run_are_a_stock_servers(finished: Run) -> None:
    *ends, last = finished.history.record_ends
    lsns = [*sorted(random.Random(SEED).sample(ends, LSNS)), last]
    result = asyncio.run(compare_stack(finished.branch, finished.history, finished.root, lsns, PAGES, SEED))
    assert_equal(result, pages=PAGES * len(lsns))


@pytest.mark.slow
def test_a_branch_in_the_past_is_what_a_stock_server_was_then(finished: Run) -> None:
    """S2: read through the ancestor, which has gone on."""
    lsn = random.Random(SEED + 1).choice(finished.history.record_ends)
    finished.stack.text("timeline", "branch", "--branch-name", "past", "--at", format_lsn(lsn))
    branch = branch_of(finished.stack, "past")
    result = asyncio.run(compare_stack(branch, finished.history, finished.root, [lsn], PAGES, SEED))
    assert_equal(result, pages=PAGES)


@pytest.mark.slow
def test_a_page_that_differs_is_told_with_its_records(finished: Run) -> None:
    """The present is compared with a server of an earlier moment: the comparison must notice."""
    ends = finished.history.record_ends
    earlier = recover(finished.history, ends[len(ends) // 2], finished.root / "earlier")
    result = asyncio.run(compare_with(finished.branch, finished.history, earlier, ends[-1], 200, SEED))
    pages = [told for told in result.wrong if f"at {format_lsn(ends[-1])} page relation block" in told]
    assert len(pages) > 5
    assert all("bytes differ from" in told or "file ends before it" in told for told in pages)
    assert any(" manager " in told for told in pages)


def assert_equal(result: Comparison, *, pages: int) -> None:
    told = "\n".join(result.wrong[:40])
    assert not result.wrong, f"{len(result.wrong)} differences, seed {SEED}:\n{told}"
    assert result.compared["page"] == pages
    assert all(result.compared[kind] >= 5 for kind in ("size", "SLRU page", "file", "field"))
