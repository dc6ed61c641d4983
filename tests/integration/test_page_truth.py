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
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.cli.commands.endpoint import create_endpoint
from excimer.cli.installation import load_installation
from excimer.pgformat.wal_record import Rmgr
from excimer.wire.auth import KeyPair
from tests.kit import ingest_workload, redo_workload
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory
from tests.kit.kept_wal import KeptWal
from tests.kit.page_truth import Comparison, recover
from tests.kit.pageservers import PageserverProcess
from tests.kit.stack import Stack, running_stack
from tests.kit.stack_truth import (
    Branch,
    EndpointServer,
    Moments,
    StackHistory,
    arrive,
    branch_of,
    compare_stack,
    compare_with,
    stack_history,
)

LSNS = int(os.environ.get("EXCIMER_TRUTH_LSNS", "8"))
PAGES = int(os.environ.get("EXCIMER_TRUTH_PAGES", "400"))
FEWER_PAGES = PAGES // 2
"""At moments that are compared again and again."""
SEED = int(os.environ.get("EXCIMER_TRUTH_SEED", "1"))
RATE = 100
"""Transactions per second of pgbench: the run needs its records, not their number."""

SETTINGS = {
    "max_prepared_transactions": "10",
    "track_commit_timestamp": "on",
    "autovacuum_naptime": "2s",
    "checkpoint_timeout": "30s",
    "wal_compression": "pglz",
}

SMALL_LAYERS = {
    "flush_size_bytes": 3 << 20,
    "compaction_threshold": 2,
    "compaction_target_size_bytes": 1 << 20,
    "image_creation_threshold": 2,
}
"""Of the tenant: the run is flushed, merged and turned into images many times while it goes on."""

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
rollback prepared 'of an origin, left';
rollback prepared 'long and left';
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
    stack.stop_and_forget()
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


@pytest.fixture(scope="module")
def finished() -> Iterator[Run]:
    with running_stack(NEWEST_VERSION) as stack, reachable_directory() as root:
        stack.text("tenant", "create", "--set-default")
        branch = branch_of(stack)
        branch.configure(**SMALL_LAYERS)
        with KeptWal(branch.wal_dir(1), root / "kept") as kept:
            live(stack, root)
            history = stack_history(branch, build_of(NEWEST_VERSION), root, kept)
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


class Chosen(NamedTuple):
    """Moments of the run, in order; what is not held below the cutoff is to go."""

    leased: Lsn
    branched: Lsn
    gone: Lsn
    cutoff: Lsn
    later: Lsn
    last: Lsn

    @property
    def kept_in_main(self) -> list[Lsn]:
        return [lsn for lsn in self if lsn != self.gone]


class Compacted(NamedTuple):
    run: Run
    moments: Moments
    chosen: Chosen


class Collected(NamedTuple):
    run: Run
    moments: Moments
    chosen: Chosen
    past: Branch
    """A branch at `chosen.branched`."""
    outcome: dict[str, Any]

    def assert_kept(self, branch: Branch) -> None:
        """All that is retained is still a stock server's. `branch`: the main one, at any pageserver."""
        past = branch._replace(timeline_id=self.past.timeline_id)
        lsns = self.chosen.kept_in_main
        assert_equal(compare(self.moments, branch, lsns), pages=FEWER_PAGES * len(lsns))
        assert_equal(compare(self.moments, past, [self.chosen.branched]), pages=FEWER_PAGES)


def compare(moments: Moments, branch: Branch, lsns: list[Lsn]) -> Comparison:
    return asyncio.run(moments.compare(branch, lsns, FEWER_PAGES, SEED))


@pytest.fixture(scope="module")
def compacted(finished: Run) -> Compacted:
    """Everything is in merged layers and in images, and all history is still there."""
    ends = finished.history.record_ends
    chance = random.Random(SEED + 2)
    # Held moments lie far below the cutoff, so that there is something between that nobody needs.
    places = ((0.05, 0.1), (0.15, 0.2), (0.3, 0.6), (0.7, 0.75), (0.8, 0.95))
    drawn = [chance.choice(ends[int(len(ends) * low) : int(len(ends) * high)]) for low, high in places]
    finished.branch.flush()
    finished.branch.configure(compaction_threshold=1, image_creation_threshold=1)
    finished.branch.compact()
    return Compacted(finished, Moments(finished.history, finished.root), Chosen._make([*drawn, ends[-1]]))


