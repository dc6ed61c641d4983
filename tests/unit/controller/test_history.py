"""Restore, reset, archive and detach through failures and deaths: done whole, later, or not at all."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.controller import branch_history as plan
from excimer.controller.core import BranchArchivedError
from excimer.controller.history_operations import BranchDamagedError, BranchInUseError
from excimer.controller.model import BadRequestError, InUseError, NameTakenError, Timeline
from excimer.controller.shell import Controller
from excimer.controller.tokens import TokenMaker
from excimer.service.tasks import SystemClock
from tests.kit.storage_fakes import KEYS, START_LSN, World, fake_world

TENANT, MAIN = TenantId("a" * 32), TimelineId("b" * 32)
NEW, OTHER, DEV, TEST = (TimelineId(letter * 32) for letter in "cdef")


class DiedError(BaseException):
    """The controller's process is gone."""


def play(tmp_path: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            await world.controller.create_tenant(TENANT, MAIN, "shop", 18, True)
            await story(world)

    asyncio.run(asyncio.wait_for(main(), 30))


async def branch(world: World, timeline_id: TimelineId, name: str, at: int, ancestor: str = "main") -> None:
    """The WAL reaches so far for that moment: the fakes have one position for all timelines."""
    before = world.safekeepers[0].commit_lsn - START_LSN
    write(world, max(at, before))
    try:
        await world.controller.create_timeline(
            "", timeline_id, name, ancestor=ancestor, at=Lsn(START_LSN + at), pg_version=None
        )
    finally:
        write(world, before)


async def endpoint(world: World, name: str, branch: str, port: int, lsn: int | None = None) -> None:
    await world.controller.create_endpoint(
        name,
        "",
        branch,
        mode="primary" if lsn is None else "static",
        at=None if lsn is None else Lsn(START_LSN + lsn),
        pg_version=None,
        ports=(port, port + 1),
        postgres_settings={},
    )


def write(world: World, lsn: int) -> None:
    """All timelines' WAL ends there now, as the safekeepers see it."""
    for safekeeper in world.safekeepers:
        safekeeper.flush_lsn = safekeeper.commit_lsn = START_LSN + lsn


async def names(world: World) -> dict[str, TimelineId]:
    return {row.name: row.timeline_id for row in await world.controller.list_timelines(TENANT)}


async def served(world: World) -> dict[str, TimelineId]:
    return {each.name: each.timeline_id for each, _ in await world.controller.list_endpoints()}


async def row_of(world: World, name: str) -> Timeline:
    return await world.controller.find_branch(TENANT, name)


def test_restore_gives_the_name_and_its_endpoints_to_the_past(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        write(world, 1000)
        await endpoint(world, "ep", "main", 5000)
        await endpoint(world, "before", "main", 5002, lsn=50)
        await endpoint(world, "after", "main", 5004, lsn=200)
        for _ in range(2):
            new, _ = await world.controller.history.restore("", "main", NEW, Lsn(START_LSN + 100), None)
            assert (new.timeline_id, new.ancestor_lsn, new.state) == (NEW, START_LSN + 100, "active")
        known = await names(world)
        old = next(name for name in known if name != "main")
        assert old.startswith("main_old_2")
        assert known == {"main": NEW, old: MAIN}
        assert await served(world) == {"ep": NEW, "before": NEW, "after": MAIN}
        assert (await world.controller.read_spec("ep")).branch_name == "main"
        assert all(NEW in safekeeper.timelines for safekeeper in world.safekeepers)
        await world.controller.history.restore("", "main", OTHER, "2026-01-01T00:00:00Z", "yesterday")
        assert await names(world) == {"main": OTHER, old: MAIN, "yesterday": NEW}
        with pytest.raises(NameTakenError):
            await world.controller.history.restore("", "main", DEV, Lsn(START_LSN), "yesterday")

    play(tmp_path, story)


def test_copies_of_a_branch_are_quiet_and_the_branch_itself_goes_on(tmp_path: Path) -> None:
    """What each does on the outside: under which id subscriptions are disabled, and whether workers run."""

    async def story(world: World) -> None:
        async def outside(name: str) -> tuple[str | None, bool]:
            row = await row_of(world, name)
            return row.quieting_id, row.extension_workers

        history = world.controller.history
        assert await outside("main") == (None, True)
        await branch(world, DEV, "dev", 1000)
        assert await outside("dev") == (DEV, False)
        write(world, 1000)
        await history.activate("", "dev")
        assert await outside("dev") == (None, True)
        await history.restore("", "dev", OTHER, Lsn(START_LSN + 500), "was")
        assert await outside("dev") == (OTHER, True)
        assert await outside("was") == (OTHER, False), "another quieting than one it may have had"
        await history.restore("", "main", NEW, Lsn(START_LSN + 500), "past", keeps_subscriptions=True)
        assert await outside("main") == (None, True)
        assert await outside("past") == (NEW, False)
        await history.reset("", "was", TEST, None)
        assert await outside("was") == (TEST, False)

    play(tmp_path, story)


def test_the_spec_of_an_endpoint_says_what_its_branch_does_by_itself(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await branch(world, DEV, "dev", 1000)
        await endpoint(world, "dev", "dev", 5000)
        spec = await world.controller.read_spec("dev")
        assert (spec.quieting_id, spec.extension_workers) == (DEV, False)
        await endpoint(world, "main", "main", 6000)
        spec = await world.controller.read_spec("main")
        assert (spec.quieting_id, spec.extension_workers) == (None, True)

    play(tmp_path, story)


def test_a_restore_that_fails_changes_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        write(world, 1000)
        await endpoint(world, "ep", "main", 5000)
        world.safekeepers[1].writers = 1
        with pytest.raises(BranchInUseError, match=r"running on branch 'main' \(endpoints: ep\): stop it"):
            await world.controller.history.restore("", "main", NEW, Lsn(START_LSN + 8), None)
        world.safekeepers[1].writers = 0
        with pytest.raises(RefusedError, match="before the history"):
            await world.controller.history.restore("", "main", NEW, Lsn(8), None)
        with pytest.raises(BadRequestError, match="has not reached LSN"):
            await world.controller.history.restore("", "main", DEV, Lsn(START_LSN + 1008), None)
        world.safekeepers[0].failing = world.safekeepers[1].failing = True
        with pytest.raises(RetryableError):
            await world.controller.history.restore("", "main", OTHER, Lsn(START_LSN + 8), None)
        world.safekeepers[0].failing = world.safekeepers[1].failing = False
        assert await names(world) == {"main": MAIN}
        assert await served(world) == {"ep": MAIN}
        await world.controller.reconcile()
        assert set(world.pageserver.timelines) == {MAIN}
        assert [row.timeline_id for row in world.store.list_timelines()] == [MAIN]

    play(tmp_path, story)


@pytest.mark.parametrize("step", range(1, 9))
def test_a_controller_that_dies_in_a_restore_finishes_or_forgets_it(tmp_path: Path, step: int) -> None:
    """Killed at its `step`-th write to the database; the next controller has only what is in there."""

    async def story(world: World) -> None:
        write(world, 1000)
        await endpoint(world, "ep", "main", 5000)
        writes = 0

        async def db(self: object, call: Callable[..., object], *arguments: object) -> object:
            nonlocal writes
            writes += call.__name__.startswith(("put", "replace", "remove"))
            if writes >= step:
                raise DiedError
            return call(*arguments)

        with (
            patch.object(Controller, "_db", db),
            patch("excimer.controller.history_operations.BranchHistory._db", db),
        ):
            try:
                await world.controller.history.restore("", "main", NEW, Lsn(START_LSN + 64), None)
            except DiedError:
                assert await asyncio.to_thread(world.store.list_timelines)
        successor = Controller(world.store, TokenMaker(KEYS.private_pem, SystemClock()), SystemClock())
        world.controller = successor
        await successor.reconcile()
        await successor.reconcile()
        known = await names(world)
        assert known["main"] in (MAIN, NEW)
        assert await served(world) == {"ep": known["main"]}
        is_done = known["main"] == NEW
        assert len(known) == 1 + is_done
        assert set(world.pageserver.timelines) == ({MAIN, NEW} if is_done else {MAIN})
        assert all(row.state == "active" for row in world.store.list_timelines())
        await successor.history.restore("", "main", OTHER, Lsn(START_LSN + 32), None)
        assert (await names(world))["main"] == OTHER

    play(tmp_path, story)


def test_reset_takes_the_parents_head_and_drops_what_nobody_needs(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        write(world, 1000)
        await branch(world, DEV, "dev", 64)
        await endpoint(world, "ep", "dev", 5000)
        new, old = await world.controller.history.reset("", "dev", NEW, None)
        assert (old, new.ancestor_timeline_id, new.ancestor_lsn) == (None, MAIN, START_LSN + 1000)
        assert await names(world) == {"main": MAIN, "dev": NEW}
        assert await served(world) == {"ep": NEW}
        assert set(world.pageserver.timelines) == {MAIN, NEW}
        await branch(world, TEST, "test", 128, ancestor="dev")
        _, old = await world.controller.history.reset("", "dev", OTHER, None)
        assert old is not None
        assert old.name.startswith("dev_old_")
        assert (await row_of(world, "test")).ancestor_timeline_id == NEW
        with pytest.raises(BadRequestError, match="'main' has no parent"):
            await world.controller.history.reset("", "main", TimelineId("9" * 32), None)

    play(tmp_path, story)


def test_archived_branches_serve_nobody(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        history = world.controller.history
        await branch(world, DEV, "dev", 64)
        await endpoint(world, "ep", "dev", 5000)
        with pytest.raises(InUseError, match="archive dev first"):
            await history.archive("", "main")
        world.pageserver.refusing = True
        with pytest.raises(RefusedError, match="not to my taste"):
            await history.archive("", "dev")
        assert (await row_of(world, "dev")).state == "active"
        world.pageserver.refusing = False
        assert (await history.archive("", "dev")).state == "archived"
        assert (await history.archive("", "dev")).state == "archived"
        assert (await history.archive("", "main")).state == "archived"
        for use in (
            world.controller.read_spec("ep"),
            branch(world, TEST, "test", 64, ancestor="dev"),
            endpoint(world, "more", "dev", 5010),
            history.restore("", "dev", NEW, Lsn(START_LSN + 70), None),
            history.lsn_at("", "dev", "2026-01-01T00:00:00Z"),
        ):
            with pytest.raises(BranchArchivedError, match="excimer timeline unarchive dev"):
                await use
        with pytest.raises(InUseError, match="unarchive main first"):
            await history.unarchive("", "dev")
        assert (await history.unarchive("", "main")).state == "active"
        assert (await history.unarchive("", "dev")).state == "active"
        assert await world.controller.read_spec("ep")

    play(tmp_path, story)


def test_archiving_and_detaching_go_on_when_the_pageserver_is_back(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        history = world.controller.history
        await branch(world, DEV, "dev", 64)
        await branch(world, TEST, "test", 64)
        world.pageserver.failing = True
        assert (await history.archive("", "test")).state == "archiving"
        assert (await history.detach("", "dev")).state == "detaching"
        await world.controller.reconcile()
        world.pageserver.failing = False
        await world.controller.reconcile()
        states = {row.name: row.state for row in await world.controller.list_timelines(TENANT)}
        assert states == {"main": "active", "dev": "active", "test": "archived"}
        assert world.pageserver.timelines[TEST]["is_archived"]
        assert (await row_of(world, "dev")).ancestor_timeline_id is None
        assert (await row_of(world, "test")).ancestor_timeline_id == DEV

    play(tmp_path, story)


def test_archiving_waits_until_the_pageserver_has_all(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        write(world, 2000)
        world.pageserver.stands_still = True
        archiving = asyncio.ensure_future(world.controller.history.archive("", "main"))
        await asyncio.sleep(0.2)
        assert not archiving.done()
        world.pageserver.timelines[MAIN]["last_record_lsn"] = format_lsn(START_LSN + 2000)
        assert (await archiving).state == "archived"

    play(tmp_path, story)


def test_a_detached_branch_takes_its_elder_siblings_along(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for timeline_id, name, at in ((DEV, "dev", 64), (TEST, "early", 32), (OTHER, "late", 96)):
            await branch(world, timeline_id, name, at)
        for _ in range(2):
            assert (await world.controller.history.detach("", "dev")).ancestor_timeline_id is None
        rows = {row.name: row for row in await world.controller.list_timelines(TENANT)}
        assert (rows["early"].ancestor_timeline_id, rows["early"].ancestor_lsn) == (DEV, START_LSN + 32)
        assert rows["late"].ancestor_timeline_id == MAIN
        assert await world.controller.delete_timeline("", "late")
        assert await world.controller.delete_timeline("", "main")
        with pytest.raises(InUseError, match="delete early first"):
            await world.controller.delete_timeline("", "dev")

    play(tmp_path, story)


def test_questions(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        history = world.controller.history
        assert await history.lsn_at("", "main", "2026-01-01T00:00:00Z") == START_LSN + 2026
        assert await history.timestamp_of("", "main", Lsn(START_LSN + 2026)) == "2026-01-01T00:00:00Z"
        tenant, sizes = await history.sizes("")
        assert (tenant.name, sizes["synthetic_size_bytes"]) == ("shop", 16384)
        assert [row["name"] for row in sizes["timelines"]] == ["main"]

    play(tmp_path, story)


def test_a_damaged_branch_is_named_and_can_be_reset(tmp_path: Path) -> None:
    """The pageserver cannot read it: it is not archived, now or later; its parent's state takes its place."""

    async def story(world: World) -> None:
        history = world.controller.history
        await branch(world, DEV, "dev", 8)
        write(world, 800)
        world.pageserver.timelines[DEV] |= {
            "is_damaged": True,
            "problem": "manifest index-1-2 is damaged",
            "last_record_lsn": "0/0",
        }
        _, sizes = await history.sizes("")
        assert [row["name"] for row in sizes["timelines"]] == ["main"]
        assert sizes["damaged"] == [
            {"timeline_id": DEV, "reason": "manifest index-1-2 is damaged", "name": "dev"}
        ]
        for change in (history.archive, history.detach):
            with pytest.raises(BranchDamagedError, match="index-1-2"):
                await change("", "dev")
        assert (await history.unarchive("", "dev")).state == "active"  # which it was before
        assert (await world.controller.find_branch(TENANT, "dev")).state == "active"
        await world.controller.reconcile()
        assert not world.pageserver.timelines[DEV].get("is_archived")
        new, old = await history.reset("", "dev", NEW, None)
        assert (new.timeline_id, new.name, old) == (NEW, "dev", None)
        assert DEV not in world.pageserver.timelines

    play(tmp_path, story)


def test_generated_names_are_legal_and_free(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        rows = await world.controller.list_timelines(TENANT)
        long = "x" * 63
        first = plan.old_name(rows, long, 1_769_860_800.0)
        assert first == "x" * 40 + "_old_20260131T120000Z"
        assert len(first) <= 63
        await branch(world, DEV, "main_old_20260131T120000Z", 8)
        rows = await world.controller.list_timelines(TENANT)
        assert plan.old_name(rows, "main", 1_769_860_800.0) == "main_old_20260131T120000Z_2"

    play(tmp_path, story)
