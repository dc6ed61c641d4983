"""Which LSN a user means: decided from how far WAL has come, and asked for until it is there."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn
from excimer.controller import branch_points, core
from excimer.controller.branch_points import (
    COMMIT_WAIT_S,
    WRITTEN_STALL_S,
    WRITTEN_WAIT_S_MAX,
    LsnNotReachedError,
    QuorumPosition,
    plan_point,
)
from tests.kit.storage_fakes import START_LSN, World, fake_world

TENANT, MAIN, BRANCH = TenantId("a" * 32), TimelineId("b" * 32), TimelineId("c" * 32)


def position(flush: int, majority: int, commit: int, *, has_writer: bool = True) -> QuorumPosition:
    return QuorumPosition(Lsn(flush), Lsn(majority), Lsn(commit), has_writer)


@pytest.mark.parametrize(
    ("end", "at", "waited_s", "stalled_s", "point"),
    [
        (800, position(1000, 1000, 800), 0.0, 0.0, 800),
        (900, position(1000, 1000, 800), 0.0, 0.0, None),
        (900, position(1000, 1000, 800), 9.0, COMMIT_WAIT_S, 800),
        (900, position(1000, 800, 800), 9.0, COMMIT_WAIT_S, None),
        (1008, position(1000, 1000, 1000), 0.0, 0.0, None),
        (1008, position(1000, 1000, 1000), WRITTEN_WAIT_S_MAX - 1, WRITTEN_STALL_S / 2, None),
        (900, position(1000, 1000, 800, has_writer=False), 0.0, 0.0, None),
        (900, position(1000, 1000, 800, has_writer=False), 9.0, COMMIT_WAIT_S, 800),
    ],
    ids=[
        "committed",
        "flushed, its commit may be under way",
        "within a record that is not whole",
        "flushed at a minority",
        "written by a compute, not sent",
        "WAL still comes",
        "nobody writes, its commit may be under way",
        "nobody writes, within a record that never became whole",
    ],
)
def test_what_an_lsn_stands_for(
    end: int, at: QuorumPosition, waited_s: float, stalled_s: float, point: int | None
) -> None:
    assert plan_point(Lsn(end), at, waited_s, stalled_s) == point


@pytest.mark.parametrize(
    ("at", "waited_s", "stalled_s"),
    [
        (position(1000, 1000, 1000, has_writer=False), 0.0, 0.0),
        (position(1000, 1000, 1000), 9.0, WRITTEN_STALL_S),
        (position(1000, 1000, 1000), WRITTEN_WAIT_S_MAX, 0.0),
        (position(1008, 1000, 1000), 9.0, WRITTEN_STALL_S),
    ],
    ids=["nobody writes towards it", "no more WAL came", "WAL never came so far", "only a minority has it"],
)
def test_an_lsn_of_the_future_is_refused(at: QuorumPosition, waited_s: float, stalled_s: float) -> None:
    with pytest.raises(LsnNotReachedError, match="has not reached LSN 0/3F0: it is at 0/3E8"):
        plan_point(Lsn(1008), at, waited_s, stalled_s)


def play(tmp_path: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            await world.controller.create_tenant(TENANT, MAIN, "shop", 18, True)
            await story(world)

    asyncio.run(asyncio.wait_for(main(), 30))


def has_come_to(world: World, lsn: int, commit_lsn: int | None = None, *, is_ingested: bool = True) -> None:
    """The pageserver has what is committed, or none of it yet."""
    world.pageserver.stands_still = not is_ingested
    for safekeeper in world.safekeepers:
        safekeeper.flush_lsn = lsn
        safekeeper.commit_lsn = lsn if commit_lsn is None else commit_lsn


async def branch_at(world: World, at: Lsn | str) -> Lsn | None:
    made = await world.controller.create_timeline("", BRANCH, "dev", ancestor="main", at=at, pg_version=None)
    return made.ancestor_lsn


def test_an_lsn_that_postgres_has_written_and_not_sent_yet_is_waited_for(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.safekeepers[0].writers = 1
        branching = asyncio.ensure_future(branch_at(world, Lsn(START_LSN + 800)))
        await asyncio.sleep(0.1)
        assert not branching.done()
        has_come_to(world, START_LSN + 800)
        assert await branching == START_LSN + 800

    play(tmp_path, story)


def test_a_page_header_is_the_end_of_the_record_before_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        border = (START_LSN // WAL_PAGE_SIZE_BYTES + 1) * WAL_PAGE_SIZE_BYTES
        has_come_to(world, border)
        assert await branch_at(world, Lsn(border + 24)) == border + 24  # the pageserver rounds it down

    play(tmp_path, story)


def test_within_a_record_that_is_not_whole_is_the_end_of_the_last_whole_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.safekeepers[0].writers = 1
        has_come_to(world, START_LSN + 8192, commit_lsn=START_LSN + 80)
        assert await branch_at(world, Lsn(START_LSN + 4096)) == START_LSN + 80

    play(tmp_path, story)


def test_every_operation_refuses_the_future_in_the_same_way(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        future = Lsn(START_LSN + 4096)
        controller = world.controller
        operations: list[Callable[[], Awaitable[object]]] = [
            lambda: branch_at(world, future),
            lambda: controller.point_in_branch("", "main", future),
            lambda: controller.history.restore("", "main", BRANCH, future, None),
            lambda: controller.create_endpoint(
                "ep",
                "",
                "main",
                mode="static",
                at=future,
                pg_version=None,
                ports=(5000, 5001),
                postgres_settings={},
            ),
        ]
        for operation in operations:
            with pytest.raises(LsnNotReachedError, match="has not reached LSN 0/1501060: it is"):
                await operation()
        assert await controller.list_endpoints() == []
        assert len(await controller.list_timelines(TENANT)) == 1

    play(tmp_path, story)


def test_old_history_is_read_while_no_quorum_answers(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for safekeeper in world.safekeepers:
            safekeeper.failing = True
        assert (await world.controller.point_in_branch("", "main", Lsn(START_LSN)))[1] == START_LSN
        with pytest.raises(RetryableError, match="0 of 3 safekeepers answered"):
            await world.controller.point_in_branch("", "main", Lsn(START_LSN + 8))

    play(tmp_path, story)


def test_a_time_that_a_pageserver_behind_does_not_know_is_asked_for_again(tmp_path: Path) -> None:
    """It knew no later commit, which is the answer of one that has not ingested it yet."""

    async def story(world: World) -> None:
        has_come_to(world, START_LSN + 4096, is_ingested=False)
        world.pageserver.newest_lsn = START_LSN + 8
        branching = asyncio.ensure_future(branch_at(world, "2026-01-01T00:00:00Z"))
        await asyncio.sleep(0.2)
        assert not branching.done()
        world.pageserver.stands_still = False
        world.pageserver.newest_lsn = None
        assert await branching == START_LSN + 2026

    play(tmp_path, story)


def test_a_pageserver_that_stands_still_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch_points, "INGEST_STALL_S", 0.1)

    async def story(world: World) -> None:
        has_come_to(world, START_LSN + 4096, is_ingested=False)
        world.pageserver.newest_lsn = START_LSN + 8
        with pytest.raises(RetryableError, match="up to 0/1500060 and not yet up to 0/1501060"):
            await branch_at(world, "2026-01-01T00:00:00Z")

    play(tmp_path, story)


def test_a_damaged_branch_is_not_waited_for_and_named_as_such(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        has_come_to(world, START_LSN + 4096)
        world.pageserver.timelines[MAIN] |= {
            "is_damaged": True,
            "problem": "manifest index-1-2 is damaged",
            "last_record_lsn": "0/0",
        }
        async with asyncio.timeout(branch_points.INGEST_STALL_S / 2):
            with pytest.raises(RefusedError, match="manifest index-1-2 is damaged"):
                await branch_at(world, Lsn(START_LSN + 4096))

    play(tmp_path, story)


@pytest.mark.parametrize("waiting", ["branch", "restore", "archive"])
def test_nobody_waits_behind_one_that_waits_for_ingest(tmp_path: Path, waiting: str) -> None:
    async def story(world: World) -> None:
        controller = world.controller
        other, third = TimelineId("0b" * 16), TimelineId("0c" * 16)
        await controller.create_timeline("", other, "other", ancestor="main", at=None, pg_version=None)
        has_come_to(world, START_LSN + 4096, is_ingested=False)
        if waiting == "branch":
            held: Awaitable[object] = branch_at(world, Lsn(START_LSN + 4096))
        elif waiting == "restore":
            held = controller.history.restore("", "main", BRANCH, Lsn(START_LSN + 4096), None)
        else:
            held = controller.history.archive("", "other")
        operation = asyncio.ensure_future(held)
        await asyncio.sleep(0.1)
        async with asyncio.timeout(10):
            await controller.create_timeline(
                "", third, "third", ancestor="main", at=Lsn(START_LSN), pg_version=None
            )
            await controller.create_endpoint(
                "ep",
                "",
                "third",
                mode="primary",
                at=None,
                pg_version=None,
                ports=(5000, 5001),
                postgres_settings={},
            )
            await controller.delete_endpoint("ep")
            assert await controller.delete_timeline("", "third")
        assert not operation.done()
        world.pageserver.stands_still = False
        await operation

    play(tmp_path, story)


def test_a_name_that_has_become_another_branch_meanwhile_is_not_branched(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        other = TimelineId("0b" * 16)
        has_come_to(world, START_LSN + 4096, is_ingested=False)
        branching = asyncio.ensure_future(branch_at(world, Lsn(START_LSN + 4096)))
        await asyncio.sleep(0.1)
        await world.controller.history.restore("", "main", other, Lsn(START_LSN), None)
        world.pageserver.stands_still = False
        with pytest.raises(core.BranchChangedError, match="'main' has just become another"):
            await branching
        assert BRANCH not in {row.timeline_id for row in await world.controller.list_timelines(TENANT)}

    play(tmp_path, story)
