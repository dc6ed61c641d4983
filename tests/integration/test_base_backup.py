"""Base backups of an endpoint by PostgreSQL's own programs over TCP: whole, verified, plain clusters again.

The newest version by default; those named in EXCIMER_BACKUP_VERSIONS (like 14,17,18) in a sweep.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.io.processes import ProgramFailedError, give_to_user, make_owned_dir, run, spawn
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory
from tests.kit.rich_cluster import DUMP_OPTIONS, ROLES, STATEMENTS, comparable
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import StockServer, stock_server

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_BACKUP_VERSIONS", str(NEWEST_VERSION)).split(",")]
SUMMARIES_SINCE = 17
SETTINGS = {"max_prepared_transactions": "5"}
ROLE = "keeper"
PASSWORD = "of backups"
TRUST = "local all all trust\n"


class Backups:
    """An installation with content, and a directory for its backups."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack = stack
        self.directory = directory
        self.build = build_of(stack.pg_version)
        self.hba = directory / "hba.conf"
        self.hba.write_text(TRUST)
        self.hba.chmod(0o644)

    def take(
        self, name: str, *options: str, role: str = ROLE, password: str = PASSWORD, of: str = "main"
    ) -> Path:
        """A backup of endpoint `of` over TCP. Raises AssertionError with what pg_basebackup wrote."""
        target = self.directory / name
        endpoint = self.stack.endpoint(of)
        place = ["-h", endpoint["host"], "-p", str(endpoint["port"]), "-U", role, "-w"]
        self.program("pg_basebackup", *place, "-c", "fast", "-D", str(target), *options, password=password)
        return target

    def program(self, name: str, *arguments: str, password: str = "") -> str:
        environment = self.build.whole_environment({"PGPASSWORD": password})
        return run([self.build.program(name), *arguments], environment=environment, timeout_s=120)

    def dump(self, of: str = "main") -> str:
        return comparable(self.stack.check_program("pg_dumpall", *DUMP_OPTIONS, name=of))

    def start_afresh(self) -> None:
        """Afterwards hardly a block of the branch is in the endpoint's directory, and no WAL from before."""
        self.stack.text("endpoint", "stop", "main", "--immediate")
        self.stack.text("endpoint", "start", "main")

    def check(self, backup: Path, dump: str, *, has_indexes_checked: bool = True) -> None:
        """PostgreSQL's own check of the files, then plain PostgreSQL on them, with their settings."""
        self.program("pg_verifybackup", "-q", str(backup))
        with stock_server(self.build, backup, {"hba_file": str(self.hba)}) as server:
            assert self.dump_of(server) == dump
            where = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres"]
            if has_indexes_checked:
                self.program("pg_amcheck", *where, "--all", "--install-missing", "--heapallindexed")
            shown = server.sql("show fsync; show full_page_writes; show synchronous_standby_names")
            assert shown == [["on"], ["on"], [""]]
            server.sql("insert into plain values (-1, 'of the copy')")

    def dump_of(self, server: StockServer) -> str:
        where = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres"]
        return comparable(self.program("pg_dumpall", *where, *DUMP_OPTIONS))


@pytest.fixture(scope="module", params=VERSIONS)
def backups(request: pytest.FixtureRequest) -> Iterator[Backups]:
    with running_stack(request.param, safekeepers=1) as stack, reachable_directory() as root:
        stack.text("tenant", "create", "--set-default")
        settings = SETTINGS | ({"summarize_wal": "on"} if request.param >= SUMMARIES_SINCE else {})
        chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        stack.text("endpoint", "create", "main", *chosen)
        stack.text("endpoint", "start", "main")
        stack.query(ROLES)
        for statement in STATEMENTS:
            stack.query(statement)
        stack.query("create database second")
        stack.query("create table apart as select generate_series(1, 1000) n", database="second")
        stack.query("create table numbered (n int)")
        stack.query("begin; insert into pending values (1); prepare transaction 'waiting'")
        stack.query(f"create role {ROLE} login replication password '{PASSWORD}'")
        yield Backups(stack, make_owned_dir(root / "backups"))


