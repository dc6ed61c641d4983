"""How much history tenants keep: their settings, leases, garbage collection now or when it is due.

::

    HTTP (endpoints/retention_api) --+
                                     +--> HistoryKeeper --> TenantStorage.set_settings
    schedule: one task, one look     |                  --> Timeline.collect_garbage, compact, lease
    per LOOK_S at who is due       --+

Every tenant's timelines are collected once per `gc_period_s`. A timeline that has received nothing since, and
whose next commit leaves the window later, is passed over without reading anything: an idle tenant costs
a comparison.

While it is not known what history a tenant needs, because one of its timelines is damaged, nothing of it is
collected (S3), which each period tells in the log.

Not here: what a collection does (`excimer.storage.engine.garbage_collector`).
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from excimer.base.chance import Chance
from excimer.base.clock import Clock, unix_to_timestamptz
from excimer.base.errors import ConflictError, CorruptionError, ExcimerError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.pageserver.lsn_by_timestamp import WindowStart
from excimer.service.logs import get_logger
from excimer.service.tasks import TaskScope
from excimer.storage.engine.garbage_collector import GcOutcome, GcTooEarlyError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.tenant_settings import (
    Overrides,
    TenantSettings,
    change_overrides,
    check_overrides,
)
from excimer.storage.plan.retention import RetainedLsns

log = get_logger(__name__)

LOOK_S: Final = 10.0
"""How long a due collection, or a changed period, may go unnoticed."""
COLLECTIONS_AT_ONCE: Final = 2


class KeptTimeline(Protocol):
    """A timeline in service (`active_timeline.ActiveTimeline`)."""

    @property
    def store(self) -> Timeline: ...
    def record_end(self, lsn: int, /) -> Lsn: ...
    async def window_start(self, timestamptz: int, /) -> WindowStart: ...


class KeptTenants(Protocol):
    """The attached tenants (`tenants.Tenants`)."""

    def storage_of(self, tenant_id: TenantId, /) -> TenantStorage: ...
    async def set_settings(self, tenant_id: TenantId, overrides: Overrides, /) -> None: ...
    def active(self, tenant_id: TenantId, timeline_id: TimelineId, /) -> KeptTimeline: ...
    def active_of(self, tenant_id: TenantId, /) -> Sequence[KeptTimeline]: ...
    def all_active(self) -> Sequence[KeptTimeline]: ...
    def gc_periods(self) -> list[tuple[TenantId, float]]: ...


class SettingsUnknownError(ConflictError):
    """What a tenant has chosen cannot be read, so that it cannot be changed in part."""


class Lease(NamedTuple):
    lsn: Lsn
    valid_until: float
    """Unix time."""
    valid_for_s: float


class TenantConfig(NamedTuple):
    overrides: dict[str, Any]
    """What the tenant has chosen."""
    effective: TenantSettings
    problem: str | None
    """Why nobody knows what it has chosen: the defaults are in effect, and nothing is collected."""


class _Settled(NamedTuple):
    """What a collection saw; as long as it is the same, and until then, another would find nothing."""

    last_record_lsn: Lsn
    disk_consistent_lsn: Lsn
    retained: RetainedLsns
    settings: TenantSettings

    @classmethod
    def of(cls, store: Timeline) -> "_Settled":
        retained = store.retention.retained(asyncio.get_running_loop().time())
        return cls(store.last_record_lsn, store.disk_consistent_lsn, retained, store.settings)


class HistoryKeeper:
    """All methods belong on the event loop's thread."""

    def __init__(self, tenants: KeptTenants, scope: TaskScope, clock: Clock, chance: Chance) -> None:
        self._tenants = tenants
        self._scope = scope
        self._clock = clock
        self._chance = chance
        self._due_s: dict[TenantId, float] = {}
        self._settled: dict[TimelineId, tuple[_Settled, int | None]] = {}
        """With the timestamptz at which the oldest commit that is kept leaves the window; None: never."""
        self._running: set[TenantId] = set()
        self._slots = asyncio.Semaphore(COLLECTIONS_AT_ONCE)

    # Settings

    def config(self, tenant_id: TenantId) -> TenantConfig:
        settings = self._tenants.storage_of(tenant_id).settings
        return TenantConfig(settings.overrides, settings.current, settings.damage)

    async def set_config(self, tenant_id: TenantId, overrides: Mapping[str, Any]) -> TenantConfig:
        """Replaces what the tenant has chosen. Durable and live on return. Raises `TenantSettingsError`."""
        await self._tenants.set_settings(tenant_id, check_overrides(overrides))
        self._due_s.pop(tenant_id, None)
        return self.config(tenant_id)

    async def change_config(self, tenant_id: TenantId, changes: Mapping[str, Any]) -> TenantConfig:
        """Sets some; None gives a setting back to its default. Raises `SettingsUnknownError`."""
        settings = self._tenants.storage_of(tenant_id).settings
        if settings.damage is not None:
            raise SettingsUnknownError(f"{settings.damage}: set them anew, all of them")
        overrides = settings.overrides
        return await self.set_config(tenant_id, change_overrides(overrides, changes))

    # By hand

    async def collect_garbage(self, tenant_id: TenantId, timeline_id: TimelineId) -> GcOutcome:
        """After a flush, for only what is durable counts as history.

        Raises `GcStandsStillError`, `GcTooEarlyError` soon after attaching, and as reads, flushes and
        uploads do.
        """
        active = self._tenants.active(tenant_id, timeline_id)
        await active.store.flush()
        outcome, _ = await self._collect(active)
        return outcome

    async def compact(self, tenant_id: TenantId, timeline_id: TimelineId) -> int:
        """Everything that is due; the number of steps it took."""
        store = self._tenants.active(tenant_id, timeline_id).store
        steps = 0
        while await store.compact():
            steps += 1
        return steps

    async def lease(
        self, tenant_id: TenantId, timeline_id: TimelineId, lsn: Lsn, holder: str, *, onwards: bool = False
    ) -> Lease:
        """Keeps an LSN readable, rounded down to a record's end, or all from it `onwards`. Without a name
        nobody can give it back.

        Raises `LsnTimeoutError` (it has not arrived), `LsnTooOldError`, `NotRetainedError` (about to go).
        """
        active = self._tenants.active(tenant_id, timeline_id)
        end_lsn = active.record_end(lsn)
        valid_for_s = active.store.lease(end_lsn, holder, onwards=onwards)
        return Lease(end_lsn, self._clock.now() + valid_for_s, valid_for_s)

    async def release_leases(self, tenant_id: TenantId, timeline_id: TimelineId, holder: str) -> int:
        """Ends what the holder leased on the timeline; how many LSNs. Garbage collection is not hurried."""
        return self._tenants.active(tenant_id, timeline_id).store.release_leases(holder)

    # By schedule

    async def run(self) -> None:
        """Starts what is due, until cancelled."""
        while True:
            self.start_due()
            await asyncio.sleep(LOOK_S)

    def start_due(self) -> None:
        """One look at who is due."""
        now_s = self._clock.monotonic()
        attached = set()
        for tenant_id, period_s in self._tenants.gc_periods():
            attached.add(tenant_id)
            if not period_s or tenant_id in self._running:
                continue
            if tenant_id not in self._due_s:  # spread, so that they do not all come at once
                self._due_s[tenant_id] = now_s + period_s * (0.5 + self._chance.random() / 2)
            if self._due_s[tenant_id] <= now_s:
                self._due_s[tenant_id] = now_s + period_s
                self._running.add(tenant_id)
                self._scope.start(f"collect garbage of {tenant_id}", self._collect_tenant(tenant_id))
        for gone in self._due_s.keys() - attached:
            del self._due_s[gone]
        for deleted in self._settled.keys() - {each.store.timeline_id for each in self._tenants.all_active()}:
            del self._settled[deleted]

    async def _collect_tenant(self, tenant_id: TenantId) -> None:
        try:
            async with self._slots:
                for active in self._tenants.active_of(tenant_id):
                    standstill = active.store.retention.find_standstill()
                    if standstill is not None:
                        log.error("garbage collection stands still", tenant_id=tenant_id, why=standstill)
                        break
                    await self._collect_if_unsettled(active)
        finally:
            self._running.discard(tenant_id)

    async def _collect_if_unsettled(self, active: KeptTimeline) -> None:
        store = active.store
        if self._is_settled(store):
            return
        before = _Settled.of(store)
        try:
            outcome, window = await self._collect(active)
        except GcTooEarlyError as error:
            self._due_s[store.tenant_id] = self._clock.monotonic() + error.wait_s
        except CorruptionError as error:
            log.error("garbage is not collected", timeline_id=store.timeline_id, error=error)
        except (ExcimerError, OSError) as error:
            log.warning("garbage is not collected, later again", timeline_id=store.timeline_id, error=error)
        else:
            seen = before._replace(retained=before.retained._replace(cutoff_lsn=outcome.cutoff_lsn))
            if not outcome.has_written_images:
                self._settled[store.timeline_id] = seen, window.next_commit

    async def _collect(self, active: KeptTimeline) -> tuple[GcOutcome, WindowStart]:
        window = await active.window_start(self._window_begin(active.store))
        return await active.store.collect_garbage(window.lsn), window

    def _window_begin(self, store: Timeline) -> int:
        """Timestamptz."""
        return unix_to_timestamptz(self._clock.now() - store.settings.pitr_interval_s)

    def _is_settled(self, store: Timeline) -> bool:
        settled, next_commit = self._settled.get(store.timeline_id, (None, None))
        if settled is None or settled != _Settled.of(store):
            return False
        return next_commit is None or self._window_begin(store) < next_commit
