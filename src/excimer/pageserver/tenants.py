"""The tenants attached to this pageserver and their timelines: attach, create, branch, delete.

What survives a restart locally is one small record per tenant with its generation; everything else is
read from object storage when the tenant is attached again. Attaching runs in the background, one
task per tenant, and goes on trying while object storage is away; requests meanwhile get a retryable error.

Changes of one tenant happen one after the other; reads never wait for them.

Not here: what a timeline does once it is there (`active_timeline`); HTTP and TCP (`endpoints`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from excimer.base.chance import Chance
from excimer.base.clock import unix_to_timestamptz
from excimer.base.errors import CorruptionError, FencedError, RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn, record_end
from excimer.io.processes import release_freed_memory
from excimer.pageserver.active_timeline import (
    ActiveTimeline,
    TimelineWorld,
    detail_of_archived,
    detail_of_damaged,
)
from excimer.pageserver.bootstrap import DEFAULT_VERSION, new_cluster, own_control_file
from excimer.pageserver.cluster_import import ClusterImport
from excimer.pageserver.lsn_by_timestamp import LsnAtTimestamp, TimestampOutsideHistoryError
from excimer.pageserver.model import (
    GenerationRangeError,
    GenerationTooOldError,
    ImportProgress,
    NewTimeline,
    TenantMissingError,
    TenantRecord,
    TenantSizes,
    TimelineDetail,
    TimelineExistsError,
    TimelineMissingError,
)
from excimer.pageserver.running_imports import RunningImports
from excimer.pageserver.sizes import tenant_sizes
from excimer.pageserver.tenant_records import TenantRecords
from excimer.service.logs import get_logger, log_context
from excimer.storage.engine import tenant as storage
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.errors import TimelineArchivedError, TimelineDamagedError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.tenant_marker import create_tenant, delete_tenant
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.manifest import MAX_GENERATION
from excimer.storage.format.tenant_settings import Overrides
from excimer.storage.plan.branch import BranchPointError

log = get_logger(__name__)

BRANCH_POINT_WAIT_S = 90.0
"""How long creating a branch waits for the ancestor to ingest WAL up to the branch point, ..."""
BRANCH_POINT_STALL_S = 10.0
"""... and how long of that while the ancestor ingests nothing."""

STOP_FLUSH_BYTES_MAX = 16 << 20
STOP_FLUSH_S = 1.5
"""A stop must be over in five seconds; a timeline with more in memory than that is not flushed."""

T = TypeVar("T")


class TenantAttachingError(RetryableError):
    """The tenant is being attached: its timelines are not known yet."""


@dataclass(slots=True)
class _Tenant:
    record: TenantRecord
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    store: TenantStorage | None = None
    """None while it is being attached."""
    timelines: dict[TimelineId, ActiveTimeline] = field(default_factory=dict)
    imports: RunningImports = field(default_factory=RunningImports)
    problem: str | None = None
    attaching: asyncio.Task[None] | None = None


class Tenants:
    """All methods belong on the event loop's thread."""

    def __init__(
        self, *, context: StorageContext, records: TenantRecords, world: TimelineWorld, chance: Chance
    ) -> None:
        self._context = context
        self._records = records
        self._world = world
        self._chance = chance
        self._tenants: dict[TenantId, _Tenant] = {}

    # Tenants

    async def start(self) -> None:
        """Begins to attach every tenant that was attached when the process last ended."""
        for record in await asyncio.to_thread(self._records.read_all):
            tenant = self._tenants[record.tenant_id] = _Tenant(record)
            self._attach_in_background(tenant)

    async def stop(self) -> None:
        """Ends all timelines' tasks and closes the stores, after a quick flush of what little is in memory.

        What is too much for that comes again as WAL.
        """
        await self._flush_quickly()
        for tenant in self._tenants.values():
            if tenant.attaching is not None:
                tenant.attaching.cancel()
        await asyncio.gather(*(self._detach(tenant) for tenant in list(self._tenants.values())))

    async def _flush_quickly(self) -> None:
        small = [each for each in self.all_active() if 0 < each.unflushed_size_bytes <= STOP_FLUSH_BYTES_MAX]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_FLUSH_S):
                await asyncio.gather(*(each.store.flush() for each in small), return_exceptions=True)

    async def attach(self, tenant_id: TenantId, generation: int) -> TenantRecord:
        """Creates the tenant or attaches what object storage has of it.

        Raises `GenerationTooOldError`, `GenerationRangeError`, FencedError, CorruptionError,
        `ObjectStoreError`.
        """
        if not 0 < generation < MAX_GENERATION:
            raise GenerationRangeError(
                f"a generation is between 1 and {MAX_GENERATION - 1}, not {generation}"
            )
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            tenant = self._tenants.setdefault(
                tenant_id, _Tenant(TenantRecord(tenant_id=tenant_id, generation=0))
            )
        async with tenant.changing:
            if generation < tenant.record.generation:
                raise GenerationTooOldError(
                    f"tenant {tenant_id} is attached with generation {tenant.record.generation}, "
                    f"not {generation}"
                )
            if generation == tenant.record.generation and tenant.store is not None:
                return tenant.record
            record = TenantRecord(tenant_id=tenant_id, generation=generation)
            try:
                await self._in_thread(partial(create_tenant, self._context.store, tenant_id))
                await self._in_thread(partial(self._records.write, record))
            except (RetryableError, OSError):
                if tenant.record.generation == 0:
                    self._tenants.pop(tenant_id, None)
                raise
            tenant.record = record
            self._tenants[tenant_id] = tenant
            await self._detach(tenant)
            try:
                await self._attach(tenant)
            except RetryableError:
                self._attach_in_background(tenant)
                raise
        return record

    def _attach_in_background(self, tenant: _Tenant) -> None:
        """Goes on trying; until it is done `/healthz` says so."""
        tenant_id = tenant.record.tenant_id
        self._world.health.report(f"tenant {tenant_id}", "it is being attached")
        job = partial(self._attach_known, tenant)
        tenant.attaching = self._world.scope.supervise(f"attach {tenant_id}", job)

    async def _attach_known(self, tenant: _Tenant) -> None:
        with log_context(tenant_id=tenant.record.tenant_id):
            async with tenant.changing:
                if tenant.store is None and self._tenants.get(tenant.record.tenant_id) is tenant:
                    await self._attach(tenant)

    async def _attach(self, tenant: _Tenant) -> None:
        record = tenant.record
        check = f"tenant {record.tenant_id}"
        try:
            store = await TenantStorage.attach(self._context, record.tenant_id, record.generation)
        except (CorruptionError, FencedError) as error:
            tenant.problem = f"{type(error).__name__}: {error}"
            self._world.health.report(check, tenant.problem)
            raise
        tenant.store = store
        tenant.problem = None
        self._world.health.report(check, None)
        for timeline in store.timelines.values():
            self._activate(tenant, timeline)
        self._log_damage(tenant.record.tenant_id, store)
        log.info("tenant attached", tenant_id=record.tenant_id, timelines=len(tenant.timelines))

    def _log_damage(self, tenant_id: TenantId, store: TenantStorage) -> None:
        for each in store.damaged.values():
            log.error(
                "timeline is damaged", tenant_id=tenant_id, timeline_id=each.timeline_id, why=each.reason
            )
            self._world.health.warn(_damage_check(each.timeline_id), f"damaged: {each.reason}")
        if store.settings.damage is not None:
            log.error("settings are damaged", tenant_id=tenant_id, why=store.settings.damage)
        self._tell_damage(tenant_id, store)

    def _tell_damage(self, tenant_id: TenantId, store: TenantStorage) -> None:
        """All but what is damaged timeline by timeline, and stays so until they are deleted."""
        damage = store.settings.damage
        warning = None if damage is None else f"attached with default settings: {damage}"
        self._world.health.warn(f"tenant {tenant_id}", warning)
        metrics = self._world.metrics
        metrics.damaged_timelines.labels(tenant_id).set(len(store.damaged))
        metrics.gc_stands_still.labels(tenant_id).set(store.find_standstill() is not None)

    async def _detach(self, tenant: _Tenant) -> None:
        """Stops and closes whatever is attached; the record stays."""
        await tenant.imports.break_off()
        active, tenant.timelines = list(tenant.timelines.values()), {}
        await asyncio.gather(*(timeline.stop() for timeline in active))
        store, tenant.store = tenant.store, None
        if store is not None:
            for timeline_id in store.damaged:
                self._world.health.warn(_damage_check(timeline_id), None)
            self._world.health.warn(f"tenant {tenant.record.tenant_id}", None)
            await store.close()

    def tenants(self) -> list[TenantRecord]:
        records = (tenant.record for tenant in self._tenants.values() if tenant.record.generation)
        return sorted(records, key=lambda record: record.tenant_id)

    async def delete_tenant(self, tenant_id: TenantId) -> None:
        """Deletes everything of the tenant. Raises `TenantMissingError`, `ObjectStoreError` (call again)."""
        tenant = self._known(tenant_id)
        async with tenant.changing:
            await self._detach(tenant)
            await self._in_thread(partial(delete_tenant, self._context, tenant_id))
            await self._in_thread(partial(self._records.remove, tenant_id))
            self._tenants.pop(tenant_id, None)
            self._world.metrics.forget_tenant(tenant_id)
            self._world.health.report(f"tenant {tenant_id}", None)

    # Timelines

    def active_for_compute(self, tenant_id: TenantId, timeline_id: TimelineId) -> ActiveTimeline:
        """As `active`, for somebody whose token says that the tenant exists: one that is not known here,
        because this pageserver has lost its disk, will be attached again. Raises `TenantAttachingError` then.
        """
        if tenant_id not in self._tenants:
            raise TenantAttachingError(
                f"tenant {tenant_id} is not attached here, or not yet again: try again"
            )
        return self.active(tenant_id, timeline_id)

    def active(self, tenant_id: TenantId, timeline_id: TimelineId) -> ActiveTimeline:
        """Raises `TenantMissingError`, `TimelineMissingError`, `TenantAttachingError`,
        `TimelineArchivedError`, `TimelineDamagedError`. Cheap.
        """
        found = self.find_active(tenant_id, timeline_id)
        if found is None:
            _, store = self._attached(tenant_id)
            if timeline_id in store.archived:
                raise TimelineArchivedError(f"timeline {timeline_id} is archived: unarchive it first")
            if timeline_id in store.damaged:
                raise TimelineDamagedError(timeline_id, store.damaged[timeline_id].reason)
            raise TimelineMissingError(tenant_id, timeline_id)
        return found

    def find_active(self, tenant_id: TenantId, timeline_id: TimelineId) -> ActiveTimeline | None:
        """None when there is no such timeline now."""
        tenant = self._tenants.get(tenant_id)
        return None if tenant is None else tenant.timelines.get(timeline_id)

    def take_moved(self) -> set[tuple[TenantId, TimelineId]]:
        """Timelines that have received WAL or made some durable since the last call."""
        moved = set()
        while self._world.moved:
            moved.add(self._world.moved.popleft())
        return moved

    def all_active(self) -> list[ActiveTimeline]:
        return [timeline for tenant in self._tenants.values() for timeline in tenant.timelines.values()]

    def active_of(self, tenant_id: TenantId) -> list[ActiveTimeline]:
        """None of a tenant that is not attached."""
        tenant = self._tenants.get(tenant_id)
        return [] if tenant is None else list(tenant.timelines.values())

    def storage_of(self, tenant_id: TenantId) -> TenantStorage:
        """Raises `TenantMissingError`, `TenantAttachingError`."""
        return self._attached(tenant_id)[1]

    def gc_periods(self) -> list[tuple[TenantId, float]]:
        """Of each attached tenant the time between two garbage collections."""
        return [
            (tenant_id, tenant.store.settings.current.gc_period_s)
            for tenant_id, tenant in self._tenants.items()
            if tenant.store is not None
        ]

    async def set_settings(self, tenant_id: TenantId, overrides: Overrides) -> None:
        """See `TenantStorage.set_settings`."""
        store = self.storage_of(tenant_id)
        await store.set_settings(overrides)
        self._tell_damage(tenant_id, store)

    async def create_timeline(self, tenant_id: TenantId, new: NewTimeline) -> TimelineDetail:
        """Makes a timeline; answers with the one that exists if it was made in the same way.

        Raises `TimelineExistsError`, RefusedError, RetryableError and what the store raises.
        """
        tenant, _ = self._attached(tenant_id)
        if new.ancestor_timeline_id is not None and new.ancestor_start_lsn is not None:
            ancestor = self.active(tenant_id, new.ancestor_timeline_id)
            lsn = ancestor.record_end(new.ancestor_start_lsn)
            await ancestor.wait_while_ingesting(lsn, BRANCH_POINT_STALL_S, BRANCH_POINT_WAIT_S)
        async with tenant.changing:
            _, store = self._attached(tenant_id)
            existing = tenant.timelines.get(new.timeline_id)
            if existing is not None:
                _check_made_alike(existing.store, new)
                return existing.detail()
            if new.ancestor_timeline_id is None:
                timeline = await self._bootstrap(store, new)
                await self._in_thread(release_freed_memory)  # 25 MiB: the files of the cluster
            else:
                timeline = await self._branch(tenant_id, store, new)
            return self._activate(tenant, timeline).detail()

    async def _bootstrap(self, store: TenantStorage, new: NewTimeline) -> Timeline:
        pg_version = new.pg_version or DEFAULT_VERSION
        cluster = await self._in_thread(
            partial(new_cluster, pg_version, self._chance, self._world.clock.now(), new.password_verifier)
        )
        return await store.create_timeline(
            storage.NewTimeline(
                timeline_id=new.timeline_id,
                pg_version=pg_version,
                system_id=cluster.control_file.system_id,
                wal_segment_size_bytes=cluster.control_file.wal_segment_size,
                last_record_lsn=cluster.end_lsn,
                prev_record_lsn=cluster.prev_record_lsn,
            ),
            cluster.images,
        )

    async def _branch(self, tenant_id: TenantId, store: TenantStorage, new: NewTimeline) -> Timeline:
        assert new.ancestor_timeline_id is not None
        ancestor = self.active(tenant_id, new.ancestor_timeline_id)
        pg_version = ancestor.store.pg_version
        if new.pg_version not in (None, pg_version):
            raise RefusedError(f"a branch has its ancestor's PostgreSQL version, {pg_version}")
        if new.ancestor_start_lsn is None:
            return await store.branch_timeline(new.timeline_id, new.ancestor_timeline_id)
        lsn = ancestor.record_end(new.ancestor_start_lsn)
        position = ancestor.store.position
        prev_lsn = position.prev_record_lsn if lsn == position.last_record_lsn else INVALID_LSN
        try:
            return await store.branch_timeline(
                new.timeline_id, new.ancestor_timeline_id, lsn=lsn, prev_record_lsn=prev_lsn
            )
        except BranchPointError as error:
            raise error.asked_for(new.ancestor_start_lsn) from None

    async def import_timeline(
        self, tenant_id: TenantId, timeline_id: TimelineId, chunks: AsyncIterator[bytes]
    ) -> TimelineDetail:
        """Makes a timeline of a cluster that comes as an import stream; it exists when this returns, or not
        at all. Raises `TimelineExistsError`, what `ClusterImport.run` does, `ImportBrokenOffError`.
        """
        tenant, store = self._attached(tenant_id)
        if timeline_id in tenant.timelines or timeline_id in store.damaged or timeline_id in tenant.imports:
            raise TimelineExistsError(f"timeline {timeline_id} exists already, or is being imported")
        job = ClusterImport(store, timeline_id, self._world.executor, own_control_file)
        async with tenant.imports.running(store, timeline_id, job) as running:
            made = await job.run(chunks)
            await self._in_thread(release_freed_memory)
            async with tenant.changing:
                self._attached(tenant_id)
                timeline = await store.finish_import(made, job.readable_lsn)
                running.is_complete = True
                log.info("cluster imported", tenant_id=tenant_id, timeline_id=timeline_id)
                return self._activate(tenant, timeline).detail()

    def running_imports(self, tenant_id: TenantId) -> list[ImportProgress]:
        """Raises `TenantMissingError`, `TenantAttachingError`."""
        tenant, _ = self._attached(tenant_id)
        return tenant.imports.progress()

    def _activate(self, tenant: _Tenant, timeline: Timeline) -> ActiveTimeline:
        active = tenant.timelines[timeline.timeline_id] = ActiveTimeline(timeline, self._world)
        active.start()
        return active

    def timelines(self, tenant_id: TenantId) -> list[TimelineDetail]:
        tenant, store = self._attached(tenant_id)
        details = [timeline.detail() for timeline in tenant.timelines.values()]
        details += [detail_of_archived(tenant_id, archived) for archived in store.archived.values()]
        details += [detail_of_damaged(tenant_id, damaged) for damaged in store.damaged.values()]
        return sorted(details, key=lambda detail: detail.timeline_id)

    def timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineDetail:
        _, store = self._attached(tenant_id)
        if timeline_id in store.archived:
            return detail_of_archived(tenant_id, store.archived[timeline_id])
        if timeline_id in store.damaged:
            return detail_of_damaged(tenant_id, store.damaged[timeline_id])
        return self.active(tenant_id, timeline_id).detail()

    async def logical_size_bytes(self, tenant_id: TenantId, timeline_id: TimelineId) -> int | None:
        """None while it is archived, or damaged."""
        _, store = self._attached(tenant_id)
        if timeline_id in store.archived or timeline_id in store.damaged:
            return None
        return await self.active(tenant_id, timeline_id).logical_sizes.at_head()

    async def sizes(self, tenant_id: TenantId) -> TenantSizes:
        """Raises as reads do."""
        tenant, store = self._attached(tenant_id)
        logical = {each: active.logical_sizes for each, active in tenant.timelines.items()}
        sizes = await tenant_sizes(store, logical, asyncio.get_running_loop().time())
        self._world.metrics.synthetic_size_bytes.labels(tenant_id).set(sizes.synthetic_size_bytes)
        return sizes

    async def delete_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        """An import that goes on is ended. Raises `TimelineMissingError`, `TimelineHasBranchesError`,
        `BranchesUnknownError`, `ObjectStoreError` (call again).
        """
        tenant, _ = self._attached(tenant_id)
        await tenant.imports.break_off(timeline_id)
        async with tenant.changing:
            _, store = self._attached(tenant_id)
            store.check_deletable(timeline_id)
            is_out_of_service = timeline_id in store.archived or timeline_id in store.damaged
            if not is_out_of_service and not store.may_exist(timeline_id):
                await self.active(tenant_id, timeline_id).stop()
            await store.delete_timeline(timeline_id)
            active = tenant.timelines.pop(timeline_id, None)
            if active is not None:
                active.sources.forget()
            self._world.health.warn(_damage_check(timeline_id), None)
            self._tell_damage(tenant_id, store)

    async def archive_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineDetail:
        """Lets go of all but the timeline's objects. Repeatable. Raises `TimelineMissingError`,
        `TimelineArchivedError` while branches of it are not archived, `ObjectStoreError` (call again).
        """
        tenant, store = self._attached(tenant_id)
        if timeline_id not in store.archived:
            await self.active(tenant_id, timeline_id).store.flush()
        async with tenant.changing:
            _, store = self._attached(tenant_id)
            await store.archive_timeline(timeline_id)
            active = tenant.timelines.pop(timeline_id, None)
            if active is not None:
                await active.stop()
                await active.durable_wal.finish()
            await store.offload_timeline(timeline_id)
        return self.timeline(tenant_id, timeline_id)

    async def unarchive_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineDetail:
        """In service again. Repeatable. Raises `TimelineMissingError`, `TimelineArchivedError` while its
        ancestor is archived, and what reading a manifest raises.
        """
        tenant, _ = self._attached(tenant_id)
        async with tenant.changing:
            _, store = self._attached(tenant_id)
            timeline = await store.unarchive_timeline(timeline_id)
            if timeline_id not in tenant.timelines:
                self._activate(tenant, timeline)
            return tenant.timelines[timeline_id].detail()

    async def detach_ancestor(self, tenant_id: TenantId, timeline_id: TimelineId) -> list[TimelineId]:
        """See `TenantStorage.detach_ancestor`. May take long; other changes of the tenant go on meanwhile."""
        self.active(tenant_id, timeline_id)
        _, store = self._attached(tenant_id)
        return await store.detach_ancestor(timeline_id)

    async def flush(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineDetail:
        """Everything received becomes durable."""
        active = self.active(tenant_id, timeline_id)
        await active.store.flush()
        return active.detail()

    async def lsn_at_timestamp(
        self, tenant_id: TenantId, timeline_id: TimelineId, timestamptz: int
    ) -> LsnAtTimestamp:
        """Raises `TimestampOutsideHistoryError` also for a moment that has not come yet."""
        if timestamptz > unix_to_timestamptz(self._world.clock.now()):
            raise TimestampOutsideHistoryError("the timestamp lies in the future")
        return await self.active(tenant_id, timeline_id).lsn_at_timestamp(timestamptz)

    async def timestamp_of_lsn(self, tenant_id: TenantId, timeline_id: TimelineId, lsn: Lsn) -> int | None:
        """When the last commit at or below the LSN happened (timestamptz); None if none is known.

        Raises `LsnTimeoutError` for an LSN that has not come yet, `LsnTooOldError`.
        """
        active = self.active(tenant_id, timeline_id)
        return await asyncio.to_thread(active.commit_time, lsn)

    def _known(self, tenant_id: TenantId) -> _Tenant:
        try:
            return self._tenants[tenant_id]
        except KeyError:
            raise TenantMissingError(tenant_id) from None

    def _attached(self, tenant_id: TenantId) -> tuple[_Tenant, TenantStorage]:
        tenant = self._known(tenant_id)
        if tenant.store is None:
            why = f" ({tenant.problem})" if tenant.problem else ""
            raise TenantAttachingError(f"tenant {tenant_id} is not attached yet{why}: try again")
        return tenant, tenant.store

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._context.executor, work)


def _damage_check(timeline_id: TimelineId) -> str:
    return f"timeline {timeline_id}"


def _check_made_alike(store: Timeline, new: NewTimeline) -> None:
    """Raises `TimelineExistsError` if `new` asks for something else than what exists under its id."""
    ancestor = None if store.ancestor is None else store.ancestor.timeline_id
    is_alike = ancestor == new.ancestor_timeline_id and new.pg_version in (None, store.pg_version)
    if is_alike and new.ancestor_start_lsn is not None:
        is_alike = record_end(new.ancestor_start_lsn, store.wal_segment_size_bytes) == store.ancestor_lsn
    if not is_alike:
        at = f" at {format_lsn(store.ancestor_lsn)}" if ancestor else ""
        raise TimelineExistsError(
            f"timeline {store.timeline_id} exists already: PostgreSQL {store.pg_version}, "
            + (f"a branch of {ancestor}{at}" if ancestor else "without ancestor")
        )
