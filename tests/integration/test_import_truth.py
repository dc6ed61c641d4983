"""Page truth (S1) of imported clusters: their files, the WAL that came with them, and what is written after.

A stock server is imported over the wire while it is written to; later it is stopped, and imported from its
directory. An endpoint goes on with each. The truth is the very copy that was imported, the base
backup's bytes or the directory, recovered by PostgreSQL with the source's WAL and then the branch's own.
"""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn, parse_lsn, record_end
from excimer.cli.commands.endpoint import create_endpoint
from excimer.cli.installation import load_installation
from excimer.pgformat.cluster_files import parse_backup_label
from excimer.postgres import PostgresBuild, run_initdb
from tests.kit import ingest_workload, redo_workload
from tests.kit.backup_recorder import HOLD_TIMEOUT_S, running_recorder
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory
from tests.kit.page_truth import SEGMENT_SIZE_BYTES, SETTINGS
from tests.kit.stack import Stack, running_stack
from tests.kit.stack_truth import (
    Branch,
    EndpointServer,
    Moments,
    StackHistory,
    arrive,
    branch_of,
    compare_with,
    imported_history,
)
from tests.kit.stock_server import StockServer, copy_data_dir, stock_server

PAGES = int(os.environ.get("EXCIMER_TRUTH_PAGES", "400")) // 2
SEED = int(os.environ.get("EXCIMER_TRUTH_SEED", "1"))
HOLD_AFTER_BYTES = 8 << 20
"""Of the backup: a quarter or so."""
WAL_AHEAD_BYTES = 24 << 20
FILLER_BYTES = 1_000_000
ENDPOINT_SETTINGS = {"max_prepared_transactions": "10", "track_commit_timestamp": "on"}

DURING_BACKUP = """
create database made_meanwhile template origin strategy wal_log;
create table made_meanwhile as select g, repeat('m', 300) as m from generate_series(1, 2000) g;
drop table unlogged_t;
truncate truncated_t;
insert into truncated_t select g, 'while it is copied' from generate_series(1, 900) g;
vacuum full heap_t;
"""
AFTER_IMPORT = """
create database copied_later template origin strategy file_copy;
create table after_import as select g, repeat('a', 100) as a from generate_series(1, 2000) g;
delete from made_meanwhile where g % 3 = 0;
vacuum made_meanwhile;
begin; insert into subxact_t values (5001); prepare transaction 'after the import';
"""


class Imported(NamedTuple):
    """A branch that an import has made and an endpoint has written to, and where its truth comes from."""

    branch: Branch
    history: StackHistory
    moments: Moments
    readable_lsn: Lsn
    """The first LSN that can be read."""
    head_lsn: Lsn
    """Where the import ended."""

    def between(self, start_lsn: Lsn, end_lsn: Lsn) -> Lsn:
        """The end of a record, at neither end."""
        ends = [lsn for lsn in self.history.record_ends if start_lsn < lsn < end_lsn]
        assert len(ends) > 100
        return random.Random(SEED).choice(ends)


class Imports(NamedTuple):
    live: Imported
    directory: Imported


@pytest.fixture(scope="module")
def imports() -> Iterator[Imports]:
    build = build_of(NEWEST_VERSION)
    with running_stack(NEWEST_VERSION, safekeepers=1) as stack, reachable_directory() as root:
        stack.text("tenant", "create", "--set-default")
        data_dir, backup = root / "data", root / "backup"
        run_initdb(build, data_dir, wal_segment_size_mib=SEGMENT_SIZE_BYTES >> 20)
        with stock_server(build, data_dir, SETTINGS | {"listen_addresses": "127.0.0.1"}) as server:
            live = import_live(stack, server, backup)
        stopped = root / "stopped"
        copy_data_dir(data_dir, stopped)
        directory = stack.json("import", str(data_dir), "--branch-name", "directory")
        label = parse_backup_label((backup / "backup_label").read_bytes().decode())
        backup_lsn = record_end(label.start_lsn, SEGMENT_SIZE_BYTES)
        source = Source(stack, build, data_dir / "pg_wal", root)
        yield Imports(
            source.gone_on(live, backup, backup_lsn),
            source.gone_on(directory, stopped, parse_lsn(directory["start_lsn"])),
        )


