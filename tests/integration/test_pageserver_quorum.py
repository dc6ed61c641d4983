"""A pageserver that reads from three real safekeepers, which die one after the other under load."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from excimer.base.clock import UnixTime
from excimer.base.lsn import Lsn, parse_lsn
from excimer.compute.proposer import Proposer
from excimer.io.processes import make_owned_dir
from excimer.pageserver.bootstrap import initdb_template
from excimer.pageserver.wal_access import HeldAccess
from excimer.service.tasks import running
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.pageservers import PageserverProcess
from tests.kit.plain_postgres import PROPOSER_CONFIGURATION, PlainPostgres
from tests.kit.safekeepers import TENANT, TIMELINE, SafekeeperCluster, running_safekeepers

pytestmark = pytest.mark.timeout(120)
ARRIVAL_TIMEOUT_S = 20.0


@pytest.fixture
def safekeepers(tmp_path: Path) -> Iterator[SafekeeperCluster]:
    with running_safekeepers(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def server(tmp_path: Path, safekeepers: SafekeeperCluster) -> Iterator[PageserverProcess]:
    sources = [str(member.replication_address) for member in safekeepers.members]
    made = PageserverProcess(tmp_path / "pageserver", safekeepers.keys, wal_sources=sources)
    made.start()
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def postgres() -> Iterator[PlainPostgres]:
    build = build_of(NEWEST_VERSION)
    plain = PlainPostgres(build)
    make_owned_dir(plain.root)
    plain.create(PROPOSER_CONFIGURATION, initdb_template(build))
    yield plain
    plain.remove()


def arrive(server: PageserverProcess, lsn: Lsn) -> None:
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    while server.last_record_lsn(TENANT, TIMELINE) < lsn:
        assert time.monotonic() < deadline, server.log.read_text()[-3000:]
        time.sleep(0.02)


def test_wal_comes_from_whichever_safekeeper_lives(
    safekeepers: SafekeeperCluster, server: PageserverProcess, postgres: PlainPostgres
) -> None:
    server.created("/tenant", {"tenant_id": TENANT, "generation": 1})
    timeline = {"new_timeline_id": TIMELINE, "pg_version": NEWEST_VERSION}
    made = server.created(f"/tenant/{TENANT}/timeline", timeline)
    start_lsn = parse_lsn(made["last_record_lsn"])

    async def insert(rows: int) -> Lsn:
        async with await postgres.connect() as connection:
            await connection.execute("create table if not exists t (a int)")
            await connection.execute("insert into t select generate_series(1, %s)", [rows])
        return await postgres.flush_lsn()

    async def story() -> None:
        async with postgres.running():
            safekeepers.create_timeline(start_lsn, NEWEST_VERSION, await postgres.system_id())
            proposer = Proposer(
                tenant_id=TENANT,
                timeline_id=TIMELINE,
                safekeepers=safekeepers.addresses,
                token=safekeepers.token,
            )
            assert (await proposer.elect()).start_lsn == start_lsn
            async with running("proposer", proposer.stream(postgres.address)):
                await asyncio.to_thread(arrive, server, await insert(1000))
                for _ in range(3):
                    source = server.timeline(TENANT, TIMELINE)["wal_source"]
                    member = next(
                        each for each in safekeepers.members if str(each.replication_address) == source
                    )
                    member.kill()
                    await asyncio.to_thread(arrive, server, await insert(1000))
                    assert server.timeline(TENANT, TIMELINE)["wal_source"] not in (None, source)
                    await asyncio.to_thread(member.start)
                await asyncio.to_thread(server.kill)
                lsn = await insert(1000)
                await asyncio.to_thread(server.start)
                await asyncio.to_thread(arrive, server, lsn)
            proposer.close()

    asyncio.run(story())
    detail = server.timeline(TENANT, TIMELINE)
    assert parse_lsn(detail["remote_consistent_lsn"]) < parse_lsn(detail["last_record_lsn"])
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 5
    for member in safekeepers.members:
        member.kill()
    server.start()  # with nobody to ask for WAL: a clean stop has made the rest durable
    assert server.timeline(TENANT, TIMELINE)["remote_consistent_lsn"] == detail["last_record_lsn"]


def run_out(server: PageserverProcess) -> None:
    """As if the outage had lasted for the whole life of the token."""
    path = server.data_dir / "wal_access" / TENANT / TIMELINE
    held = msgspec.json.decode(path.read_bytes(), type=HeldAccess)
    past = UnixTime(held.asked_at - held.access.valid_for_s)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(held, asked_at=past)))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ARRIVAL_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_outage_of_the_controller_is_outlived_as_long_as_the_token_lives(
    safekeepers: SafekeeperCluster, server: PageserverProcess, postgres: PlainPostgres
) -> None:
    server.created("/tenant", {"tenant_id": TENANT, "generation": 1})
    timeline = {"new_timeline_id": TIMELINE, "pg_version": NEWEST_VERSION}
    start_lsn = parse_lsn(server.created(f"/tenant/{TENANT}/timeline", timeline)["last_record_lsn"])

    def warning() -> str:
        answer = httpx.get(f"http://{server.http_address}/healthz")
        assert answer.status_code == 200
        return str(answer.json()["warnings"].get("WAL access", ""))

    async def insert() -> Lsn:
        async with await postgres.connect() as connection:
            await connection.execute("create table if not exists t (a int)")
            await connection.execute("insert into t select generate_series(1, 1000)")
        return await postgres.flush_lsn()

    async def story() -> None:
        async with postgres.running():
            safekeepers.create_timeline(start_lsn, NEWEST_VERSION, await postgres.system_id())
            proposer = Proposer(
                tenant_id=TENANT,
                timeline_id=TIMELINE,
                safekeepers=safekeepers.addresses,
                token=safekeepers.token,
            )
            await proposer.elect()
            async with running("proposer", proposer.stream(postgres.address)):
                await asyncio.to_thread(arrive, server, await insert())
                server.controller.is_away = True
                await asyncio.to_thread(server.kill)
                lsn = await insert()
                await asyncio.to_thread(server.start)
                await asyncio.to_thread(arrive, server, lsn)
                assert warning() == "", "it goes on without asking"
                await asyncio.to_thread(server.kill)
                run_out(server)
                await asyncio.to_thread(server.start)
                late_lsn = await insert()
                await asyncio.to_thread(until, lambda: "only serve what they have" in warning())
                detail = server.timeline(TENANT, TIMELINE)
                assert parse_lsn(detail["last_record_lsn"]) < late_lsn
                assert "away" in detail["problem"]
                async with server.pages(TENANT, TIMELINE) as client:
                    assert await client.get_pages((0, 1664, 0, 1262, 0, 0), 1, lsn=start_lsn)
                server.controller.is_away = False
                await asyncio.to_thread(arrive, server, late_lsn)
                assert (warning(), server.timeline(TENANT, TIMELINE)["problem"]) == ("", None)
            proposer.close()

    asyncio.run(story())
