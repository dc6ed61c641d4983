"""An exported branch is a plain cluster: equal, whole, and writable without Excimer.

One small installation serves all tests of a version; the newest by default, those named in
EXCIMER_EXPORT_VERSIONS (like 14,15,16,17,18) in a sweep.
"""

import asyncio
import os
import signal
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from excimer.base.address import Address
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.cli.commands.endpoint import create_endpoint
from excimer.cli.commands.export import access_of, renewal_of
from excimer.cli.controller_client import ControllerClient
from excimer.cli.installation import load_installation
from excimer.export.directory_sink import DirectorySink
from excimer.export.job import run_export
from excimer.export.ownership import export_owner
from excimer.export.page_stream import BranchAccess
from excimer.io.processes import give_to_user, make_owned_dir
from excimer.postgres import run_initdb
from excimer.service.http_client import HttpClient, path_of
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.exported_cluster import address_of, check_all, dump_all, place_for_cluster
from tests.kit.plain_postgres import PlainPostgres
from tests.kit.rich_cluster import (
    DUMP_OPTIONS,
    LATER_STATEMENTS,
    ROLES,
    STATEMENTS,
    comparable,
    fill,
)
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import stock_server

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_EXPORT_VERSIONS", str(NEWEST_VERSION)).split(",")]
ATTEMPTS_MAX = 5
SETTINGS = {"max_prepared_transactions": "5", "track_commit_timestamp": "on"}


class Branched(NamedTuple):
    """An installation with history, and what a dump said at two of its moments."""

    stack: Stack
    past_lsn: str
    past_dump: str
    head_dump: str


@pytest.fixture(scope="module", params=VERSIONS)
def branched(request: pytest.FixtureRequest) -> Iterator[Branched]:
    with running_stack(request.param, safekeepers=1) as stack:
        stack.text("tenant", "create", "--set-default")
        body = {"name": "main", "postgres_settings": SETTINGS}
        create_endpoint(load_installation(stack.directory), body, None)
        stack.text("endpoint", "start", "main")
        stack.query(ROLES)
        stack.query("create database second")
        for database in ("postgres", "second"):
            for statement in STATEMENTS:
                stack.query(statement, database=database)
        stack.query("begin; insert into pending values (1); prepare transaction 'waiting'")
        past_lsn = stack.query("select pg_current_wal_flush_lsn()::text")[0][0]
        past_dump = _dump(stack)
        for statement in LATER_STATEMENTS:
            stack.query(statement)
        yield Branched(stack, past_lsn, past_dump, _dump(stack))


def _dump(stack: Stack) -> str:
    return comparable(stack.check_program("pg_dumpall", *DUMP_OPTIONS))


def test_an_exported_branch_starts_alone_and_is_equal(branched: Branched) -> None:
    asyncio.run(_check_directory(branched.stack, branched.head_dump))


def test_so_is_one_of_a_moment_in_the_past(branched: Branched) -> None:
    assert branched.past_dump != branched.head_dump
    asyncio.run(_check_directory(branched.stack, branched.past_dump, "--at", branched.past_lsn))


async def _check_directory(stack: Stack, dump: str, *options: str) -> None:
    async with place_for_cluster(build_of(stack.pg_version)) as cluster:
        answer = stack.json("export", "main", str(cluster.data_dir), *options)
        assert answer["pg_version"] == stack.pg_version
        _check_owner(cluster.data_dir, answer["owner"])
        _check_holes(cluster.data_dir)
        await _check_cluster(cluster, dump)


def _check_owner(root: Path, owner: str) -> None:
    assert owner == export_owner().name
    for path in [root, *root.rglob("*")]:
        status = path.stat()
        assert status.st_uid == export_owner().uid, path
        assert stat.S_IMODE(status.st_mode) == (0o700 if path.is_dir() else 0o600), path


def _check_holes(root: Path) -> None:
    """The WAL prefix is two or three pages of 16 MiB."""
    segments = [path for path in (root / "pg_wal").iterdir() if path.is_file()]
    assert segments
    assert all(path.stat().st_size == 16 << 20 for path in segments)
    assert sum(path.stat().st_blocks * 512 for path in segments) < 1 << 20


