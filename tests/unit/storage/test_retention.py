"""Who keeps which LSN readable: branch points, leases, the cutoff, and reads at the edge of them."""

import asyncio
from functools import partial
from pathlib import Path

import msgspec
import pytest

from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.storage.engine.errors import LsnTooOldError
from excimer.storage.engine.timeline import Timeline
from excimer.storage.plan.branch import BranchPointError
from excimer.storage.plan.retention import (
    NOBODY,
    NotRetainedError,
    RetainedLsns,
    Retention,
    plan_cutoff,
)
from tests.kit.storage_oracle import IMPORTED, MAP_KEY
from tests.kit.storage_world import (
    MAIN,
    START,
    attach,
    in_event_loop,
    new_main,
    put,
    size_value,
    storage_context,
)
from tests.unit.storage.test_timeline import SIZE

CHILD, GRANDCHILD, LATE = (TimelineId(digit * 32) for digit in "234")


def asyncio_now() -> float:
    return asyncio.get_running_loop().time()


async def advance_oldest(timeline: Timeline, lsn: int) -> None:
    await timeline.flush()
    manifest = msgspec.structs.replace(timeline.manifest, oldest_lsn=lsn)
    await timeline.in_thread(partial(timeline.commits.commit_layers, manifest, []))


def test_points_below_the_cutoff_are_those_held() -> None:
    retention = Retention("main", 100, attached_at_s=0.0)
    retention.hold_branch("a", Lsn(150), now_s=1.0)
    retention.hold_branch("b", Lsn(150), now_s=1.0)
    retention.hold_branch("c", Lsn(300), now_s=1.0)
    assert retention.lease(Lsn(120), now_s=1.0, length_s=10.0) == 11.0
    retention.raise_cutoff(Lsn(200))
    assert retention.retained(now_s=5.0) == RetainedLsns(Lsn(200), (Lsn(120), Lsn(150)), (Lsn(300),))
    retention.release_branch("a")
    assert retention.retained(now_s=11.0) == RetainedLsns(Lsn(200), (Lsn(150),), (Lsn(300),))
    retention.release_branch("b")
    assert retention.retained(now_s=11.0).points == ()
    assert retention.branch_points() == {"c": 300}


def test_nothing_new_is_held_below_an_announced_cutoff() -> None:
    retention = Retention("main", 100, attached_at_s=0.0)
    retention.lease(Lsn(150), now_s=0.0, length_s=10.0)
    retention.keep_branch("a", Lsn(160))
    retention.raise_cutoff(Lsn(200))
    retention.raise_cutoff(Lsn(180))  # it never falls
    with pytest.raises(NotRetainedError):
        retention.hold_branch("b", Lsn(199), now_s=0.0)
    with pytest.raises(NotRetainedError):
        retention.lease(Lsn(170), now_s=0.0, length_s=10.0)
    retention.hold_branch("b", Lsn(160), now_s=0.0)  # it is there for another
    assert retention.lease(Lsn(150), now_s=9.0, length_s=10.0) == 19.0
    with pytest.raises(NotRetainedError):
        retention.lease(Lsn(150), now_s=19.0, length_s=10.0)


def test_a_lease_given_back_is_the_holders_alone() -> None:
    retention = Retention("main", 100, attached_at_s=0.0)
    for lsn, holder in ((150, "export"), (150, "endpoint"), (160, "export"), (170, NOBODY)):
        retention.lease(Lsn(lsn), now_s=0.0, length_s=10.0, holder=holder)
    retention.raise_cutoff(Lsn(200))
    assert retention.release_leases(NOBODY) == 0
    assert retention.release_leases("export") == 2
    assert retention.release_leases("export") == 0
    assert retention.retained(now_s=5.0).points == (150, 170)
    assert not retention.is_held(160, now_s=5.0)
    with pytest.raises(NotRetainedError):
        retention.lease(Lsn(160), now_s=5.0, length_s=10.0, holder="export")
    assert retention.lease(Lsn(150), now_s=5.0, length_s=10.0, holder="another") == 15.0
    assert retention.release_leases("endpoint") == 1
    assert retention.leases_below_cutoff(now_s=12.0) == (150,)
    assert retention.retained(now_s=15.0).points == ()


def test_what_is_detached_takes_the_leases_along_with_their_holders() -> None:
    ancestor, detached = (Retention(name, 100, attached_at_s=0.0) for name in ("main", "child"))
    ancestor.lease(Lsn(150), now_s=0.0, length_s=10.0, holder="export")
    ancestor.lease(Lsn(160), now_s=5.0, length_s=10.0, holder="export")
    detached.lease(Lsn(150), now_s=5.0, length_s=10.0, holder="endpoint")
    detached.lease(Lsn(150), now_s=3.0, length_s=10.0, holder="export")
    detached.copy_leases(ancestor)
    assert detached.is_held(150, now_s=14.0)
    assert detached.release_leases("endpoint") == 1
    assert (detached.is_held(150, now_s=12.0), detached.is_held(150, now_s=14.0)) == (True, False)
    assert detached.release_leases("export") == 2
    assert detached.retained(now_s=1.0).points_above == ()


