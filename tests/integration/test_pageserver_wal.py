"""A pageserver that takes WAL from a stock PostgreSQL: pages, restarts, branches, moments in time.

The stock server begins as the same initdb template as the timeline, so its files are the truth.
"""

import asyncio
import random
import struct
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from excimer.base.errors import RefusedError
from excimer.base.ids import TimelineId, new_tenant_id, new_timeline_id
from excimer.base.keys import Fork, KeyKind, Relation, relation_path
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.io.processes import make_owned_dir
from excimer.pageserver.bootstrap import initdb_template
from excimer.pgformat.basebackup import RelationFork, unpack_relation_forks
from excimer.pgformat.two_phase import parse_two_phase
from excimer.wire.auth import generate_key_pair
from excimer.wire.page_service import BLOCKS_MAX
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.page_client import PageClient
from tests.kit.pageservers import PageserverProcess
from tests.kit.plain_postgres import PlainPostgres

CHANCE = random.Random(12)
TENANT = new_tenant_id(CHANCE)
MAIN = new_timeline_id(CHANCE)
ARRIVAL_TIMEOUT_S = 30.0
FIRST_NORMAL_OID = 16384

SETUP = (
    "create table kept (key int primary key, value text)",
    "insert into kept select g, repeat(md5(g::text), 4) from generate_series(1, 20000) g",
    "create unlogged table unlogged (a int)",
    "insert into unlogged select generate_series(1, 100)",
    "create table gone (a int)",
    "insert into gone select generate_series(1, 5000)",
    "create database other",
)
CHANGES = (
    "update kept set value = 'changed' where key % 7 = 0",
    "delete from kept where key > 15000",
    "vacuum kept",
    "drop table gone",
    "create index on kept (value)",
    "begin; insert into kept values (100001, 'p'); savepoint s; insert into kept values (100002, 'p');"
    " prepare transaction 'prepared'",
)


class Moment:
    def __init__(self, lsn: Lsn, at: datetime) -> None:
        self.lsn = lsn
        self.at = at


class World:
    """A stock server that has done its work and stopped, and a pageserver that has received it all."""

    def __init__(self, server: PageserverProcess, postgres: PlainPostgres) -> None:
        self.server = server
        self.postgres = postgres
        self.before_changes = Moment(Lsn(0), datetime.now(UTC))
        self.end_lsn = Lsn(0)
        self.created = datetime.now(UTC)

    def arrive(self, lsn: Lsn, timeline_id: TimelineId = MAIN) -> None:
        deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
        while self.server.last_record_lsn(TENANT, timeline_id) < lsn:
            assert time.monotonic() < deadline, self.server.log.read_text()[-4000:]
            time.sleep(0.02)

    async def work(self) -> None:
        async with self.postgres.running():
            async with await self.postgres.connect() as connection:
                for statement in SETUP:
                    await connection.execute(statement.encode())
                self.before_changes = Moment(await self.postgres.flush_lsn(), datetime.now(UTC))
                await asyncio.sleep(0.05)
                for statement in CHANGES:
                    await connection.execute(statement.encode())
                await connection.execute("checkpoint")
            self.end_lsn = await self.postgres.flush_lsn()
            await asyncio.to_thread(self.arrive, self.end_lsn)

    def branch(self, lsn: Lsn | None = None, ancestor: TimelineId = MAIN) -> TimelineId:
        timeline_id = new_timeline_id(CHANCE)
        body: dict[str, str] = {"new_timeline_id": timeline_id, "ancestor_timeline_id": ancestor}
        if lsn is not None:
            body["ancestor_start_lsn"] = format_lsn(lsn)
        started = time.monotonic()
        answer = self.server.created(f"/tenant/{TENANT}/timeline", body)
        assert time.monotonic() - started < 5
        assert answer["ancestor_timeline_id"] == ancestor
        return timeline_id

    def lsn_at(self, moment: datetime) -> tuple[int, dict[str, str]]:
        path = f"/tenant/{TENANT}/timeline/{MAIN}/get_lsn_by_timestamp"
        answer = self.server.request("GET", path, params={"timestamp": moment.isoformat()})
        return answer.status_code, answer.json()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    build = build_of(NEWEST_VERSION)
    postgres = PlainPostgres(build)
    server = PageserverProcess(
        tmp_path_factory.mktemp("pageserver"),
        generate_key_pair(),
        wal_sources=[f"{postgres.root}:{postgres.port}"],
        flush_interval_s=2.0,
    )
    try:
        server.start()
        made = World(server, postgres)
        server.created("/tenant", {"tenant_id": TENANT, "generation": 1})
        body = {"new_timeline_id": MAIN, "pg_version": NEWEST_VERSION}
        server.created(f"/tenant/{TENANT}/timeline", body)
        make_owned_dir(postgres.root)
        configuration = "max_prepared_transactions=5\ntrack_commit_timestamp=on\nwal_keep_size='1GB'\n"
        postgres.create(configuration, template=initdb_template(build))
        asyncio.run(made.work())
        yield made
    finally:
        server.end()
        postgres.remove()