async def _check_cluster(cluster: PlainPostgres, dump: str) -> None:
    cluster.configure()
    async with cluster.running():
        assert dump_all(cluster.build, address_of(cluster)) == dump
        assert await cluster.value("select count(*) from volatile") == "0", "unlogged tables are empty"
        check_all(cluster.build, address_of(cluster))
        assert await cluster.value("select count(*) from pending") == "0"
        assert (
            await cluster.value("select pg_xact_commit_timestamp(xmin) is not null from plain limit 1")
            == "True"
        )
        async with await cluster.connect() as connection:
            await connection.execute("insert into plain select i, 'new' from generate_series(50000, 52000) i")
            await connection.execute("insert into volatile values (1, 'kept')")
            await connection.execute("commit prepared 'waiting'")
            await connection.execute("vacuum freeze")
            await connection.execute("checkpoint")
        assert cluster.process is not None
        await cluster.process.stop()
    async with cluster.running():
        assert await cluster.value("select count(*) from plain where value = 'new'") == "2001"
        assert await cluster.value("select count(*) from pending") == "1"
        assert await cluster.value("select count(*) from volatile") == "1"
        check_all(cluster.build, address_of(cluster), "--parent-check")


def test_a_cluster_that_was_imported_comes_out_as_it_went_in(branched: Branched) -> None:
    """In by one command, out by another, and no endpoint in between."""
    asyncio.run(_check_round_trip(branched.stack))


async def _check_round_trip(stack: Stack) -> None:
    build = build_of(stack.pg_version)
    async with place_for_cluster(build) as source:
        run_initdb(build, source.data_dir, options=["--data-checksums"])
        with stock_server(build, source.data_dir, {"max_prepared_transactions": "5"}) as server:
            fill(server)
            dump = dump_all(build, Address(str(server.socket_dir), server.port))
        stack.json("import", str(source.data_dir), "--branch-name", "imported")
    async with place_for_cluster(build) as cluster:
        stack.json("export", "imported", str(cluster.data_dir))
        cluster.configure()
        async with cluster.running():
            assert dump_all(build, address_of(cluster)) == dump
            check_all(build, address_of(cluster), "--parent-check")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst", "-"])
def test_a_tar_holds_the_same_cluster(branched: Branched, tmp_path: Path, suffix: str) -> None:
    stack = branched.stack
    archive = tmp_path / ("main.tar" if suffix == "-" else f"main{suffix}")
    if suffix == "-":
        with archive.open("wb") as out:
            subprocess.run(stack.command("export", "main", "-"), stdout=out, check=True, timeout=120)
    else:
        stack.text("export", "main", str(archive))
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
    if suffix == ".tar.zst":
        import zstandard

        plain = tmp_path / "plain.tar"
        with archive.open("rb") as source, plain.open("wb") as target:
            zstandard.ZstdDecompressor().copy_stream(source, target)
        archive = plain
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        assert names[-1] == "./global/pg_control", "what makes it a cluster comes last"
        assert {member.mode for member in tar} == {0o700, 0o600}
        assert {member.uid for member in tar} == {export_owner().uid}
    if suffix == ".tar.gz":
        asyncio.run(_check_tar(stack, archive, branched.head_dump))


async def _check_tar(stack: Stack, archive: Path, dump: str) -> None:
    async with place_for_cluster(build_of(stack.pg_version)) as cluster:
        make_owned_dir(cluster.data_dir)
        unpack = ["tar", "-xf", str(archive), "-C", str(cluster.data_dir)]
        await asyncio.to_thread(subprocess.run, unpack, check=True)
        for path in [cluster.data_dir, *cluster.data_dir.rglob("*")]:
            give_to_user(path)
        cluster.configure()
        async with cluster.running():
            assert dump_all(cluster.build, address_of(cluster)) == dump