def import_live(stack: Stack, server: StockServer, backup: Path) -> dict[str, Any]:
    """What the import says. All the time the server is written to; `backup` becomes what was imported."""
    server.sql(redo_workload.SETUP)
    server.sql(ingest_workload.LIFE)
    server.sql("create database origin")
    server.sql(ingest_workload.DATABASES, "origin")
    server.sql(redo_workload.ROUND.format(round=1))
    (target,) = server.sql(f"select pg_current_wal_lsn() + {WAL_AHEAD_BYTES}")[0]
    with running_recorder(server.port, HOLD_AFTER_BYTES) as recorder:
        url = f"postgres://postgres@127.0.0.1:{recorder.port}/postgres?sslmode=disable&gssencmode=disable"
        command = stack.command("--json", "import", url, "--branch-name", "live", "--to", target)
        with background(command) as importing:
            assert recorder.holds.wait(HOLD_TIMEOUT_S)
            server.sql(DURING_BACKUP)
            server.sql(redo_workload.ROUND.format(round=2))
            server.sql(ingest_workload.TWO_PHASE)
            recorder.go_on.set()
            while server.sql("select count(*) from pg_stat_progress_basebackup") != [["0"]]:
                time.sleep(0.05)
            server.sql(redo_workload.END)
            while server.sql(f"select pg_current_wal_lsn() <= '{target}'") == [["t"]]:
                server.sql(f"select pg_logical_emit_message(false, 'filler', repeat('x', {FILLER_BYTES}))")
            output, errors = importing.communicate(timeout=120)
        assert importing.returncode == 0, errors
        recorder.unpack_backup(backup)
    return dict(json.loads(output))


@contextlib.contextmanager
def background(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


class Source(NamedTuple):
    """The stopped server that both branches come from."""

    stack: Stack
    build: PostgresBuild
    wal_dir: Path
    root: Path

    def gone_on(self, made: dict[str, Any], beginning: Path, start_lsn: Lsn) -> Imported:
        """An endpoint writes to the branch, and stops. `beginning` is as of `start_lsn`."""
        name = made["name"]
        body = {"name": name, "branch": name, "postgres_settings": ENDPOINT_SETTINGS}
        create_endpoint(load_installation(self.stack.directory), body, None)
        self.stack.text("endpoint", "start", name)
        server = EndpointServer(self.stack, self.root, name)
        server.sql(AFTER_IMPORT)
        server.sql(redo_workload.ROUND.format(round=3))
        self.stack.text("endpoint", "stop", name)
        branch = branch_of(self.stack, name)
        wal_dir = self.root / f"{name}-wal"
        history = imported_history(branch, self.build, beginning, start_lsn, self.wal_dir, wal_dir)
        arrive(branch, history.record_ends[-1])
        moments_dir = self.root / f"{name}-moments"
        moments_dir.mkdir(mode=0o755)
        moments = Moments(history, moments_dir)
        return Imported(
            branch, history, moments, parse_lsn(made["readable_from"]), parse_lsn(made["start_lsn"])
        )


@pytest.mark.slow
def test_pages_of_a_server_imported_while_it_was_written_to(imports: Imports) -> None:
    live = imports.live
    last_lsn = live.history.record_ends[-1]
    assert live.readable_lsn < live.head_lsn < last_lsn
    in_its_wal, written_after = (
        live.between(live.readable_lsn, live.head_lsn),
        live.between(live.head_lsn, last_lsn),
    )
    assert_equal(live, [live.readable_lsn, in_its_wal, live.head_lsn, written_after, last_lsn])


@pytest.mark.slow
def test_pages_of_an_imported_directory(imports: Imports) -> None:
    directory = imports.directory
    last_lsn = directory.history.record_ends[-1]
    assert directory.readable_lsn == directory.head_lsn
    written_after = directory.between(directory.head_lsn, last_lsn)
    assert_equal(directory, [directory.head_lsn, written_after, last_lsn])


@pytest.mark.slow
def test_nothing_before_the_backup_can_be_read(imports: Imports) -> None:
    """The files are of several moments there; PostgreSQL refuses to recover them to there, too."""
    live = imports.live
    before_lsn = live.between(live.history.start_lsn, live.readable_lsn)
    with pytest.raises(RefusedError, match="has no history at LSN"):
        asyncio.run(compare_with(live.branch, live.history, Path(), before_lsn, PAGES, SEED))


def assert_equal(imported: Imported, lsns: list[Lsn]) -> None:
    result = asyncio.run(imported.moments.compare(imported.branch, lsns, PAGES, SEED))
    told = "\n".join(result.wrong[:40])
    assert not result.wrong, f"{len(result.wrong)} differences, seed {SEED}:\n{told}"
    assert result.compared["page"] == PAGES * len(lsns)
    assert all(result.compared[kind] >= 5 for kind in ("size", "SLRU page", "file", "field"))