async def read_fork(client: PageClient, fork: RelationFork, lsn: Lsn) -> bytes:
    starts = range(0, fork.blocks, BLOCKS_MAX)
    counts = (min(BLOCKS_MAX, fork.blocks - start) for start in starts)
    key = (KeyKind.RELATION_BLOCK, *fork[:4])
    parts = [
        await client.get_pages((*key, start), count, lsn=lsn)
        for start, count in zip(starts, counts, strict=True)
    ]
    return b"".join(parts)


def versions(fork: int, data: bytes) -> list[object]:
    """What tells the version of each page: pd_lsn, but for the visibility map its bits.

    Hint bits make pages of one version differ, and clearing bits of the map leaves its LSN alone.
    """
    starts = range(0, len(data), 8192)
    if fork == Fork.VM:
        return [data[start + 24 : start + 8192] for start in starts]
    return [struct.unpack_from("<II", data, start) for start in starts]


async def digest(world: World, timeline_id: TimelineId, lsn: Lsn) -> dict[RelationFork, bytes]:
    """All relation forks of the manifest at an LSN."""
    async with world.server.pages(TENANT, timeline_id) as client:
        backup = await client.get_basebackup(lsn)
        forks = unpack_relation_forks(backup.relation_forks)
        return {fork: await read_fork(client, fork, lsn) for fork in forks}


async def commit_status(world: World, lsn: Lsn) -> bytes:
    """The first page of pg_xact."""
    async with world.server.pages(TENANT, MAIN) as client:
        return await client.get_pages((KeyKind.SLRU_BLOCK, 0, 0, 0, 0, 0), 1, lsn=lsn)


def test_every_logged_page_is_the_stock_servers(world: World) -> None:
    forks = asyncio.run(digest(world, MAIN, world.end_lsn))
    assert len(forks) > 1000
    differing = []
    for fork, data in forks.items():
        # Free space maps are not in WAL, and CREATE DATABASE logs visibility maps without their bits.
        if fork.fork == Fork.FSM or (fork.fork == Fork.VM and fork.db >= FIRST_NORMAL_OID):
            continue
        path = world.postgres.data_dir / relation_path(Relation(*fork[:3]), fork.fork)
        expected = path.read_bytes()
        if versions(fork.fork, expected) != versions(fork.fork, data):
            differing.append((str(path), len(expected), len(data)))
    assert not differing


def test_files_that_the_stock_server_has_are_in_the_manifest(world: World) -> None:
    async def story() -> tuple[set[str], dict[str, bytes]]:
        async with world.server.pages(TENANT, MAIN) as client:
            backup = await client.get_basebackup(world.end_lsn)
        forks = unpack_relation_forks(backup.relation_forks)
        paths = {relation_path(Relation(*fork[:3]), fork.fork) for fork in forks}
        return paths, dict(backup.files)

    paths, files = asyncio.run(story())
    on_disk = {
        str(path.relative_to(world.postgres.data_dir))
        for directory in ("base", "global")
        for path in (world.postgres.data_dir / directory).rglob("*")
        if path.is_file() and path.name.split("_")[0].split(".")[0].isdigit()
    }
    unlogged = {path.removesuffix("_init") for path in paths if path.endswith("_init")}
    assert len(unlogged) == 1
    assert {path for path in on_disk - paths if not path.endswith("_fsm")} == unlogged
    # Files of dropped relations stay on the server's disk, empty, until its next checkpoint.
    assert paths <= on_disk
    prepared = {path: data for path, data in files.items() if path.startswith("pg_twophase/")}
    kept = (world.postgres.data_dir / "pg_twophase").iterdir()
    assert prepared == {f"pg_twophase/{path.name}": path.read_bytes() for path in kept}
    assert [len(parse_two_phase(data, NEWEST_VERSION).subxids) for data in prepared.values()] == [1]
    other = {path.split("/")[1] for path in files if path.startswith("base/")}
    assert len(other) == 4


