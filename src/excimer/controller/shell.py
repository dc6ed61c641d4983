"""The controller at work: carries out what `core` decides, on the store and on remote services.

How creation survives failures: the row is written first, as `creating`, with an id that the
client may have chosen; then the remote parts are made, each call safe to repeat; then the row
becomes `active`. If a step fails, the row becomes `deleting` and the client gets the error: an
answered failure leaves nothing behind that it could see. If the controller dies between,
`reconcile` drives `creating` rows on and `deleting` rows to their end, as it does for
safekeepers that were away when a timeline was made. Asking again with the same id is answered
with what exists.

Operations on one tenant follow one another; those on different tenants run side by side.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, ParamSpec, TypeVar

import msgspec

from excimer.base.clock import Clock
from excimer.base.errors import ExcimerError, RefusedError, RetryableError
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.controller import core
from excimer.controller.access import Access
from excimer.controller.branch_points import BranchPoints, require_quorum
from excimer.controller.cache_size import CacheSizes, check_cache_size
from excimer.controller.compute_limits import LimitsKeeper, check_limits
from excimer.controller.compute_nodes import ComputeNodes
from excimer.controller.endpoint_lifecycle import EndpointLifecycle
from excimer.controller.endpoint_settings import BuildCheck, EndpointSettings, SettingsCheck
from excimer.controller.history_operations import BranchHistory, BranchTools
from excimer.controller.imports import Imports
from excimer.controller.model import (
    HIDDEN_STATES,
    MAIN_BRANCH,
    UNBOUNDED,
    ComputeSpec,
    Endpoint,
    EndpointMode,
    Pageserver,
    Placement,
    Safekeeper,
    State,
    Tenant,
    Timeline,
)
from excimer.controller.remote import PageserverApi, PageserverTimeline, SafekeeperApi
from excimer.controller.role_passwords import RolePasswords
from excimer.controller.store import MetadataStore
from excimer.controller.suspension import Suspension, plan_delay
from excimer.controller.tokens import TokenMaker
from excimer.service.logs import get_logger
from excimer.service.tls import has_tls
from excimer.wire.auth import Resource
from excimer.wire.compute_limits import NO_LIMITS, ComputeLimits

RECONCILE_INTERVAL_S: Final = 5.0
START_WAIT_S: Final = 5.0
START_POLL_S: Final = 0.1

P = ParamSpec("P")
R = TypeVar("R")

log = get_logger(__name__)


class Controller:
    """All operations. The store's calls run in threads, so that a slow disk stops nobody."""

    def __init__(
        self,
        store: MetadataStore,
        tokens: TokenMaker,
        clock: Clock,
        settings_check: SettingsCheck | None = None,
    ) -> None:
        """`settings_check` None: by the PostgreSQL builds of this machine."""
        self._store = store
        self._tokens = tokens
        self._clock = clock
        self._locks: dict[TenantId, asyncio.Lock] = {}
        self._points = BranchPoints(clock, self._safekeeper_apis, self._pageserver_of)
        self.access = Access(store, tokens)
        tools = BranchTools(
            lock=self._lock,
            find_tenant=self.find_tenant,
            points=self._points,
            make_remote_parts=self._make_remote_parts,
            finish_timeline_deletion=self._finish_timeline_deletion,
            try_to_finish=self._try_to_finish,
            pageserver_api=self._pageserver_of,
            safekeeper_apis=self._safekeeper_apis,
        )
        self.passwords = RolePasswords(store, clock)
        self.history = BranchHistory(store, clock, tools)
        self.settings = EndpointSettings(store, self.find_endpoint, settings_check or BuildCheck())
        self.suspension = Suspension(store, self.find_endpoint)
        self.compute_nodes = ComputeNodes(store, tokens, clock)
        self.lifecycle = EndpointLifecycle(store, self.compute_nodes, self.suspension, self.read_spec)
        self.cache_sizes = CacheSizes(store, self.find_endpoint)
        self.limits = LimitsKeeper(store, self.compute_nodes, self.find_endpoint)
        self.imports = Imports(
            store=store,
            clock=clock,
            lock=self._lock,
            find_tenant=self.find_tenant,
            pageserver_of=self._pageserver_of,
            activate=self._activate,
            delete=self._finish_timeline_deletion,
        )

    async def _db(self, call: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        return await asyncio.to_thread(call, *arguments, **options)

    def _lock(self, tenant_id: TenantId) -> asyncio.Lock:
        return self._locks.setdefault(tenant_id, asyncio.Lock())

    # Reading

    async def list_tenants(self) -> tuple[list[Tenant], TenantId | None]:
        """Tenants that are not being deleted, and the default one."""
        tenants = await self._db(self._store.list_tenants)
        default = await self._db(self._store.read_default_tenant)
        return [tenant for tenant in tenants if tenant.state != "deleting"], default

    async def find_tenant(self, reference: str) -> Tenant:
        tenants, default = await self.list_tenants()
        return core.find_tenant(tenants, reference, default)

    async def list_timelines(self, tenant_id: TenantId) -> list[Timeline]:
        timelines = await self._db(self._store.list_timelines, tenant_id)
        return [timeline for timeline in timelines if timeline.state not in HIDDEN_STATES]

    async def find_branch(self, tenant_id: TenantId, reference: str) -> Timeline:
        return core.find_branch(await self.list_timelines(tenant_id), reference)

    async def list_endpoints(self) -> list[tuple[Endpoint, str]]:
        """Endpoints with the names of their branches."""
        endpoints = await self._db(self._store.list_endpoints)
        names = {row.timeline_id: row.name for row in await self._db(self._store.list_timelines)}
        return [(endpoint, names.get(endpoint.timeline_id, "")) for endpoint in endpoints]

    async def find_endpoint(self, name: str) -> tuple[Endpoint, str]:
        listed = await self.list_endpoints()
        found = core.find_endpoint([endpoint for endpoint, _ in listed], name)
        return next(pair for pair in listed if pair[0] == found)

    async def branch_name(self, endpoint: Endpoint) -> str:
        """Empty for one that is just being replaced."""
        return next((name for each, name in await self.list_endpoints() if each.name == endpoint.name), "")

    async def list_nodes(self) -> tuple[list[Pageserver], list[Safekeeper]]:
        return (
            await self._db(self._store.list_pageservers),
            await self._db(self._store.list_safekeepers),
        )

    # Tenants

    async def create_tenant(
        self, tenant_id: TenantId, timeline_id: TimelineId, name: str, pg_version: int, set_default: bool
    ) -> Tenant:
        """A tenant with its first branch, `main`. Repeatable with the same ids."""
        async with self._lock(tenant_id):
            tenants = await self._db(self._store.list_tenants)
            existing = next((row for row in tenants if row.tenant_id == tenant_id), None)
            if existing is not None and existing.state == "active":
                return existing
            core.refuse_deleted(existing, "tenant", tenant_id)
            core.check_pg_version(pg_version)
            pageservers = await self._db(self._store.list_pageservers)
            tenant = existing or core.plan_tenant(
                tenants, pageservers, tenant_id, name or tenant_id, self._clock.now()
            )
            timeline = core.plan_timeline(
                [], tenant, timeline_id, MAIN_BRANCH, pg_version, None, self._clock.now()
            )
            await self._db(self._store.put_tenant, tenant)
            try:
                if not any(row.name == MAIN_BRANCH for row in await self.list_timelines(tenant_id)):
                    await self._db(self._store.put_timeline, timeline)
                tenant = await self._complete_tenant(tenant)
            except (ExcimerError, asyncio.CancelledError):
                await asyncio.shield(self._db(self._store.put_tenant, _in_state(tenant, "deleting")))
                raise
        if set_default or (await self._db(self._store.read_default_tenant)) is None:
            await self._db(self._store.set_default_tenant, tenant_id)
        log.info("tenant created", tenant_id=tenant_id)
        return tenant

    async def _complete_tenant(self, tenant: Tenant) -> Tenant:
        pageserver = await self._pageserver_of(tenant)
        await pageserver.create_tenant(tenant.tenant_id, tenant.generation)
        for timeline in await self.list_timelines(tenant.tenant_id):
            if timeline.state == "creating" and timeline.ancestor_timeline_id is None:
                await self._complete_timeline(tenant, timeline, None)
        tenant = _in_state(tenant, "active")
        await self._db(self._store.put_tenant, tenant)
        return tenant

    async def set_default_tenant(self, reference: str) -> Tenant:
        tenant = await self.find_tenant(reference)
        await self._db(self._store.set_default_tenant, tenant.tenant_id)
        return tenant

    async def delete_tenant(self, reference: str) -> bool:
        """True when it is gone everywhere, False when unreachable parts are deleted later."""
        tenant = await self.find_tenant(reference)
        async with self._lock(tenant.tenant_id):
            core.check_tenant_deletable(tenant, await self._db(self._store.list_endpoints))
            await self._db(self._store.put_tenant, _in_state(tenant, "deleting"))
            return await self._try_to_finish(self._finish_tenant_deletion(tenant))

    async def _finish_tenant_deletion(self, tenant: Tenant) -> None:
        """The pageserver lets go of the tenant as a whole: one by one, a damaged timeline would hold up the
        others.
        """
        await (await self._pageserver_of(tenant)).delete_tenant(tenant.tenant_id)
        timelines = await self._db(self._store.list_timelines, tenant.tenant_id)
        for timeline in core.deletion_order(timelines):
            await self._finish_timeline_deletion(tenant, timeline)
        await self._db(self._store.remove_tenant, tenant.tenant_id)
        log.info("tenant deleted", tenant_id=tenant.tenant_id)

    # Timelines

    async def create_timeline(
        self,
        tenant_reference: str,
        timeline_id: TimelineId,
        name: str,
        *,
        ancestor: str | None,
        at: Lsn | str | None,
        pg_version: int | None,
        keep_active: bool = False,
    ) -> Timeline:
        """A branch of `ancestor` at an LSN, a timestamp (RFC 3339 text) or the head; a fresh cluster if None.

        It does not act on the outside by itself unless it is to keep that up. Repeatable with the same id.
        """
        tenant = await self.find_tenant(tenant_reference)
        timelines = await self._db(self._store.list_timelines, tenant.tenant_id)
        timeline, seen = core.plan_branch(
            timelines, tenant, timeline_id, name, ancestor, pg_version, self._clock.now()
        )
        if timeline.state == "active":
            return timeline
        start_lsn = await self._points.find_ingested(tenant, seen, at) if seen is not None else None
        async with self._lock(tenant.tenant_id):
            timelines = await self._db(self._store.list_timelines, tenant.tenant_id)
            timeline, parent = core.plan_branch(
                timelines, tenant, timeline_id, name, ancestor, pg_version, self._clock.now()
            )
            if timeline.state == "active":
                return timeline
            core.check_same_branch(seen, parent)
            if parent is not None and not keep_active and timeline not in timelines:
                timeline = core.made_quiet(timeline, timeline_id)
            await self._db(self._store.put_timeline, timeline)
            try:
                timeline = await self._complete_timeline(tenant, timeline, start_lsn)
            except (ExcimerError, asyncio.CancelledError):
                await asyncio.shield(self._db(self._store.put_timeline, _with_state(timeline, "deleting")))
                raise
        log.info("branch created", tenant_id=tenant.tenant_id, timeline_id=timeline_id, name=name)
        return timeline

    async def _complete_timeline(self, tenant: Tenant, timeline: Timeline, start_lsn: Lsn | None) -> Timeline:
        """Makes the remote parts of a `creating` timeline and activates it."""
        verifier = None
        if timeline.ancestor_timeline_id is None:
            verifier = await self.passwords.initial_verifier(timeline)
        made = await (await self._pageserver_of(tenant)).create_timeline(timeline, start_lsn, verifier)
        return await self._activate(timeline, made)

    async def _activate(self, timeline: Timeline, made: PageserverTimeline) -> Timeline:
        """What the pageserver has made gets its safekeepers, and is shown."""
        timeline = _with_state(await self._place_everywhere(timeline, made), "active")
        await self._db(self._store.put_timeline, timeline)
        return timeline

    async def _make_remote_parts(self, tenant: Tenant, timeline: Timeline, start_lsn: Lsn | None) -> Timeline:
        """On the pageserver and a majority of safekeepers; the row then says where the timeline begins."""
        made = await (await self._pageserver_of(tenant)).create_timeline(timeline, start_lsn)
        return await self._place_everywhere(timeline, made)

    async def _place_everywhere(self, timeline: Timeline, made: PageserverTimeline) -> Timeline:
        timeline = msgspec.structs.replace(
            timeline,
            ancestor_lsn=made.ancestor_lsn if timeline.ancestor_timeline_id else None,
            start_lsn=made.last_record_lsn,
            system_id=made.system_id,
            wal_segment_size=made.wal_segment_size,
        )
        await self._db(self._store.put_timeline, timeline)
        placements = core.plan_placements(timeline, await self._db(self._store.list_safekeepers))
        await self._db(self._store.put_placements, placements)
        answers = await asyncio.gather(
            *(self._place(timeline, placement) for placement in placements), return_exceptions=True
        )
        require_quorum(sum(answer is None for answer in answers), answers)
        return timeline

    async def _place(self, timeline: Timeline, placement: Placement) -> None:
        safekeepers = {row.id: row for row in await self._db(self._store.list_safekeepers)}
        api = SafekeeperApi(safekeepers[placement.safekeeper_id], self._tokens)
        await api.create_timeline(timeline)
        await self._db(self._store.put_placements, [msgspec.structs.replace(placement, ready=True)])

    async def delete_timeline(self, tenant_reference: str, reference: str) -> bool:
        """True when it is gone everywhere, False when unreachable parts are deleted later."""
        tenant = await self.find_tenant(tenant_reference)
        async with self._lock(tenant.tenant_id):
            timelines = await self._db(self._store.list_timelines, tenant.tenant_id)
            timeline = core.find_branch(timelines, reference)
            core.check_timeline_deletable(timeline, timelines, await self._db(self._store.list_endpoints))
            timeline = _with_state(timeline, "deleting")
            await self._db(self._store.put_timeline, timeline)
            return await self._try_to_finish(self._finish_timeline_deletion(tenant, timeline))

    async def _finish_timeline_deletion(self, tenant: Tenant, timeline: Timeline) -> None:
        await (await self._pageserver_of(tenant)).delete_timeline(tenant.tenant_id, timeline.timeline_id)
        safekeepers = {row.id: row for row in await self._db(self._store.list_safekeepers)}
        for placement in await self._db(self._store.list_placements, timeline.timeline_id):
            api = SafekeeperApi(safekeepers[placement.safekeeper_id], self._tokens)
            await api.delete_timeline(tenant.tenant_id, timeline.timeline_id)
            await self._db(self._store.remove_placement, timeline.timeline_id, placement.safekeeper_id)
        await self._db(self._store.remove_timeline, tenant.tenant_id, timeline.timeline_id)
        log.info("branch deleted", tenant_id=tenant.tenant_id, timeline_id=timeline.timeline_id)

    # Endpoints

    async def create_endpoint(
        self,
        name: str,
        tenant_reference: str,
        branch: str,
        *,
        mode: EndpointMode,
        at: Lsn | str | None,
        pg_version: int | None,
        ports: tuple[int, int],
        postgres_settings: dict[str, str],
        listen: core.Listen = core.LOOPBACK_ONLY,
        suspend_delay_s: int | None = None,
        cache_size_mib: int = UNBOUNDED,
        limits: ComputeLimits = NO_LIMITS,
    ) -> Endpoint:
        """`at`: the LSN or the time (RFC 3339) that a static endpoint shows; None for a primary."""
        delay_s = plan_delay(mode, suspend_delay_s)
        check_cache_size(cache_size_mib)
        check_limits(limits)
        tenant = await self.find_tenant(tenant_reference)
        timeline = await self.find_branch(tenant.tenant_id, branch)
        core.check_in_service(timeline)
        lsn = None if at is None else await self._points.find(tenant, timeline, at)
        async with self._lock(tenant.tenant_id):
            now = await self.find_branch(tenant.tenant_id, branch)
            core.check_in_service(now)
            core.check_same_branch(timeline, now)
            settings = await self.settings.check(timeline.pg_version, postgres_settings)
            endpoint = core.plan_endpoint(
                await self._db(self._store.list_endpoints),
                timeline,
                name=name,
                mode=mode,
                lsn=lsn,
                pg_version=pg_version,
                ports=ports,
                postgres_settings=settings,
                listen=listen,
                has_default_certificate=has_tls(),
                now=self._clock.now(),
            )
            endpoint = msgspec.structs.replace(
                endpoint, suspend_delay_s=delay_s, cache_size_mib=cache_size_mib, limits=limits
            )
            await self._db(self._store.add_endpoint, endpoint)
        log.info("endpoint created", endpoint=name, timeline_id=timeline.timeline_id)
        return endpoint

    async def set_listen(
        self,
        name: str,
        *,
        host: str | None,
        port: int | None,
        certificate: tuple[str | None, str | None],
        without_tls: bool,
    ) -> None:
        """Where an endpoint listens from its next start on; None leaves a thing as it is."""
        endpoint, _ = await self.find_endpoint(name)
        changed = core.plan_listen(
            endpoint,
            host=host,
            port=port,
            certificate=certificate,
            without_tls=without_tls,
            has_default_certificate=has_tls(),
        )
        await self._db(self._store.put_listen, changed)

    async def delete_endpoint(self, name: str) -> None:
        """Raises `StillRunningError`."""
        endpoint, _ = await self.find_endpoint(name)
        await self.lifecycle.remove(endpoint)
        await self.release_endpoint(name)
        await self._db(self._store.remove_endpoint, name)
        log.info("endpoint deleted", endpoint=name)

    async def promote_endpoint(self, name: str) -> Endpoint:
        """A replica becomes a primary, which a primary is already; whoever runs its compute has stopped
        it."""
        await self.release_endpoint(name)
        endpoint = core.plan_promotion((await self.find_endpoint(name))[0])
        await self._db(self._store.put_mode, endpoint)
        log.info("endpoint promoted", endpoint=name)
        return endpoint

    async def release_endpoint(self, name: str) -> int:
        """Of an endpoint that only read and is stopped: what it leased is given back; how many LSNs.

        If the pageserver does not hear of it, the lease runs out by itself.
        """
        endpoint, _ = await self.find_endpoint(name)
        if endpoint.mode == "primary":
            return 0
        tenants = {row.tenant_id: row for row in await self._db(self._store.list_tenants)}
        try:
            api = await self._pageserver_of(tenants[endpoint.tenant_id])
            holder = core.holder_of(endpoint.name)
            return await api.release_leases(endpoint.tenant_id, endpoint.timeline_id, holder)
        except (RefusedError, RetryableError) as error:
            log.warning("a lease is not given back and runs out", endpoint=name, error=error)
            return 0

    async def read_spec(self, name: str) -> ComputeSpec:
        endpoint, _ = await self.find_endpoint(name)
        tenants = {row.tenant_id: row for row in await self._db(self._store.list_tenants)}
        tenant = tenants[endpoint.tenant_id]
        timeline = await self.find_branch(tenant.tenant_id, endpoint.timeline_id)
        core.check_in_service(timeline)
        pageservers = {row.id: row for row in await self._db(self._store.list_pageservers)}
        return core.build_spec(
            endpoint,
            timeline,
            pageservers[tenant.pageserver_id],
            await self._db(self._store.list_placements, timeline.timeline_id),
            await self._db(self._store.list_safekeepers),
            self.access.tokens_of(endpoint),
        )

    # What is in a branch

    async def point_in_branch(
        self, tenant_reference: str, reference: str, at: Lsn | str | None
    ) -> tuple[Timeline, Lsn]:
        """A branch and one of its LSNs: the one given, the one at a timestamp, or the head.

        Whether its history still reaches so far back is the pageserver's to say.
        """
        tenant = await self.find_tenant(tenant_reference)
        timeline = await self.find_branch(tenant.tenant_id, reference)
        core.check_in_service(timeline)
        return timeline, await self._points.find(tenant, timeline, at)

    async def pageserver_of(self, tenant_id: TenantId) -> tuple[Pageserver, PageserverApi]:
        """Who serves the tenant, and its management API."""
        tenant = await self.find_tenant(tenant_id)
        pageservers = {row.id: row for row in await self._db(self._store.list_pageservers)}
        return pageservers[tenant.pageserver_id], await self._pageserver_of(tenant)

    def reading_token(self, timeline: Timeline) -> str:
        """Opens the branch's pages for a day: long enough for a copy of it."""
        return self._tokens.for_reading(Resource(timeline.tenant_id, timeline.timeline_id))

    # Driving things to their end

    async def reconcile_for_ever(self) -> None:
        await self._wait_for_pageservers()
        while True:
            await self.reconcile()
            await asyncio.sleep(RECONCILE_INTERVAL_S)

    async def _wait_for_pageservers(self) -> None:
        """For a while: after a start of everything they come up beside us."""
        deadline = self._clock.monotonic() + START_WAIT_S
        for pageserver in await self._db(self._store.list_pageservers):
            api = PageserverApi(pageserver, self._tokens)
            while self._clock.monotonic() < deadline:
                try:
                    await api.list_tenants()
                    break
                except ExcimerError:
                    await asyncio.sleep(START_POLL_S)

    async def reconcile(self) -> None:
        """One round over what is half made or half deleted. What fails waits for the next."""
        for tenant in await self._db(self._store.list_tenants):
            async with self._lock(tenant.tenant_id):
                await self._try_to_finish(self._reconcile_tenant(tenant.tenant_id))
        for pageserver in await self._db(self._store.list_pageservers):
            await self._try_to_finish(self._reattach_lost(pageserver))

    async def _reattach_lost(self, pageserver: Pageserver) -> None:
        """Tenants that a pageserver ought to have and does not know: it has lost its disk.

        They get a new generation, durable before it is spoken, as at any attachment (G1).
        """
        api = PageserverApi(pageserver, self._tokens)
        attached = await api.list_tenants()
        for listed in await self._db(self._store.list_tenants):
            if listed.pageserver_id != pageserver.id or listed.tenant_id in attached:
                continue
            async with self._lock(listed.tenant_id):
                tenants = await self._db(self._store.list_tenants)
                tenant = next((row for row in tenants if row.tenant_id == listed.tenant_id), None)
                if tenant is None or tenant.state != "active" or tenant.generation != listed.generation:
                    continue
                tenant = msgspec.structs.replace(tenant, generation=tenant.generation + 1)
                await self._db(self._store.put_tenant, tenant)
                log.warning(
                    "tenant is unknown to its pageserver: it is attached again", tenant=tenant.tenant_id
                )
                await api.create_tenant(tenant.tenant_id, tenant.generation)

    async def _reconcile_tenant(self, tenant_id: TenantId) -> None:
        tenants = await self._db(self._store.list_tenants)
        tenant = next((row for row in tenants if row.tenant_id == tenant_id), None)
        if tenant is None:
            return
        if tenant.state == "deleting":
            await self._finish_tenant_deletion(tenant)
            return
        if tenant.state == "creating":
            tenant = await self._complete_tenant(tenant)
        for timeline in await self._db(self._store.list_timelines, tenant_id):
            if timeline.state == "deleting":
                await self._try_to_finish(self._finish_timeline_deletion(tenant, timeline))
            elif timeline.state == "importing":
                await self._try_to_finish(self.imports.resume(tenant, timeline))
            elif timeline.state == "creating":
                await self._try_to_finish(self._abandon_or_complete(tenant, timeline))
            elif timeline.state not in ("active", "archived"):
                await self._try_to_finish(self.history.resume(tenant, timeline))
        await self._place_missing(tenant_id)

    async def _abandon_or_complete(self, tenant: Tenant, timeline: Timeline) -> None:
        """After a crash of ours in mid-creation; a branch whose point was not recorded is given up."""
        if timeline.ancestor_timeline_id is not None and timeline.start_lsn is None:
            timeline = _with_state(timeline, "deleting")
            await self._db(self._store.put_timeline, timeline)
            await self._finish_timeline_deletion(tenant, timeline)
        else:
            await self._complete_timeline(tenant, timeline, timeline.ancestor_lsn)

    async def _place_missing(self, tenant_id: TenantId) -> None:
        """Timelines on safekeepers that were away when these were made."""
        timelines = {row.timeline_id: row for row in await self.list_timelines(tenant_id)}
        for placement in await self._db(self._store.list_placements):
            timeline = timelines.get(placement.timeline_id)
            if not placement.ready and timeline is not None and timeline.state == "active":
                await self._try_to_finish(self._place(timeline, placement))

    async def _try_to_finish(self, work: Awaitable[object]) -> bool:
        """Whether it came to its end; if not, that is logged and left to the next `reconcile`."""
        try:
            await work
        except ExcimerError as error:
            log.warning("left for later", error=error)
            return False
        return True

    async def _pageserver_of(self, tenant: Tenant) -> PageserverApi:
        pageservers = {row.id: row for row in await self._db(self._store.list_pageservers)}
        return PageserverApi(pageservers[tenant.pageserver_id], self._tokens)

    async def _safekeeper_apis(self, timeline: Timeline) -> list[SafekeeperApi]:
        """Of those that are to have the timeline."""
        placements = await self._db(self._store.list_placements, timeline.timeline_id)
        placed: set[NodeId] = {placement.safekeeper_id for placement in placements}
        safekeepers = await self._db(self._store.list_safekeepers)
        return [SafekeeperApi(row, self._tokens) for row in safekeepers if row.id in placed]


def _in_state(tenant: Tenant, state: State) -> Tenant:
    return msgspec.structs.replace(tenant, state=state)


def _with_state(timeline: Timeline, state: State) -> Timeline:
    return msgspec.structs.replace(timeline, state=state)