def test_a_replication_role_takes_a_backup_of_blocks_that_are_not_here(backups: Backups) -> None:
    dump = backups.dump()
    backups.start_afresh()
    backup = backups.take("plain")
    backups.check(backup, dump)


def test_a_tar_that_fetches_its_wal_at_the_end_is_whole_as_well(backups: Backups) -> None:
    backups.stack.query("insert into plain select i, 'tar' from generate_series(20001, 21000) i")
    dump = backups.dump()
    archive = backups.take("tar", "-F", "tar", "-X", "fetch")
    backup = make_owned_dir(backups.directory / "unpacked")
    backup.chmod(0o700)
    with tarfile.open(archive / "base.tar") as content:
        content.extractall(backup, filter="fully_trusted")
    (archive / "backup_manifest").rename(backup / "backup_manifest")
    for path in backup.rglob("*"):
        give_to_user(path)
    backups.check(backup, dump, has_indexes_checked=False)


def test_a_branch_gives_one_as_well(backups: Backups) -> None:
    """Its endpoint's directory has files that only branches have; PostgreSQL reads them all for a backup."""
    backups.stack.branch("twig")
    backup = backups.take("of-twig", of="twig")
    backups.check(backup, backups.dump("twig"), has_indexes_checked=False)
    backups.stack.text("endpoint", "stop", "twig")


def test_nobody_takes_one_without_the_right_or_the_password(backups: Backups) -> None:
    backups.stack.query("create role other login password 'of backups'")
    with pytest.raises(ProgramFailedError, match="password authentication failed"):
        backups.take("none", password="wrong")
    with pytest.raises(ProgramFailedError, match="no password supplied"):
        backups.take("none", password="")
    with pytest.raises(ProgramFailedError, match=r"to start WAL sender|replication role"):
        backups.take("none", role="other")
    assert not (backups.directory / "none").exists()


def test_a_backup_ends_only_when_a_quorum_has_its_wal(backups: Backups) -> None:
    """Else it could hold what the branch loses with its endpoint, and an increment onto it would be wrong."""
    endpoint = backups.stack.endpoint("main")
    place = [
        "-h",
        endpoint["host"],
        "-p",
        str(endpoint["port"]),
        "-U",
        ROLE,
        "-w",
        "-c",
        "fast",
        "-X",
        "none",
    ]
    command = [backups.build.program("pg_basebackup"), *place, "-D", backups.directory / "waiting"]
    backups.stack.text("stop", "safekeeper-1")
    taking = spawn(command, environment=backups.build.whole_environment({"PGPASSWORD": PASSWORD}))
    try:
        waits = (
            "select count(*) from pg_stat_progress_basebackup where phase like 'waiting for wal archiving%'"
        )
        for _ in range(5):
            backups.stack.wait_until(
                lambda: taking.poll() is not None or backups.stack.query(waits) == [(1,)], "its last step"
            )
        assert taking.poll() is None
        backups.stack.text("start")
        assert taking.wait(60) == 0
    finally:
        taking.kill()


def test_a_receiver_of_wal_is_told_where_the_endpoint_began(backups: Backups) -> None:
    """In the segment of the start it gets an error, and no filler in the place of the branch's WAL."""
    received = make_owned_dir(backups.directory / "received")
    backups.stack.query("create table behind as select generate_series(1, 10000)")
    backups.start_afresh()  # past a segment's first page: of the page with its last record a start has all
    with pytest.raises(ProgramFailedError, match="before this endpoint's start"):
        receive(backups, received)
    backups.stack.query("select pg_switch_wal()")
    backups.stack.query("insert into numbered values (2)")
    receive(backups, received)
    names = sorted(path.name.removesuffix(".partial") for path in received.iterdir())
    (current,) = backups.stack.query("select pg_walfile_name(pg_current_wal_lsn())")[0]
    assert names[-1] == current


def receive(backups: Backups, directory: Path) -> None:
    """By pg_receivewal, up to where WAL is now."""
    endpoint = backups.stack.endpoint("main")
    (end,) = backups.stack.query("select (pg_current_wal_flush_lsn() - 1)::text")[0]  # it stops behind it
    place = ["-h", endpoint["host"], "-p", str(endpoint["port"]), "-U", ROLE, "-w", "--no-loop"]
    backups.program("pg_receivewal", *place, "-D", str(directory), "--endpos", end, password=PASSWORD)


