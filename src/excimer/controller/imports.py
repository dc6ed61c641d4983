"""Branches whose content comes from outside: the name is reserved, the content sent, the branch shown.

::

    begin: row, *importing* -> (the sender streams to the pageserver) -> finish: safekeepers, *active*
                                           |
              the sender is gone: `resume` finishes what is whole, and forgets what is not

The controller sees no byte of the content. Whether an import goes on, is whole, or was broken off is the
pageserver's to say, and it never has one half: so whoever dies, `resume` finds the way, and a second try
under the same name need not wait for it.

Not here: sending (the command line), taking (`excimer.pageserver.cluster_import`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import msgspec

from excimer.base.clock import Clock
from excimer.base.ids import TenantId, TimelineId
from excimer.controller import core
from excimer.controller.model import NameTakenError, Tenant, Timeline, UnknownNameError
from excimer.controller.remote import PageserverApi, PageserverTimeline
from excimer.controller.store import MetadataStore
from excimer.service.logs import get_logger

START_WAIT_S: Final = 60.0
"""So long after `begin` an import of which the pageserver knows nothing is taken to be on its way."""

log = get_logger(__name__)


class BegunImport(NamedTuple):
    timeline: Timeline
    pageserver_http_address: str


class Imports:
    """What the controller does for imports, with what it has for branches."""

    def __init__(
        self,
        *,
        store: MetadataStore,
        clock: Clock,
        lock: Callable[[TenantId], asyncio.Lock],
        find_tenant: Callable[[str], Awaitable[Tenant]],
        pageserver_of: Callable[[Tenant], Awaitable[PageserverApi]],
        activate: Callable[[Timeline, PageserverTimeline], Awaitable[Timeline]],
        delete: Callable[[Tenant, Timeline], Awaitable[None]],
    ) -> None:
        self._store = store
        self._clock = clock
        self._lock = lock
        self._find_tenant = find_tenant
        self._pageserver_of = pageserver_of
        self._activate = activate
        self._delete = delete

    async def begin(
        self, tenant: str, timeline_id: TimelineId, name: str, pg_version: int, *, keep_active: bool = False
    ) -> BegunImport:
        """Reserves the name; the branch is quiet unless it is to be active.

        Raises `NameTakenError`, also while another import of that name goes on.
        """
        found = await self._find_tenant(tenant)
        async with self._lock(found.tenant_id):
            for row in await self._timelines(found):
                if row.name == name and row.state == "importing":
                    await self._settle_broken_off(found, row)
            timelines = await self._timelines(found)
            if any(row.name == name and row.state == "importing" for row in timelines):
                raise NameTakenError(f"branch {name!r} is being imported now")
            planned = core.plan_timeline(
                timelines, found, timeline_id, name, pg_version, None, self._clock.now()
            )
            if not keep_active:
                planned = core.made_quiet(planned, timeline_id)
            timeline = msgspec.structs.replace(planned, state="importing")
            await asyncio.to_thread(self._store.put_timeline, timeline)
            return BegunImport(timeline, (await self._pageserver_of(found)).address)

    async def finish(self, tenant: str, timeline_id: TimelineId) -> Timeline:
        """The branch, visible. Raises `UnknownNameError` unless the pageserver has it whole."""
        found = await self._find_tenant(tenant)
        async with self._lock(found.tenant_id):
            row = await self._row(found, timeline_id)
            if row.state != "importing":
                return row
            made = await (await self._pageserver_of(found)).find_timeline(found.tenant_id, timeline_id)
            if made is None:
                raise UnknownNameError(f"nothing was imported for branch {row.name!r}")
            return await self._activate(row, made)

    async def abandon(self, tenant: str, timeline_id: TimelineId) -> None:
        """Forgets one that is not finished, and what is there of it."""
        found = await self._find_tenant(tenant)
        async with self._lock(found.tenant_id):
            row = await self._row(found, timeline_id)
            if row.state == "importing":
                await self._forget(found, row)

    async def resume(self, tenant: Tenant, timeline: Timeline) -> None:
        """Finishes or forgets one whose sender does not. Call it with the tenant locked."""
        if self._clock.now() - timeline.created_at >= START_WAIT_S:
            await self._settle_broken_off(tenant, timeline)

    async def _settle_broken_off(self, tenant: Tenant, timeline: Timeline) -> None:
        pageserver = await self._pageserver_of(tenant)
        if timeline.timeline_id in await pageserver.list_imports(tenant.tenant_id):
            return
        made = await pageserver.find_timeline(tenant.tenant_id, timeline.timeline_id)
        if made is not None:
            await self._activate(timeline, made)
        else:
            await self._forget(tenant, timeline)

    async def _forget(self, tenant: Tenant, timeline: Timeline) -> None:
        timeline = msgspec.structs.replace(timeline, state="deleting")
        await asyncio.to_thread(self._store.put_timeline, timeline)
        await self._delete(tenant, timeline)

    async def _timelines(self, tenant: Tenant) -> list[Timeline]:
        return await asyncio.to_thread(self._store.list_timelines, tenant.tenant_id)

    async def _row(self, tenant: Tenant, timeline_id: TimelineId) -> Timeline:
        for row in await self._timelines(tenant):
            if row.timeline_id == timeline_id and row.state != "deleting":
                return row
        raise UnknownNameError(f"tenant {tenant.name!r} has no import {timeline_id}")
