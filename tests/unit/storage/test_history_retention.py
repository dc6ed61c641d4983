"""What a detached or archived branch holds against garbage collection, and what it lets go (S3)."""

import random
from pathlib import Path

import pytest

from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine.errors import LsnTooOldError, TimelineMissingError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from tests.kit.collected_timeline import SMALL, check_reads, grow, new_tenant
from tests.kit.storage_oracle import IMPORTED, TimelineOracle
from tests.kit.storage_world import MAIN, attach, in_event_loop, new_main, storage_context

CHILD, GRANDCHILD, SIBLING, PUT_AWAY = (TimelineId(f"{number}" * 32) for number in "2345")


async def collect(timeline: Timeline) -> int:
    """All that nobody holds; how many points somebody does."""
    outcome = await timeline.collect_garbage(timeline.last_record_lsn)
    await timeline.in_thread(timeline.deletions.drain)
    return outcome.held_points


async def branch(tenant: TenantStorage, timeline_id: TimelineId, ancestor_id: TimelineId, lsn: int) -> None:
    await tenant.branch_timeline(timeline_id, ancestor_id, lsn=Lsn(lsn), prev_record_lsn=Lsn(lsn - 8))


@in_event_loop
async def test_a_detached_branch_holds_what_is_read_through_it(tmp_path: Path) -> None:
    """Its branches below its former beginning, the siblings that came along, an archived one, a lease."""
    chance = random.Random(1)
    async with storage_context(tmp_path, settings=SMALL) as context:
        tenant, main, oracle = await new_tenant(context)
        await grow(main, oracle, chance, 6)
        put_away, early, leased, sibling, late = (oracle.ends[count] for count in (30, 50, 70, 90, 110))
        await branch(tenant, CHILD, MAIN, late)
        child, child_oracle = tenant.timeline(CHILD), TimelineOracle(ancestor=oracle, ancestor_lsn=late)
        await branch(tenant, GRANDCHILD, CHILD, early)
        await branch(tenant, SIBLING, MAIN, sibling)
        await branch(tenant, PUT_AWAY, MAIN, put_away)
        await tenant.archive_timeline(PUT_AWAY)
        await tenant.offload_timeline(PUT_AWAY)
        await tenant.set_settings({"lsn_lease_length_s": 1000})
        child.home_of(Lsn(leased)).lease(Lsn(leased))
        await tenant.set_settings({"lsn_lease_length_s": 0.0})
        await grow(child, child_oracle, chance, 3)
        await grow(main, oracle, chance, 6)
        assert await collect(main) == 5
        oldest_lsn = child.oldest_lsn

        async def check_all() -> None:
            await check_reads(child, child_oracle, late)
            await check_reads(child, child_oracle, leased)
            await check_reads(child, child_oracle, child_oracle.last_lsn)
            await check_reads(tenant.timeline(GRANDCHILD), oracle, early)
            await check_reads(tenant.timeline(SIBLING), oracle, sibling)

        await check_all()
        assert await tenant.detach_ancestor(CHILD) == [SIBLING, PUT_AWAY]
        assert child.oldest_lsn == oldest_lsn
        await check_all()
        assert await collect(main) == 1
        await check_reads(main, oracle, leased)
        await grow(child, child_oracle, chance, 6)
        assert await collect(child) == 4
        for lsn in (late, oracle.ends[40]):
            with pytest.raises(LsnTooOldError):
                await check_reads(child, child_oracle, lsn)
        late = child_oracle.last_lsn
        await check_all()
        await tenant.delete_timeline(MAIN)
        await tenant.unarchive_timeline(PUT_AWAY)
        await check_reads(tenant.timeline(PUT_AWAY), oracle, put_away)
        await check_all()


@in_event_loop
async def test_an_archived_branch_holds_its_point_until_it_is_deleted(tmp_path: Path) -> None:
    chance = random.Random(2)
    async with storage_context(tmp_path, settings=SMALL) as context:
        tenant, main, oracle = await new_tenant(context)
        await grow(main, oracle, chance, 4)
        point = oracle.ends[40]
        await branch(tenant, CHILD, MAIN, point)
        await branch(tenant, GRANDCHILD, CHILD, oracle.ends[20])
        for timeline_id in (GRANDCHILD, CHILD):
            await tenant.archive_timeline(timeline_id)
            await tenant.offload_timeline(timeline_id)
        await grow(main, oracle, chance, 6)
        assert await collect(main) == 2
        await tenant.close()
        tenant = await attach(context, 2)
        main = tenant.timeline(MAIN)
        assert await collect(main) == 2
        await tenant.unarchive_timeline(CHILD)
        await check_reads(tenant.timeline(CHILD), oracle, point)
        await tenant.delete_timeline(GRANDCHILD)
        assert await collect(main) == 1
        await tenant.delete_timeline(CHILD)
        assert await collect(main) == 0


@in_event_loop
async def test_a_half_deleted_archived_timeline_does_not_come_back(tmp_path: Path) -> None:
    objects, is_armed = MemoryObjectStore(), False

    def fault(operation: str, name: str) -> None:
        if is_armed and operation.startswith("delete") and "/layers" in name:
            raise ObjectStoreError("away")

    async with storage_context(tmp_path, store=FaultyObjectStore(objects, fault), settings=SMALL) as context:
        tenant = await attach(context)
        await tenant.create_timeline(new_main(), IMPORTED)
        await tenant.archive_timeline(MAIN)
        await tenant.offload_timeline(MAIN)
        is_armed = True
        with pytest.raises(ObjectStoreError):
            await tenant.delete_timeline(MAIN)
        with pytest.raises(TimelineMissingError):
            await tenant.unarchive_timeline(MAIN)
        is_armed = False
        await tenant.delete_timeline(MAIN)
        assert not [name for name in objects.objects if "/layers/" in name]


@in_event_loop
async def test_a_detached_branch_can_be_branched_wherever_it_can_be_read(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=SMALL) as context:
        tenant, main, oracle = await new_tenant(context)
        await grow(main, oracle, random.Random(3), 3)
        await branch(tenant, CHILD, MAIN, oracle.ends[60])
        await tenant.detach_ancestor(CHILD)
        await branch(tenant, GRANDCHILD, CHILD, oracle.ends[20])
        await check_reads(tenant.timeline(GRANDCHILD), oracle, oracle.ends[20])
        tenant.timeline(CHILD).lease(Lsn(oracle.ends[30]))
