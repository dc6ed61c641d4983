"""Imports as the controller sees them: hidden until whole, settled when whoever sends has gone."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import format_lsn
from excimer.controller.imports import START_WAIT_S
from excimer.controller.model import NameTakenError, UnknownNameError
from tests.kit.storage_fakes import START_LSN, SYSTEM_ID, World, fake_world

TENANT, MAIN = TenantId("a" * 32), TimelineId("b" * 32)
FIRST, SECOND = TimelineId("c" * 32), TimelineId("d" * 32)


def play(tmp_path: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            await world.controller.create_tenant(TENANT, MAIN, "shop", 18, True)
            await story(world)

    asyncio.run(asyncio.wait_for(main(), 30))


def arrive(world: World, timeline_id: TimelineId) -> None:
    """The pageserver has it whole."""
    world.pageserver.importing.discard(timeline_id)
    world.pageserver.timelines[timeline_id] = {
        "timeline_id": timeline_id,
        "pg_version": 17,
        "system_id": SYSTEM_ID + 1,
        "wal_segment_size": 1 << 26,
        "last_record_lsn": format_lsn(START_LSN + 0x100),
        "ancestor_lsn": None,
    }


async def names(world: World) -> list[str]:
    return [row.name for row in await world.controller.list_timelines(TENANT)]


def age(world: World, timeline_id: TimelineId) -> None:
    """As if it had been begun long ago."""
    row = next(row for row in world.store.list_timelines(TENANT) if row.timeline_id == timeline_id)
    world.store.put_timeline(msgspec.structs.replace(row, created_at=row.created_at - START_WAIT_S))


def test_a_branch_shows_when_it_is_whole(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        imports = world.controller.imports
        begun = await imports.begin("shop", FIRST, "moved", 17)
        assert begun.pageserver_http_address.startswith("127.0.0.1:")
        assert await names(world) == ["main"]
        with pytest.raises(UnknownNameError):
            await world.controller.find_branch(TENANT, "moved")
        with pytest.raises(UnknownNameError, match="no branch 'moved'"):
            await world.controller.create_timeline(
                "shop", SECOND, "child", ancestor="moved", at=None, pg_version=None
            )
        with pytest.raises(UnknownNameError, match="nothing was imported"):
            await imports.finish("shop", FIRST)
        arrive(world, FIRST)
        branch = await imports.finish("shop", FIRST)
        assert (branch.state, branch.start_lsn, branch.system_id) == (
            "active",
            START_LSN + 0x100,
            SYSTEM_ID + 1,
        )
        for safekeeper in world.safekeepers:
            assert safekeeper.timelines[FIRST]["start_lsn"] == format_lsn(START_LSN + 0x100)
            assert safekeeper.timelines[FIRST]["wal_segment_size"] == 1 << 26
        assert await imports.finish("shop", FIRST) == branch
        with pytest.raises(NameTakenError):
            await imports.begin("shop", SECOND, "moved", 17)

    play(tmp_path, story)


def test_a_second_try_takes_over_what_was_broken_off(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        imports = world.controller.imports
        await imports.begin("shop", FIRST, "moved", 17)
        world.pageserver.importing.add(FIRST)
        with pytest.raises(NameTakenError, match="is being imported now"):
            await imports.begin("shop", SECOND, "moved", 17)
        world.pageserver.importing.clear()
        await imports.begin("shop", SECOND, "moved", 17)
        rows = [row for row in world.store.list_timelines(TENANT) if row.name == "moved"]
        assert [row.timeline_id for row in rows] == [SECOND]
        await imports.abandon("shop", SECOND)
        assert [row.name for row in world.store.list_timelines(TENANT)] == ["main"]

    play(tmp_path, story)


def test_what_nobody_finishes_is_settled(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        imports = world.controller.imports
        await imports.begin("shop", FIRST, "whole", 17)
        await imports.begin("shop", SECOND, "broken", 17)
        await world.controller.reconcile()
        assert len(world.store.list_timelines(TENANT)) == 3, "they may be on their way"
        age(world, FIRST)
        age(world, SECOND)
        world.pageserver.importing |= {FIRST, SECOND}
        await world.controller.reconcile()
        assert len(world.store.list_timelines(TENANT)) == 3, "they go on"
        arrive(world, FIRST)
        world.pageserver.importing.clear()
        await world.controller.reconcile()
        assert sorted(await names(world)) == ["main", "whole"]
        assert len(world.store.list_timelines(TENANT)) == 2

    play(tmp_path, story)


def test_a_tenant_goes_with_its_imports(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.controller.imports.begin("shop", FIRST, "moved", 17)
        assert await world.controller.delete_tenant("shop")
        assert world.store.list_timelines(TENANT) == []

    play(tmp_path, story)
