"""Creation and deletion through failures: nothing half made stays visible, everything comes to its end."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.controller.branch_points import QuorumUnreachableError
from excimer.controller.model import BadRequestError, NameTakenError
from excimer.wire.auth import Right, TokenVerifier
from tests.kit.storage_fakes import KEYS, START_LSN, SYSTEM_ID, World, fake_world

TENANT, MAIN, BRANCH = TenantId("a" * 32), TimelineId("b" * 32), TimelineId("c" * 32)


def play(tmp_path: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            await story(world)

    asyncio.run(asyncio.wait_for(main(), 30))


async def make_tenant(world: World) -> None:
    await world.controller.create_tenant(TENANT, MAIN, "shop", 18, True)


async def make_branch(world: World, at: Lsn | str | None = None, ancestor: str | None = "main") -> None:
    await world.controller.create_timeline(
        "shop", BRANCH, "dev", ancestor=ancestor, at=at, pg_version=None if ancestor else 17
    )


def test_the_whole_life(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await make_tenant(world)
        await make_tenant(world)
        for safekeeper in world.safekeepers:
            safekeeper.flush_lsn = safekeeper.commit_lsn = START_LSN + 64
        await make_branch(world, at=Lsn(START_LSN + 64))
        assert world.pageserver.tenants == {TENANT}
        branch = await world.controller.find_branch(TENANT, "dev")
        assert (branch.start_lsn, branch.ancestor_lsn) == (START_LSN + 64, START_LSN + 64)
        for safekeeper in world.safekeepers:
            assert set(safekeeper.timelines) == {MAIN, BRANCH}
            assert safekeeper.timelines[BRANCH]["system_id"] == SYSTEM_ID
        await world.controller.create_endpoint(
            "ep",
            "",
            "dev",
            mode="primary",
            at=None,
            pg_version=18,
            ports=(5000, 5001),
            postgres_settings={"a.b": "c"},
        )
        spec = await world.controller.read_spec("ep")
        assert spec.safekeepers == ("127.0.0.1:551", "127.0.0.1:552", "127.0.0.1:553")
        assert spec.tokens.write_wal is not None
        expected: list[tuple[str, list[Right]]] = [
            (spec.tokens.read_pages, [Right.READ_PAGES]),
            (spec.tokens.write_wal, [Right.WRITE_WAL]),
            (spec.tokens.renewal, []),
        ]
        for token, rights in expected:
            claims = TokenVerifier(KEYS.public_pem).verify(token, 0)
            assert (claims.holder, sorted(claims.rights)) == ("endpoint:ep", rights)
            assert (claims.tenant_id, claims.timeline_id) == (TENANT, spec.endpoint.timeline_id)
            assert claims.exp is not None
        for wrong in (world.controller.delete_timeline("", "main"), world.controller.delete_tenant("")):
            with pytest.raises(RefusedError):
                await wrong
        await world.controller.delete_endpoint("ep")
        assert await world.controller.delete_timeline("shop", "dev")
        assert await world.controller.delete_tenant("shop")
        assert world.pageserver.tenants == set()
        assert all(not safekeeper.timelines for safekeeper in world.safekeepers)
        assert world.store.list_tenants() == []

    play(tmp_path, story)


def test_a_static_endpoint_that_is_let_go_gives_its_moment_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await make_tenant(world)
        for number, mode in enumerate(("primary", "static")):
            await world.controller.create_endpoint(
                mode,
                "shop",
                "main",
                mode="static" if mode == "static" else "primary",
                at=Lsn(START_LSN) if mode == "static" else None,
                pg_version=None,
                ports=(5000 + number, 6000 + number),
                postgres_settings={},
            )
        assert (await world.controller.read_spec("static")).lease_holder == "endpoint:static"
        others = [(MAIN, "endpoint-another"), (BRANCH, "endpoint:static")]
        world.pageserver.leases = [(MAIN, "endpoint:static"), *others]
        assert await world.controller.release_endpoint("primary") == 0
        assert await world.controller.release_endpoint("static") == 1
        assert await world.controller.release_endpoint("static") == 0
        assert world.pageserver.leases == others
        world.pageserver.leases.append((MAIN, "endpoint:static"))
        world.pageserver.failing = True
        assert await world.controller.release_endpoint("static") == 0  # it runs out by itself
        world.pageserver.failing = False
        await world.controller.delete_endpoint("static")
        assert world.pageserver.leases == others

    play(tmp_path, story)


def test_a_failed_creation_leaves_nothing_visible(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.safekeepers[0].failing = world.safekeepers[1].failing = True
        with pytest.raises(QuorumUnreachableError, match="1 of 3 safekeepers answered, 2 are needed"):
            await make_tenant(world)
        assert (await world.controller.list_tenants())[0] == []
        with pytest.raises(BadRequestError, match="use a new id"):
            await make_tenant(world)
        world.safekeepers[0].failing = world.safekeepers[1].failing = False
        await world.controller.reconcile()
        assert world.pageserver.timelines == {}
        assert world.safekeepers[2].timelines == {}
        await make_tenant(world)
        world.pageserver.refusing = True
        with pytest.raises(RefusedError, match="pageserver 1: not to my taste"):
            await make_branch(world)
        world.pageserver.refusing = False
        assert [row.name for row in await world.controller.list_timelines(TENANT)] == ["main"]

    play(tmp_path, story)


def test_a_safekeeper_that_was_away_gets_the_timeline_later(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.safekeepers[2].failing = True
        await make_tenant(world)
        assert world.safekeepers[2].timelines == {}
        await world.controller.reconcile()
        world.safekeepers[2].failing = False
        await world.controller.reconcile()
        assert set(world.safekeepers[2].timelines) == {MAIN}

    play(tmp_path, story)


def test_a_deletion_is_finished_later(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await make_tenant(world)
        await make_branch(world)
        world.safekeepers[1].failing = True
        assert not await world.controller.delete_timeline("shop", "dev")
        assert [row.name for row in await world.controller.list_timelines(TENANT)] == ["main"]
        assert not await world.controller.delete_tenant("shop")
        assert (await world.controller.list_tenants())[0] == []
        world.safekeepers[1].failing = False
        await world.controller.reconcile()
        assert world.safekeepers[1].timelines == {}
        assert world.store.list_tenants() == []

    play(tmp_path, story)


def test_a_controller_killed_in_mid_creation_goes_on(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await make_tenant(world)
        tenant, timeline = world.store.list_tenants()[0], world.store.list_timelines()[0]
        half = msgspec.structs.replace(timeline, timeline_id=BRANCH, name="half", state="creating")
        lost = msgspec.structs.replace(
            half, timeline_id=TimelineId("d" * 32), name="lost", ancestor_timeline_id=MAIN, start_lsn=None
        )
        world.store.put_tenant(msgspec.structs.replace(tenant, state="creating"))
        world.store.put_timeline(half)
        world.store.put_timeline(lost)
        await world.controller.reconcile()
        states = {row.name: row.state for row in world.store.list_timelines()}
        assert states == {"main": "active", "half": "active"}
        assert world.store.list_tenants()[0].state == "active"
        assert set(world.safekeepers[0].timelines) == {MAIN, BRANCH}

    play(tmp_path, story)


def test_a_branch_at_the_head_includes_every_acknowledged_commit(tmp_path: Path) -> None:
    """Two safekeepers have flushed a commit whose commit LSN arrives a moment later; one lags."""

    async def story(world: World) -> None:
        await make_tenant(world)
        for safekeeper in world.safekeepers[1:]:
            safekeeper.flush_lsn = START_LSN + 100
        world.safekeepers[2].failing = True

        async def catch_up() -> None:
            await asyncio.sleep(0.1)
            world.safekeepers[1].commit_lsn = START_LSN + 100

        catching_up = asyncio.ensure_future(catch_up())
        await make_branch(world)
        await catching_up
        branch = await world.controller.find_branch(TENANT, "dev")
        assert branch.start_lsn == START_LSN + 100
        world.safekeepers[1].failing = True
        with pytest.raises(RetryableError, match="1 of 3 safekeepers answered"):
            await world.controller.create_timeline(
                "shop", TimelineId("e" * 32), "later", ancestor="main", at=None, pg_version=None
            )

    play(tmp_path, story)


def test_branch_points(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await make_tenant(world)
        with pytest.raises(RefusedError, match="before the history"):
            await make_branch(world, at=Lsn(8))
        await world.controller.create_timeline(
            "shop", TimelineId("e" * 32), "then", ancestor="main", at="2026-01-01T00:00:00Z", pg_version=None
        )
        then = await world.controller.find_branch(TENANT, "then")
        assert then.start_lsn == START_LSN + 2026
        with pytest.raises(NameTakenError):
            await world.controller.create_timeline(
                "shop", TimelineId("f" * 32), "then", ancestor="main", at=None, pg_version=None
            )
        with pytest.raises(BadRequestError, match="needs a PostgreSQL version"):
            await world.controller.create_timeline(
                "shop", TimelineId("f" * 32), "root", ancestor=None, at=None, pg_version=None
            )

    play(tmp_path, story)


def test_a_pageserver_that_lost_its_disk_gets_its_tenants_again(tmp_path: Path) -> None:
    """With a new generation each time, which is durable even if the pageserver does not hear of it."""

    async def story(world: World) -> None:
        await make_tenant(world)
        await world.controller.reconcile()
        assert world.pageserver.generations == {TENANT: 1}
        world.pageserver.tenants.clear()
        await world.controller.reconcile()
        assert world.pageserver.tenants == {TENANT}
        assert world.pageserver.generations == {TENANT: 2}
        world.pageserver.tenants.clear()
        world.pageserver.refusing = True
        await world.controller.reconcile()
        world.pageserver.refusing = False
        await world.controller.reconcile()
        assert world.pageserver.generations == {TENANT: 4}
        assert [row.generation for row in world.store.list_tenants()] == [4]
        world.pageserver.failing = True
        await world.controller.reconcile()
        assert [row.generation for row in world.store.list_tenants()] == [4]

    play(tmp_path, story)