def test_a_place_that_is_taken_is_refused_and_left_alone(branched: Branched, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    archive = tmp_path / "x.tar"
    archive.write_text("mine")
    for place, says in ((taken, "not empty"), (file, "is a file"), (archive, "exists already")):
        result = branched.stack.run("export", "main", str(place))
        assert result.returncode == 1
        assert says in result.stderr
    missing = branched.stack.run("export", "main", str(tmp_path / "no" / "such"))
    assert "cannot be made" in missing.stderr
    assert (taken / "letter").read_text() == file.read_text() == archive.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken", "x.tar"]


def test_a_moment_that_has_not_come_or_is_no_moment_is_refused(branched: Branched, tmp_path: Path) -> None:
    for at, code, says in (("FF/0", 1, "has not reached"), ("soon", 2, "neither an LSN")):
        result = branched.stack.run("export", "main", str(tmp_path / "out"), "--at", at)
        assert (result.returncode, says in result.stderr) == (code, True), result.stderr
    assert branched.stack.run("export", "nobody", str(tmp_path / "out")).returncode == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out", "out.tar.zst"])
def test_an_interrupted_export_leaves_nothing(branched: Branched, tmp_path: Path, name: str) -> None:
    """As soon as something is there. The export may be quicker than we are: then once more."""
    for attempt in range(ATTEMPTS_MAX):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        code, errors = _interrupted(branched.stack, directory, name)
        if code != 0:
            break
    assert code == 130, errors
    assert "removed again" in errors
    assert not list(directory.iterdir())


def _interrupted(stack: Stack, directory: Path, name: str) -> tuple[int, str]:
    command = stack.command("export", "main", str(directory / name))
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # Who starts the tests in the background has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(directory.iterdir()) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, errors


def test_an_export_keeps_what_it_reads_from_being_collected(branched: Branched) -> None:
    """Garbage is collected up to the head in the middle of an export. The last test: it stays so."""
    asyncio.run(_check_lease(branched))
    with tempfile.TemporaryDirectory() as directory:
        before = format_lsn(parse_lsn(branched.past_lsn) - 8192)
        gone = branched.stack.run("export", "main", f"{directory}/out", "--at", before)
    assert (gone.returncode, "no history" in gone.stderr) == (1, True), gone.stderr


async def _check_lease(branched: Branched) -> None:
    installation = load_installation(branched.stack.directory)
    client = ControllerClient(installation)
    body = {"branch": "main", "at_lsn": branched.past_lsn}
    ticket = client.post("tenants", client.get("default_tenant")["name"], "branch_access", body=body)
    access = access_of(ticket)
    renew = renewal_of(client, ticket)
    assert (await renew()).valid_for_s > 3600
    pageserver = HttpClient("pageserver", access.pageserver_http_address, installation.admin_token())
    build = build_of(branched.stack.pg_version)
    async with place_for_cluster(build) as cluster:
        sink = _CollectingSink(cluster.data_dir, pageserver, access)
        lsn = parse_lsn(branched.past_lsn)
        exported = await run_export(access, lsn, sink, lambda done, total: None, renew)
        assert parse_lsn(sink.collected["cutoff_lsn"]) > exported.lsn
        assert sink.collected["held_points"] >= 1
        timeline = path_of("v1", "tenant", access.tenant_id, "timeline", access.timeline_id)
        afterwards = await pageserver.call("PUT", f"{timeline}/do_gc")
        assert afterwards["held_points"] == sink.collected["held_points"] - 1, "it gave its lease back"
        cluster.configure()
        async with cluster.running():
            assert dump_all(build, address_of(cluster)) == branched.past_dump


class _CollectingSink(DirectorySink):
    """Has the pageserver collect all the garbage it may, before the first page is read."""

    def __init__(self, root: Path, pageserver: HttpClient, access: BranchAccess) -> None:
        super().__init__(root, export_owner())
        self._pageserver = pageserver
        self._access = access
        self.collected: dict[str, Any] = {}

    def begin(self) -> None:
        super().begin()
        asyncio.run(self._collect())  # in a thread of the export

    async def _collect(self) -> None:
        tenant = path_of("v1", "tenant", self._access.tenant_id)
        timeline = f"{tenant}/timeline/{self._access.timeline_id}"
        settings = {"pitr_interval_s": 0, "gc_horizon_bytes": 0, "gc_period_s": 0, "lsn_lease_length_s": 0}
        await self._pageserver.call("PATCH", f"{tenant}/config", settings)
        await self._pageserver.post(f"{timeline}/flush")
        self.collected = await self._pageserver.call("PUT", f"{timeline}/do_gc")
