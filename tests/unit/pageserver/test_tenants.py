"""Attachment: generations, restarts, an object store that is away, deletion. The store is real, in memory."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from excimer.base.address import Address
from excimer.base.errors import CorruptionError, FencedError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import Relation, relation_block_key
from excimer.base.lsn import Lsn
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStore, ObjectStoreError
from excimer.pageserver.active_timeline import TimelineWorld
from excimer.pageserver.metrics import TimelineMetrics
from excimer.pageserver.model import (
    GenerationRangeError,
    GenerationTooOldError,
    NewTimeline,
    TenantMissingError,
    TimelineExistsError,
    TimelineMissingError,
)
from excimer.pageserver.receiver_plan import Source
from excimer.pageserver.tenant_records import DamagedTenantRecordError, TenantRecords
from excimer.pageserver.tenants import TenantAttachingError, Tenants
from excimer.service.health import Health
from excimer.service.replication_client import ReplicationClient, ReplicationLostError
from excimer.service.tasks import SystemClock, TaskScope
from excimer.storage.engine.errors import (
    BranchesUnknownError,
    TimelineArchivedError,
    TimelineDamagedError,
    TimelineHasBranchesError,
)
from excimer.storage.plan.branch import BranchPointError
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.static_sources import StaticSources
from tests.kit.storage_world import in_event_loop, storage_context

TENANT = TenantId("0a" * 16)
MAIN, BRANCH = TimelineId("11" * 16), TimelineId("22" * 16)


class Node:
    """One pageserver's tenants, without its sockets."""

    def __init__(self, tenants: Tenants, health: Health, registry: CollectorRegistry) -> None:
        self.tenants = tenants
        self.health = health
        self.registry = registry

    async def make_main(self) -> Lsn:
        build_of(NEWEST_VERSION)
        new = NewTimeline(timeline_id=MAIN, pg_version=NEWEST_VERSION)
        return (await self.tenants.create_timeline(TENANT, new)).last_record_lsn

    def sample(self, name: str) -> float | None:
        return self.registry.get_sample_value(name, {"tenant_id": TENANT})

    async def until_well(self) -> None:
        self.health.ready = True
        for _ in range(500):
            if self.health.is_well:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(self.health.problems)


async def unreachable(address: Address) -> ReplicationClient:
    raise ReplicationLostError(f"{address} is not there")


@contextlib.asynccontextmanager
async def node(
    directory: Path,
    store: ObjectStore,
    connect: Callable[[Address], Awaitable[ReplicationClient]] = unreachable,
) -> AsyncIterator[Node]:
    health, registry = Health("pageserver"), CollectorRegistry()
    async with contextlib.AsyncExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        context = await stack.enter_async_context(storage_context(directory / "layers", store=store))
        scope = await stack.enter_async_context(TaskScope())
        world = TimelineWorld(
            scope=scope,
            executor=threads,
            clock=SystemClock(),
            health=health,
            metrics=TimelineMetrics(registry),
            sources=lambda *_: StaticSources(connect, lambda: [Source(Address("nowhere", 1), Lsn(0))]),
        )
        records = TenantRecords(directory / "tenants")
        tenants = Tenants(context=context, records=records, world=world, chance=random.Random(1))
        stack.push_async_callback(tenants.stop)
        await tenants.start()
        yield Node(tenants, health, registry)