def test_a_branch_in_the_past_is_the_past_and_stays_it(world: World) -> None:
    then = world.before_changes.lsn
    branch = world.branch(then)
    past = asyncio.run(digest(world, MAIN, then))
    assert asyncio.run(digest(world, branch, then)) == past
    assert past != asyncio.run(digest(world, MAIN, world.end_lsn))
    detail = world.server.timeline(TENANT, branch)
    assert detail["last_record_lsn"] == detail["ancestor_lsn"] == format_lsn(then)


def test_a_branch_at_the_newest_lsn_and_a_branch_of_it(world: World) -> None:
    branch = world.branch()
    child = world.branch(ancestor=branch)
    newest = asyncio.run(digest(world, MAIN, world.end_lsn))
    assert asyncio.run(digest(world, child, world.end_lsn)) == newest
    detail = world.server.timeline(TENANT, MAIN)
    assert world.server.timeline(TENANT, child)["prev_record_lsn"] == detail["prev_record_lsn"] != "0/0"
    path = f"/tenant/{TENANT}/timeline"
    refused = world.server.request("DELETE", f"{path}/{branch}")
    assert refused.status_code == 409
    assert child in refused.json()["message"]
    assert world.server.request("DELETE", f"{path}/{child}").status_code == 204
    assert world.server.request("DELETE", f"{path}/{branch}").status_code == 204
    assert world.server.request("DELETE", f"{path}/{branch}").status_code == 404

    async def gone() -> None:
        async with world.server.pages(TENANT, branch):
            pass

    with pytest.raises(RefusedError, match="has no timeline"):
        asyncio.run(gone())


def test_the_lsn_of_a_moment(world: World) -> None:
    status, found = world.lsn_at(world.before_changes.at)
    assert status == 200
    assert found["kind"] == "between"
    lsn = parse_lsn(found["lsn"])
    assert world.before_changes.lsn <= lsn < world.end_lsn
    # No commit lies between the two, although changes of transactions that had not committed do.
    assert asyncio.run(commit_status(world, lsn)) == asyncio.run(
        commit_status(world, world.before_changes.lsn)
    )
    assert asyncio.run(commit_status(world, lsn)) != asyncio.run(commit_status(world, world.end_lsn))
    status, found = world.lsn_at(datetime.now(UTC))
    assert (status, found["kind"]) == (200, "newest")
    for moment in (world.created - timedelta(days=1), datetime.now(UTC) + timedelta(hours=1)):
        status, found = world.lsn_at(moment)
        assert status == 400
        assert found["message"]


def test_nothing_is_lost_by_a_crash_and_a_restart(world: World) -> None:
    """What was flushed comes from layers, what was not comes again from the source."""
    branch = world.branch(world.before_changes.lsn)
    expected = asyncio.run(digest(world, MAIN, world.end_lsn))
    flushed = world.server.request("POST", f"/tenant/{TENANT}/timeline/{MAIN}/flush").json()
    assert parse_lsn(flushed["remote_consistent_lsn"]) >= world.end_lsn
    before = {
        each["timeline_id"] for each in world.server.request("GET", f"/tenant/{TENANT}/timeline").json()
    }
    world.server.kill()
    world.server.start()
    world.arrive(world.end_lsn)
    after = {each["timeline_id"] for each in world.server.request("GET", f"/tenant/{TENANT}/timeline").json()}
    assert after == before
    assert asyncio.run(digest(world, MAIN, world.end_lsn)) == expected
    assert asyncio.run(digest(world, branch, world.before_changes.lsn))

    async def more_wal() -> Lsn:
        async with world.postgres.running():
            async with await world.postgres.connect() as connection:
                await connection.execute("insert into kept select generate_series(200001, 201000), 'new'")
                lsn = await world.postgres.flush_lsn()
            await asyncio.to_thread(world.arrive, lsn)
            world.server.kill()
            world.server.start()
            await asyncio.to_thread(world.arrive, lsn)
            return lsn

    lsn = asyncio.run(more_wal())
    assert asyncio.run(digest(world, MAIN, lsn)) != expected
    assert asyncio.run(digest(world, MAIN, world.end_lsn)) == expected


def test_basebackup_is_fast_enough(world: World) -> None:
    async def story() -> float:
        async with world.server.pages(TENANT, MAIN) as client:
            elapsed = []
            for lsn in (world.end_lsn, world.before_changes.lsn) * 3:
                started = time.monotonic()
                backup = await client.get_basebackup(lsn)
                elapsed.append(time.monotonic() - started)
                assert backup.lsn == lsn
            return min(elapsed)

    fastest = asyncio.run(story())
    assert fastest < 1.0