@pytest.mark.slow
def test_pages_are_the_same_after_compaction(compacted: Compacted) -> None:
    layers = compacted.run.branch.layers()
    assert {layer["level"] for layer in layers if layer["kind"] == "delta"} == {1}
    assert len({layer["end_lsn"] for layer in layers if layer["kind"] == "image"}) > 1
    assert compacted.run.branch.compact() == 0
    result = compare(compacted.moments, compacted.run.branch, list(compacted.chosen))
    assert_equal(result, pages=FEWER_PAGES * len(compacted.chosen))


@pytest.fixture(scope="module")
def collected(compacted: Compacted) -> Collected:
    """A lease and a branch are held; all else below the cutoff goes."""
    run, moments, chosen = compacted
    run.stack.text("timeline", "branch", "--branch-name", "held", "--at", format_lsn(chosen.branched))
    run.branch.lease(chosen.leased)
    last_lsn = parse_lsn(run.branch.at_pageserver()["last_record_lsn"])
    # The lease was given for ten minutes and goes on to hold, but nobody waits for others to be renewed.
    run.branch.configure(
        lsn_lease_length_s=0, pitr_interval_s=0, gc_period_s=0, gc_horizon_bytes=last_lsn - chosen.cutoff
    )
    outcome = run.branch.collect()
    return Collected(run, moments, chosen, branch_of(run.stack, "held"), outcome)


@pytest.mark.slow
def test_retained_pages_are_the_same_after_garbage_collection(collected: Collected) -> None:
    """S3."""
    assert parse_lsn(collected.outcome["cutoff_lsn"]) == collected.chosen.cutoff
    assert collected.outcome["layers_removed"] > 0
    assert collected.outcome["held_points"] >= 2
    collected.assert_kept(collected.run.branch)


@pytest.mark.slow
def test_what_is_no_longer_retained_is_refused(collected: Collected) -> None:
    run, gone = collected.run, collected.chosen.gone
    with pytest.raises(RefusedError, match="has no history at LSN"):
        compare(collected.moments, run.branch, [gone])
    refused = run.stack.run("timeline", "branch", "--branch-name", "late", "--at", format_lsn(gone))
    assert (refused.returncode, "its history reaches from" in refused.stderr) == (1, True), refused.stderr
    lease = run.branch.try_lease(gone)
    assert (lease.status_code, "no history" in lease.text) == (400, True), lease.text


@pytest.fixture(scope="module")
def reattached(collected: Collected) -> Collected:
    """The pageserver has lost its whole disk, and has been given its tenant again (G1)."""
    stack, branch = collected.run.stack, collected.run.branch
    branch.configure(lsn_lease_length_s=600)
    stack.kill("pageserver")
    shutil.rmtree(stack.directory / "pageserver")
    stack.text("start")
    stack.wait_until(
        lambda: branch.ask("GET", branch.path).status_code == 200, "the tenant is attached again"
    )
    return collected


@pytest.mark.slow
def test_retained_pages_are_the_same_after_the_disk_was_lost(reattached: Collected) -> None:
    """The lease outlives the process that gave it: a collection that would pass over it has to wait."""
    branch = reattached.run.branch
    assert branch.ask("PUT", f"{branch.path}/do_gc").status_code == 503
    reattached.assert_kept(branch)


@pytest.mark.slow
def test_retained_pages_are_the_same_where_layers_are_evicted_all_the_time(reattached: Collected) -> None:
    """Another pageserver takes over; its disk holds hardly a layer."""
    former = reattached.run.branch
    keys_dir = former.installation.keys_dir
    keys = KeyPair((keys_dir / "private.pem").read_bytes(), (keys_dir / "public.pem").read_bytes())
    listed = former.ask("GET", "/tenant").json()
    generation = next(row["generation"] for row in listed if row["tenant_id"] == former.tenant_id)
    store_url = former.installation.object_store_url()
    elsewhere = PageserverProcess(
        reattached.run.root / "elsewhere", keys, id=2, object_store_url=store_url, local_disk_max_mib=1
    )
    elsewhere.start()
    try:
        body = {"tenant_id": former.tenant_id, "generation": generation + 1}
        assert elsewhere.created("/tenant", body)["generation"] == generation + 1 >= 3
        here = former._replace(http_address=elsewhere.http_address, page_address=elsewhere.page_address)
        reattached.assert_kept(here)
        assert here.metric("excimer_local_disk_evictions_total") > 0
    finally:
        elsewhere.end()


def assert_equal(result: Comparison, *, pages: int) -> None:
    told = "\n".join(result.wrong[:40])
    assert not result.wrong, f"{len(result.wrong)} differences, seed {SEED}:\n{told}"
    assert result.compared["page"] == pages
    assert all(result.compared[kind] >= 5 for kind in ("size", "SLRU page", "file", "field"))