@in_event_loop
async def test_what_was_attached_is_attached_again_after_a_restart(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with node(tmp_path, store) as first:
        await first.tenants.attach(TENANT, 3)
        lsn = await first.make_main()
        branch = NewTimeline(timeline_id=BRANCH, ancestor_timeline_id=MAIN)
        made = await first.tenants.create_timeline(TENANT, branch)
        assert made.ancestor_lsn == lsn
        assert await first.tenants.create_timeline(TENANT, branch) == made
    async with node(tmp_path, store) as second:
        await second.until_well()
        assert [record.generation for record in second.tenants.tenants()] == [3]
        assert [each.timeline_id for each in second.tenants.timelines(TENANT)] == [MAIN, BRANCH]
        assert second.tenants.timeline(TENANT, BRANCH).prev_record_lsn == made.prev_record_lsn != 0
        with pytest.raises(TimelineHasBranchesError, match=BRANCH):
            await second.tenants.delete_timeline(TENANT, MAIN)
        with pytest.raises(TimelineExistsError, match="exists already"):
            await second.tenants.create_timeline(TENANT, NewTimeline(timeline_id=BRANCH))
        await second.tenants.delete_timeline(TENANT, BRANCH)
        await second.tenants.delete_timeline(TENANT, MAIN)
        with pytest.raises(TimelineMissingError):
            second.tenants.active(TENANT, MAIN)


@in_event_loop
async def test_generations_only_grow_and_the_newer_one_is_what_counts(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with node(tmp_path / "old", store) as old, node(tmp_path / "new", store) as new:
        await old.tenants.attach(TENANT, 1)
        await old.make_main()
        assert (await old.tenants.attach(TENANT, 1)).generation == 1
        await new.tenants.attach(TENANT, 2)
        assert [each.timeline_id for each in new.tenants.timelines(TENANT)] == [MAIN]
        with pytest.raises(GenerationTooOldError):
            await new.tenants.attach(TENANT, 1)
        await new.tenants.create_timeline(TENANT, NewTimeline(timeline_id=BRANCH, ancestor_timeline_id=MAIN))
        assert (await old.tenants.attach(TENANT, 3)).generation == 3
        assert [each.timeline_id for each in old.tenants.timelines(TENANT)] == [MAIN, BRANCH]


@in_event_loop
async def test_a_generation_that_no_manifest_can_be_named_by_is_refused(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with node(tmp_path, store) as one:
        for generation in (-1, 0, (1 << 32) - 1, 1 << 32, 10**20):
            with pytest.raises(GenerationRangeError, match="between 1 and 4294967294"):
                await one.tenants.attach(TENANT, generation)
        assert (await one.tenants.attach(TENANT, (1 << 32) - 2)).generation == (1 << 32) - 2
        await one.make_main()


@in_event_loop
async def test_an_older_generation_after_a_restart_is_fenced_and_health_says_so(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with node(tmp_path / "old", store) as old:
        await old.tenants.attach(TENANT, 1)
        await old.make_main()
    async with node(tmp_path / "new", store) as new:
        await new.tenants.attach(TENANT, 2)
        await new.tenants.active(TENANT, MAIN).store.commits.write_first_manifest()
    async with node(tmp_path / "old", store) as old:
        for _ in range(200):
            if any("generation 2" in problem for problem in old.health.problems.values()):
                break
            await asyncio.sleep(0.01)
        assert any("generation 2" in problem for problem in old.health.problems.values())
        with pytest.raises(TenantAttachingError, match="generation 2"):
            old.tenants.timelines(TENANT)
        with pytest.raises(FencedError):
            await old.tenants.attach(TENANT, 1)


@in_event_loop
async def test_an_object_store_that_is_away_delays_attachment_and_loses_nothing(tmp_path: Path) -> None:
    inner = MemoryObjectStore()
    is_away = False

    def fault(operation: str, name: str) -> None:
        if is_away:
            raise ObjectStoreError(f"{operation} {name}: the object store is away")

    store = FaultyObjectStore(inner, fault)
    async with node(tmp_path, store) as first:
        is_away = True
        with pytest.raises(ObjectStoreError):
            await first.tenants.attach(TENANT, 1)
        with pytest.raises(TenantMissingError):
            first.tenants.timelines(TENANT)
        is_away = False
        await first.tenants.attach(TENANT, 1)
        await first.make_main()
        is_away = True
        with pytest.raises(ObjectStoreError):
            await first.tenants.create_timeline(
                TENANT, NewTimeline(timeline_id=BRANCH, ancestor_timeline_id=MAIN)
            )
        assert [each.timeline_id for each in first.tenants.timelines(TENANT)] == [MAIN]
    async with node(tmp_path, store) as second:
        with pytest.raises(TenantAttachingError):
            second.tenants.active(TENANT, MAIN)
        second.health.ready = True
        assert not second.health.is_well
        is_away = False
        await second.until_well()
        assert second.tenants.active(TENANT, MAIN).last_record_lsn


@in_event_loop
async def test_a_deleted_tenant_leaves_nothing(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with node(tmp_path, store) as only:
        with pytest.raises(TenantMissingError):
            await only.tenants.delete_tenant(TENANT)
        await only.tenants.attach(TENANT, 1)
        await only.make_main()
        await only.tenants.delete_tenant(TENANT)
        with pytest.raises(TenantMissingError):
            only.tenants.timelines(TENANT)
        assert only.tenants.tenants() == []
    assert store.objects == {}
    assert TenantRecords(tmp_path / "tenants").read_all() == []


async def damaged(address: Address) -> ReplicationClient:
    raise CorruptionError("a record's checksum is wrong")


@in_event_loop
async def test_a_timeline_with_wal_that_cannot_be_read_is_broken_and_still_serves(tmp_path: Path) -> None:
    async with node(tmp_path, MemoryObjectStore(), damaged) as only:
        await only.tenants.attach(TENANT, 1)
        lsn = await only.make_main()
        for _ in range(200):
            if only.tenants.timeline(TENANT, MAIN).problem is not None:
                break
            await asyncio.sleep(0.01)
        assert "checksum is wrong" in (only.tenants.timeline(TENANT, MAIN).problem or "")
        assert any("checksum is wrong" in problem for problem in only.health.problems.values())
        active = only.tenants.active(TENANT, MAIN)
        key = relation_block_key(Relation(1663, 5, 1259), 0, 0)
        assert len(await active.get_pages(key, 1, lsn)) == 8192
        await only.tenants.delete_timeline(TENANT, MAIN)
        assert only.health.problems == {}


@in_event_loop
async def test_computes_outlast_the_loss_of_the_disk(tmp_path: Path) -> None:
    """A tenant that is not known any more is a reason to come again; to the API it is just not there."""
    store = MemoryObjectStore()
    async with node(tmp_path / "one", store) as first:
        await first.tenants.attach(TENANT, 1)
        await first.make_main()
    async with node(tmp_path / "empty", store) as second:
        with pytest.raises(TenantAttachingError, match="not yet again"):
            second.tenants.active_for_compute(TENANT, MAIN)
        with pytest.raises(TenantMissingError):
            second.tenants.active(TENANT, MAIN)
        await second.tenants.attach(TENANT, 2)
        assert second.tenants.active_for_compute(TENANT, MAIN) is second.tenants.active(TENANT, MAIN)
        with pytest.raises(TimelineMissingError):
            second.tenants.active_for_compute(TENANT, BRANCH)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    records = TenantRecords(tmp_path)
    (tmp_path / "aa.json").write_bytes(b'{"tenant_id": ')
    with pytest.raises(DamagedTenantRecordError, match=r"aa\.json"):
        records.read_all()


@in_event_loop
async def test_an_archived_timeline_is_kept_and_comes_back(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with node(tmp_path, store) as first:
        await first.tenants.attach(TENANT, 1)
        lsn = await first.make_main()
        await first.tenants.create_timeline(
            TENANT, NewTimeline(timeline_id=BRANCH, ancestor_timeline_id=MAIN)
        )
        with pytest.raises(TimelineArchivedError, match=f"before its branches: {BRANCH}"):
            await first.tenants.archive_timeline(TENANT, MAIN)
        for _ in range(2):
            for timeline_id in (BRANCH, MAIN):
                assert (await first.tenants.archive_timeline(TENANT, timeline_id)).is_archived
        assert first.tenants.all_active() == []
        with pytest.raises(TimelineArchivedError, match="unarchive it first"):
            first.tenants.active(TENANT, MAIN)
        with pytest.raises(TimelineArchivedError, match="unarchive it first"):
            await first.tenants.create_timeline(
                TENANT, NewTimeline(timeline_id=TimelineId("33" * 16), ancestor_timeline_id=MAIN)
            )
        assert not list((tmp_path / "layers").glob("**/image-*"))
    async with node(tmp_path, store) as second:
        await second.until_well()
        details = second.tenants.timelines(TENANT)
        assert [(each.timeline_id, each.is_archived) for each in details] == [(MAIN, True), (BRANCH, True)]
        assert details[0].last_record_lsn == lsn
        with pytest.raises(TimelineArchivedError, match="before its ancestor"):
            await second.tenants.unarchive_timeline(TENANT, BRANCH)
        with pytest.raises(TimelineHasBranchesError, match=BRANCH):
            await second.tenants.delete_timeline(TENANT, MAIN)
        sizes = await second.tenants.sizes(TENANT)
        assert sizes.synthetic_size_bytes == 0 < sizes.archived_size_bytes
        assert await second.tenants.logical_size_bytes(TENANT, MAIN) is None
        await second.tenants.unarchive_timeline(TENANT, MAIN)
        assert (await second.tenants.unarchive_timeline(TENANT, MAIN)).last_record_lsn == lsn
        assert len(second.tenants.all_active()) == 1
        await second.tenants.delete_timeline(TENANT, BRANCH)
        assert [each.timeline_id for each in second.tenants.timelines(TENANT)] == [MAIN]


@in_event_loop
async def test_a_damaged_timeline_is_told_of_and_the_others_are_in_service(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    other = TimelineId("33" * 16)
    async with node(tmp_path, store) as first:
        await first.tenants.attach(TENANT, 1)
        lsn = await first.make_main()
        for each, ancestor in ((BRANCH, MAIN), (other, BRANCH)):
            new = NewTimeline(timeline_id=each, ancestor_timeline_id=ancestor)
            await first.tenants.create_timeline(TENANT, new)
    name = max(each for each in store.objects if f"{BRANCH}/index-" in each)
    intact, store.objects[name] = store.objects[name], b"nonsense"
    async with node(tmp_path, store) as second:
        tenants, health = second.tenants, second.health
        await second.until_well()
        assert set(health.warnings) == {f"timeline {BRANCH}", f"timeline {other}"}
        assert all(name in warning for warning in health.warnings.values())
        assert health.answer()[0] == 200, "a restart would not help"
        main, damaged, child = tenants.timelines(TENANT)
        assert not main.is_damaged
        assert damaged.is_damaged
        assert name in (damaged.problem or "")
        assert (damaged.pg_version, damaged.last_record_lsn) == (0, 0)
        assert tenants.timeline(TENANT, other) == child
        assert (child.pg_version, child.ancestor_timeline_id, child.is_damaged) == (18, BRANCH, True)
        assert await tenants.logical_size_bytes(TENANT, BRANCH) is None
        sizes = await tenants.sizes(TENANT)
        assert [each.timeline_id for each in sizes.damaged] == [BRANCH, other]
        assert [each.store.timeline_id for each in tenants.all_active()] == [MAIN], "it receives WAL"
        key = relation_block_key(Relation(1663, 5, 1259), 0, 0)
        assert len(await tenants.active_for_compute(TENANT, MAIN).get_pages(key, 1, lsn)) == 8192
        for attempt in (tenants.active_for_compute, tenants.active):
            with pytest.raises(TimelineDamagedError, match=name):
                attempt(TENANT, BRANCH)
        with pytest.raises(TimelineDamagedError):
            await tenants.create_timeline(TENANT, NewTimeline(timeline_id=BRANCH, ancestor_timeline_id=MAIN))
        with pytest.raises(TimelineHasBranchesError):
            await tenants.delete_timeline(TENANT, BRANCH)
        new = NewTimeline(timeline_id=TimelineId("44" * 16), ancestor_timeline_id=MAIN)
        await tenants.create_timeline(TENANT, new)
        with pytest.raises(BranchesUnknownError):
            await tenants.delete_timeline(TENANT, new.timeline_id)
        assert len(await tenants.active(TENANT, new.timeline_id).get_pages(key, 1, lsn)) == 8192
        await tenants.delete_timeline(TENANT, other)
        assert set(health.warnings) == {f"timeline {BRANCH}"}
        assert second.sample("excimer_tenant_damaged_timelines") == 1
        assert second.sample("excimer_tenant_gc_stands_still") == 1
    store.objects[name] = intact
    async with node(tmp_path, store) as third:
        await third.until_well()
        assert third.health.warnings == {}
        assert third.sample("excimer_tenant_gc_stands_still") == 0
        assert len(third.tenants.all_active()) == 3
        store.objects[name] = b""
    async with node(tmp_path, store) as fourth:
        await fourth.until_well()
        await fourth.tenants.delete_timeline(TENANT, BRANCH)
        assert fourth.health.warnings == {}
        assert fourth.sample("excimer_tenant_gc_stands_still") == 0
        assert not [each for each in store.objects if BRANCH in each and not each.endswith("deleted")]


@in_event_loop
async def test_the_size_of_a_tenant_with_a_single_branch(tmp_path: Path) -> None:
    async with node(tmp_path, MemoryObjectStore()) as only:
        await only.tenants.attach(TENANT, 1)
        assert (await only.tenants.sizes(TENANT)).synthetic_size_bytes == 0
        await only.make_main()
        sizes = await only.tenants.sizes(TENANT)
        assert 0 < sizes.synthetic_size_bytes == sizes.timelines[0].logical_size_bytes


@in_event_loop
async def test_a_branch_point_outside_the_history_is_named_as_it_was_written(tmp_path: Path) -> None:
    async with node(tmp_path, MemoryObjectStore()) as only:
        await only.tenants.attach(TENANT, 1)
        await only.make_main()
        for lsn in (0x1, 0x1001):
            new = NewTimeline(timeline_id=BRANCH, ancestor_timeline_id=MAIN, ancestor_start_lsn=Lsn(lsn))
            with pytest.raises(BranchPointError, match=f"cannot branch at 0/{lsn:X}: its history reaches"):
                await only.tenants.create_timeline(TENANT, new)


@in_event_loop
async def test_a_detached_branch_needs_its_ancestor_no_more(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    async with node(tmp_path, store) as only:
        await only.tenants.attach(TENANT, 1)
        lsn = await only.make_main()
        sibling = TimelineId("33" * 16)
        for timeline_id in (BRANCH, sibling):
            await only.tenants.create_timeline(
                TENANT, NewTimeline(timeline_id=timeline_id, ancestor_timeline_id=MAIN)
            )
        before = await only.tenants.sizes(TENANT)
        assert before.synthetic_size_bytes == before.timelines[0].logical_size_bytes
        assert await only.tenants.detach_ancestor(TENANT, BRANCH) == [sibling]
        assert await only.tenants.detach_ancestor(TENANT, BRANCH) == []
        details = {each.timeline_id: each for each in only.tenants.timelines(TENANT)}
        assert details[BRANCH].ancestor_timeline_id is None
        assert (details[sibling].ancestor_timeline_id, details[sibling].ancestor_lsn) == (BRANCH, lsn)
        await only.tenants.delete_timeline(TENANT, MAIN)
        after = await only.tenants.sizes(TENANT)
        assert [each.timeline_id for each in after.timelines] == [BRANCH, sibling]
        assert after.synthetic_size_bytes == before.synthetic_size_bytes
        assert after.timelines[0].remote_size_bytes > 0 == after.timelines[1].remote_size_bytes
        assert await only.tenants.active(TENANT, sibling).basebackup(lsn)