def changes(backups: Backups, *statements: str) -> None:
    for statement in statements:
        backups.stack.query(statement)


def needs_summaries(backups: Backups) -> None:
    if backups.build.version < SUMMARIES_SINCE:
        pytest.skip("PostgreSQL has incremental backups from 17 on")


def test_incremental_backups_combine_to_the_whole(backups: Backups) -> None:
    """Changed, cut, new, copied and dropped files, two increments deep, onto a backup of a fresh start."""
    needs_summaries(backups)
    changes(backups, "create table doomed as select generate_series(1, 5000) n")
    backups.start_afresh()
    full = backups.take("full")
    changes(
        backups,
        "update plain set value = 'first' where key % 50 = 0",
        "drop table doomed",
        "delete from labels where label < 'c'",
        "vacuum (truncate) labels",
        "create database third template second",
        "create table more as select i, repeat('m', 100) from generate_series(1, 3000) i",
    )
    first = backups.take("first", f"--incremental={full}/backup_manifest")
    changes(
        backups,
        "update plain set value = 'second' where key % 70 = 0",
        "delete from shrunk where key > 10",
        "vacuum (truncate) shrunk",
        "truncate days",
        "vacuum full more",
    )
    dump = backups.dump()
    second = backups.take("second", f"--incremental={first}/backup_manifest")
    assert size_bytes(second) < size_bytes(full) / 2
    whole = backups.directory / "whole"
    backups.program("pg_combinebackup", "-o", str(whole), str(full), str(first), str(second))
    backups.check(whole, dump)


def size_bytes(backup: Path) -> int:
    """Of relations' files alone."""
    return sum(path.stat().st_size for path in (backup / "base").rglob("*") if path.is_file())


def test_one_whose_base_is_of_an_earlier_start_is_refused_at_once(backups: Backups) -> None:
    """Which blocks changed meanwhile nobody knows; a new full backup is needed."""
    needs_summaries(backups)
    base = backups.take("base")
    changes(backups, "update plain set value = 'missed' where key = 1")
    backups.start_afresh()
    with pytest.raises(ProgramFailedError, match="WAL summaries are required"):
        backups.take("refused", f"--incremental={base}/backup_manifest")


def test_one_over_a_planned_restart_is_whole(backups: Backups) -> None:
    """The endpoint goes on in the directory that it had, with PostgreSQL's own summaries."""
    needs_summaries(backups)
    base = backups.take("before")
    changes(backups, "update plain set value = 'in between' where key % 3 = 0")
    backups.stack.text("endpoint", "restart", "main")
    changes(backups, "update plain set value = 'after' where key % 5 = 1")
    dump = backups.dump()
    increment = backups.take("after", f"--incremental={base}/backup_manifest")
    whole = backups.directory / "over-a-restart"
    backups.program("pg_combinebackup", "-o", str(whole), str(base), str(increment))
    backups.check(whole, dump, has_indexes_checked=False)


def test_summaries_come_from_the_start_on_and_no_wal_piles_up_for_them(backups: Backups) -> None:
    needs_summaries(backups)
    backups.start_afresh()
    for _ in range(8):
        changes(backups, "insert into numbered values (1)", "select pg_switch_wal()")
    (written,) = backups.stack.query("select pg_current_wal_insert_lsn()::text")[0]
    changes(backups, "checkpoint", "insert into numbered values (1)")
    backups.stack.wait_until(lambda: summarized(backups.stack, written), "summaries up to here")
    changes(backups, "checkpoint")
    backups.stack.wait_until(lambda: kept_segments(backups.stack) <= 2, "the removal of old WAL")


def summarized(stack: Stack, lsn: str) -> bool:
    query = f"select summarized_lsn >= '{lsn}' from pg_get_wal_summarizer_state()"
    return bool(stack.query(query)[0][0])


def kept_segments(stack: Stack) -> int:
    return int(stack.query("select count(*) from pg_ls_waldir() where length(name) = 24")[0][0])