def test_the_first_collection_waits_for_leases_to_be_renewed() -> None:
    retention = Retention("main", 100, attached_at_s=50.0)
    assert retention.gc_wait_s(now_s=55.0, lease_length_s=20.0) == 15.0
    assert retention.gc_wait_s(now_s=70.0, lease_length_s=20.0) == 0.0


def test_the_cutoff_is_the_oldest_of_what_must_stay() -> None:
    def cutoff(time_lsn: int, horizon: int, durable: int) -> int:
        return plan_cutoff(
            time_lsn=time_lsn, last_record_lsn=1000, gc_horizon_bytes=horizon, disk_consistent_lsn=durable
        )

    assert (cutoff(500, 100, 1000), cutoff(950, 100, 1000), cutoff(950, 10, 940)) == (500, 900, 940)
    assert cutoff(1000, 5000, 1000) == 0


def test_the_cutoff_does_not_pass_what_somebody_reads_on_from() -> None:
    retention = Retention("main", 100, attached_at_s=0.0)

    def cutoff(now_s: float) -> int:
        return plan_cutoff(
            time_lsn=900,
            last_record_lsn=1000,
            gc_horizon_bytes=0,
            disk_consistent_lsn=1000,
            held_lsn=retention.held_onwards(now_s),
        )

    assert retention.lease_onwards(Lsn(300), 0.0, 10.0, "slow") == 10.0
    retention.lease_onwards(Lsn(500), 0.0, 20.0, "quick")
    assert cutoff(9.0) == 300
    retention.lease_onwards(Lsn(400), 9.0, 10.0, "slow")
    assert cutoff(9.0) == 400, "a lease moves with its holder"
    assert cutoff(19.0) == 500, "one that is not renewed ends"
    retention.raise_cutoff(Lsn(500))
    with pytest.raises(NotRetainedError, match="0/1F4"):
        retention.lease_onwards(Lsn(499), 19.0, 10.0, "late")
    assert (retention.release_leases("quick"), retention.release_leases("quick")) == (1, 0)
    assert cutoff(19.0) == 900


@in_event_loop
async def test_held_points_are_read_and_nothing_else_below_the_cutoff(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        for number in range(1, 11):
            put(timeline, [size_value(SIZE, START + 100 * number, number)])
        child = await tenant.branch_timeline(CHILD, MAIN, lsn=Lsn(START + 300))
        put(child, [size_value(SIZE, START + 350, 77)])
        await tenant.branch_timeline(GRANDCHILD, CHILD, lsn=Lsn(START + 200))
        timeline.retention.lease(Lsn(START + 100), asyncio_now(), 1000.0)
        timeline.lease(Lsn(START + 400), "a reader of the main branch")
        child.lease(Lsn(START + 150), "a reader of the child")
        child.lease(Lsn(START + 250), "a reader of the child")
        assert tenant.timeline(GRANDCHILD).release_leases("a reader of the child") == 2
        assert timeline.release_leases("a reader of the main branch") == 1
        timeline.retention.raise_cutoff(Lsn(START + 500))
        assert timeline.retention.retained(asyncio_now()).points == (START + 100, START + 200, START + 300)
        await advance_oldest(timeline, START + 500)
        for held in (START + 100, START + 200, START + 300, START + 500):
            assert timeline.get_value(SIZE, Lsn(held)) is not None
        for gone in (START + 101, START + 299, START + 499):
            with pytest.raises(LsnTooOldError):
                timeline.get_value(SIZE, Lsn(gone))
            with pytest.raises((BranchPointError, NotRetainedError)):
                await tenant.branch_timeline(LATE, MAIN, lsn=Lsn(gone))
        assert child.get_value(MAP_KEY, Lsn(START + 350)) == b"the first map"
        with pytest.raises(LsnTooOldError):
            child.get_value(SIZE, Lsn(START + 250))
        assert (timeline.oldest_lsn, child.oldest_lsn) == (START + 500, START + 300)
        await tenant.close()
        tenant = await attach(context, generation=2)
        retention = tenant.timeline(MAIN).retention
        assert retention.retained(asyncio_now()).points == (START + 100, START + 200, START + 300)
        assert tenant.timeline(MAIN).lease(Lsn(START + 100)) > 0  # its holder is still there, and renews it
        without_lease = retention.retained(asyncio_now() + tenant.settings.current.lsn_lease_length_s + 1)
        assert without_lease.points == (START + 200, START + 300)
        await tenant.delete_timeline(GRANDCHILD)
        assert retention.retained(asyncio_now()).points == (START + 300,)
