"""What the controller does for the history of branches: restore, reset, archive, detach, sizes, moments.

Each change writes its intention first, as the row's state, and is then safe to repeat until it is done:

===========  ===========================================================  ========================
state        what is done                                                 end
===========  ===========================================================  ========================
replacing    the new timeline is made on the pageserver and safekeepers   one transaction: names, endpoints
archiving    the pageserver has all WAL, then lets go of the timeline     archived
unarchiving  the pageserver takes it up again                             active
detaching    the pageserver copies, then the rows follow it               active, one transaction
===========  ===========================================================  ========================

A crash in the middle is driven on by `resume`, from the controller's reconciliation; a *replacing* timeline
whose starting point was not recorded is given up, and the branch stays what it was.

A compute that writes to a branch has to be stopped before the branch takes another state or is archived. It
is looked for at the safekeepers, because it may have been started by anybody. One that slips through does no
harm: it goes on with the timeline it was started on.

Not here: the decisions (`branch_history`), reconciliation itself (`shell`).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from excimer.base.clock import Clock
from excimer.base.errors import ConflictError, ExcimerError, RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.controller import branch_history as plan
from excimer.controller import core
from excimer.controller.branch_points import BranchPoints
from excimer.controller.model import BadRequestError, State, Tenant, Timeline
from excimer.controller.remote import PageserverApi, SafekeeperApi
from excimer.controller.role_passwords import inherited_passwords
from excimer.controller.store import MetadataStore
from excimer.service.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")


class BranchInUseError(ConflictError):
    """A compute writes to the branch now."""


class BranchDamagedError(ConflictError):
    """The pageserver cannot read what it has of the branch."""


@dataclass(frozen=True, slots=True)
class BranchTools:
    """What the controller has for branches, and this builds upon (`shell.Controller`)."""

    lock: Callable[[TenantId], asyncio.Lock]
    find_tenant: Callable[[str], Awaitable[Tenant]]
    points: BranchPoints
    make_remote_parts: Callable[[Tenant, Timeline, Lsn | None], Awaitable[Timeline]]
    finish_timeline_deletion: Callable[[Tenant, Timeline], Awaitable[None]]
    try_to_finish: Callable[[Awaitable[object]], Awaitable[bool]]
    pageserver_api: Callable[[Tenant], Awaitable[PageserverApi]]
    safekeeper_apis: Callable[[Timeline], Awaitable[list[SafekeeperApi]]]


class BranchHistory:
    """All operations on the history of branches."""

    def __init__(self, store: MetadataStore, clock: Clock, tools: BranchTools) -> None:
        self._store = store
        self._clock = clock
        self._tools = tools

    # Another state under the same name

    async def restore(
        self,
        tenant: str,
        reference: str,
        timeline_id: TimelineId,
        at: Lsn | str,
        kept_as: str | None,
        *,
        keeps_subscriptions: bool = False,
    ) -> tuple[Timeline, Timeline | None]:
        """The branch at an earlier LSN or moment (RFC 3339), and what it was. Repeatable with the id."""

        def plan_it(branch: Timeline, timelines: list[Timeline]) -> tuple[Timeline, str]:
            return branch, kept_as or plan.old_name(timelines, branch.name, self._clock.now())

        return await self._replace(tenant, reference, timeline_id, at, plan_it, keeps_subscriptions)

    async def reset(
        self,
        tenant: str,
        reference: str,
        timeline_id: TimelineId,
        kept_as: str | None,
        *,
        keeps_subscriptions: bool = False,
    ) -> tuple[Timeline, Timeline | None]:
        """The branch at its parent's head, and what it was, unless that goes. Repeatable with the id."""

        def plan_it(branch: Timeline, timelines: list[Timeline]) -> tuple[Timeline, str | None]:
            parent = plan.find_parent(branch, timelines)
            plan.check_settled(parent)
            return parent, kept_as

        return await self._replace(tenant, reference, timeline_id, None, plan_it, keeps_subscriptions)

    async def _replace(
        self,
        tenant_reference: str,
        reference: str,
        timeline_id: TimelineId,
        at: Lsn | str | None,
        plan_it: Callable[[Timeline, list[Timeline]], tuple[Timeline, str | None]],
        keeps_subscriptions: bool,
    ) -> tuple[Timeline, Timeline | None]:
        tenant = await self._tools.find_tenant(tenant_reference)

        async def look() -> tuple[Timeline | None, Timeline, Timeline, str | None]:
            timelines = await self._timelines(tenant)
            row = next((each for each in timelines if each.timeline_id == timeline_id), None)
            if row is not None and row.state not in ("active", "replacing"):
                raise BadRequestError(f"timeline id {timeline_id} is in use: choose a new one")
            if row is not None and row.state == "active":
                return row, row, row, None
            branch = core.find_branch(timelines, reference)
            plan.check_settled(branch)
            await self._refuse_writer(branch)
            source, kept_as = plan_it(branch, timelines)
            return row, branch, source, kept_as

        row, _, seen, _ = await look()
        if row is not None and row.state == "active":
            return row, None
        start_lsn = await self._tools.points.find_ingested(tenant, seen, at)
        async with self._tools.lock(tenant.tenant_id):
            row, branch, source, kept_as = await look()
            if row is not None and row.state == "active":
                return row, None
            core.check_same_branch(seen, source)
            if row is None:
                row = plan.plan_replacement(
                    await self._timelines(tenant),
                    branch,
                    source,
                    timeline_id,
                    kept_as=kept_as,
                    keeps_subscriptions=keeps_subscriptions,
                    now=self._clock.now(),
                )
                await self._db(self._store.put_timelines, [row])
            try:
                made = await self._tools.make_remote_parts(tenant, row, start_lsn)
            except (ExcimerError, asyncio.CancelledError):
                await asyncio.shield(self._db(self._store.put_timelines, [_in_state(row, "deleting")]))
                raise
            return await self._exchange(tenant, made)

    async def _exchange(self, tenant: Tenant, made: Timeline) -> tuple[Timeline, Timeline | None]:
        """The one step by which the branch changes."""
        done = plan.finish_replacement(
            made,
            await self._timelines(tenant),
            await self._db(self._store.list_endpoints),
            self._clock.now(),
        )
        await self._db(self._store.replace_timeline, done.old, done.new, done.moved_endpoints)
        log.info("branch replaced", branch=done.new.name, timeline_id=made.timeline_id, old=done.old.name)
        if done.old.state != "deleting":
            return done.new, done.old
        await self._tools.try_to_finish(self._tools.finish_timeline_deletion(tenant, done.old))
        return done.new, None

    # Put away, and back

    async def archive(self, tenant_reference: str, reference: str) -> Timeline:
        """`archived`, or `archiving` when what is unreachable is finished later. Repeatable."""
        tenant = await self._tools.find_tenant(tenant_reference)
        await self._wait_for_the_last_wal(tenant, reference)
        async with self._tools.lock(tenant.tenant_id):
            timelines = await self._timelines(tenant)
            branch = core.find_branch(timelines, reference)
            if branch.state not in ("archiving", "archived"):
                plan.check_settled(branch)
                plan.check_archivable(branch, timelines)
                await self._refuse_writer(branch)
                branch = await self._set_state(branch, "archiving")
            return await self._drive(tenant, branch, back_to="active")

    async def _wait_for_the_last_wal(self, tenant: Tenant, reference: str) -> None:
        """Of a branch that is to be archived; nobody waits behind it. What comes later, comes later."""
        timelines = await self._timelines(tenant)
        branch = core.find_branch(timelines, reference)
        if branch.state in core.ARCHIVE_STATES:
            return
        plan.check_settled(branch)
        plan.check_archivable(branch, timelines)
        await self._refuse_writer(branch)
        with contextlib.suppress(RetryableError):
            await self._tools.points.find_ingested(tenant, branch, None)

    async def unarchive(self, tenant_reference: str, reference: str) -> Timeline:
        """`active`, or `unarchiving` when what is unreachable is finished later. Repeatable."""
        tenant = await self._tools.find_tenant(tenant_reference)
        async with self._tools.lock(tenant.tenant_id):
            timelines = await self._timelines(tenant)
            branch = core.find_branch(timelines, reference)
            if branch.state in core.ARCHIVE_STATES:
                plan.check_unarchivable(branch, timelines)
                branch = await self._set_state(branch, "unarchiving")
            return await self._drive(tenant, branch, back_to="archived")

    async def activate(self, tenant_reference: str, reference: str) -> Timeline:
        """It acts on the outside as its catalogs say, from the next start of its endpoint on. Repeatable."""
        tenant = await self._tools.find_tenant(tenant_reference)
        async with self._tools.lock(tenant.tenant_id):
            branch = core.made_active(core.find_branch(await self._timelines(tenant), reference))
            await self._db(self._store.put_timelines, [branch])
            return branch

    # Alone

    async def detach(self, tenant_reference: str, reference: str) -> Timeline:
        """Without parent: `active`, or `detaching` when it takes longer and is finished later. Repeatable."""
        tenant = await self._tools.find_tenant(tenant_reference)
        async with self._tools.lock(tenant.tenant_id):
            branch = core.find_branch(await self._timelines(tenant), reference)
            if branch.state != "detaching":
                plan.check_settled(branch)
                if branch.ancestor_timeline_id is None:
                    return branch
                branch = await self._set_state(branch, "detaching")
            return await self._drive(tenant, branch, back_to="active")

    # Questions

    async def lsn_at(self, tenant_reference: str, reference: str, timestamp: str) -> Lsn:
        """The newest LSN before any commit later than the timestamp (RFC 3339)."""
        tenant, branch = await self._in_service(tenant_reference, reference)
        return await self._tools.points.lsn_at(tenant, branch, timestamp)

    async def timestamp_of(self, tenant_reference: str, reference: str, lsn: Lsn) -> str:
        """When the last commit at or below the LSN happened (RFC 3339)."""
        tenant, branch = await self._in_service(tenant_reference, reference)
        api = await self._tools.pageserver_api(tenant)
        return await api.timestamp_of_lsn(tenant.tenant_id, branch.timeline_id, lsn)

    async def sizes(self, tenant_reference: str) -> tuple[Tenant, dict[str, Any]]:
        """What the pageserver answers, with the branches' names."""
        tenant = await self._tools.find_tenant(tenant_reference)
        answer = await (await self._tools.pageserver_api(tenant)).sizes(tenant.tenant_id)
        names = {
            row.timeline_id: row.name for row in await self._timelines(tenant) if row.state != "deleting"
        }
        branches = [
            row | {"name": names[row["timeline_id"]]}
            for row in answer["timelines"]
            if row["timeline_id"] in names
        ]
        damaged = [
            row | {"name": names[row["timeline_id"]]}
            for row in answer["damaged"]
            if row["timeline_id"] in names
        ]
        return tenant, answer | {"timelines": branches, "damaged": damaged}

    # Driving to the end

    async def resume(self, tenant: Tenant, timeline: Timeline) -> None:
        """Goes on with what stands in the row's state. Call it with the tenant locked."""
        rows = {row.timeline_id: row for row in await self._timelines(tenant)}
        timeline = rows.get(timeline.timeline_id, timeline)  # settling another may have changed it
        if timeline.state == "replacing":
            if timeline.start_lsn is None:
                doomed = await self._set_state(timeline, "deleting")
                await self._tools.finish_timeline_deletion(tenant, doomed)
            else:
                made = await self._tools.make_remote_parts(tenant, timeline, timeline.ancestor_lsn)
                await self._exchange(tenant, made)
        elif timeline.state in ("archiving", "unarchiving", "detaching"):
            await self._finish(tenant, timeline)

    async def _drive(self, tenant: Tenant, branch: Timeline, *, back_to: State) -> Timeline:
        """To the end, or later: then the row says what goes on. A refusal leaves the branch as it was."""
        try:
            return await self._finish(tenant, branch)
        except RefusedError:
            await self._set_state(branch, back_to)
            raise
        except RetryableError as error:
            log.warning("left for later", branch=branch.name, state=branch.state, error=error)
            return branch

    async def _finish(self, tenant: Tenant, branch: Timeline) -> Timeline:
        pageserver = await self._tools.pageserver_api(tenant)
        ids = tenant.tenant_id, branch.timeline_id
        if branch.state in ("archiving", "unarchiving", "detaching"):
            await _refuse_damaged(pageserver, branch)
        if branch.state == "archiving":
            wanted_lsn = await self._tools.points.newest_commit_lsn(branch)
            await self._tools.points.require_ingested(pageserver, branch, wanted_lsn)
            await pageserver.set_archived(*ids, is_archived=True)
            return await self._set_state(branch, "archived")
        if branch.state == "unarchiving":
            await pageserver.set_archived(*ids, is_archived=False)
            return await self._set_state(branch, "active")
        if branch.state == "detaching":
            await pageserver.detach_ancestor(*ids)
            known = await pageserver.list_timelines(tenant.tenant_id)
            origins = {
                each.timeline_id: plan.Origin(each.ancestor_timeline_id, each.ancestor_lsn)
                for each in known.values()
            }
            timelines = await self._timelines(tenant)
            await self._keep_passwords(branch, timelines)
            moved = plan.follow_pageserver(timelines, origins)
            detached = msgspec.structs.replace(
                branch, state="active", ancestor_timeline_id=None, ancestor_lsn=None
            )
            others = [row for row in moved if row.timeline_id != branch.timeline_id]
            await self._db(self._store.put_timelines, [detached, *others])
            log.info("branch detached", branch=branch.name, reparented=len(others))
            return detached
        return branch

    async def _keep_passwords(self, branch: Timeline, timelines: list[Timeline]) -> None:
        """Those that a branch has from ancestors that it is about to lose."""
        known = await self._db(self._store.list_role_passwords, branch.tenant_id)
        await self._db(self._store.put_role_passwords, inherited_passwords(timelines, known, branch))

    async def _refuse_writer(self, branch: Timeline) -> None:
        """Raises `BranchInUseError` if a safekeeper knows a compute that writes; those away are not asked."""
        apis = await self._tools.safekeeper_apis(branch)
        answers = await asyncio.gather(
            *(api.count_writers(branch.tenant_id, branch.timeline_id) for api in apis), return_exceptions=True
        )
        if any(isinstance(answer, int) and answer > 0 for answer in answers):
            endpoints = await self._db(self._store.list_endpoints)
            names = [each.name for each in endpoints if each.timeline_id == branch.timeline_id]
            which = f" (endpoints: {', '.join(sorted(names))})" if names else ""
            raise BranchInUseError(f"a compute is running on branch {branch.name!r}{which}: stop it first")

    async def _in_service(self, tenant_reference: str, reference: str) -> tuple[Tenant, Timeline]:
        tenant = await self._tools.find_tenant(tenant_reference)
        branch = core.find_branch(await self._timelines(tenant), reference)
        core.check_in_service(branch)
        return tenant, branch

    async def _timelines(self, tenant: Tenant) -> list[Timeline]:
        return await self._db(self._store.list_timelines, tenant.tenant_id)

    async def _set_state(self, timeline: Timeline, state: State) -> Timeline:
        changed = _in_state(timeline, state)
        await self._db(self._store.put_timelines, [changed])
        return changed

    async def _db(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.to_thread(call, *arguments)


def _in_state(timeline: Timeline, state: State) -> Timeline:
    return msgspec.structs.replace(timeline, state=state)


async def _refuse_damaged(pageserver: PageserverApi, branch: Timeline) -> None:
    known = (await pageserver.list_timelines(branch.tenant_id)).get(branch.timeline_id)
    if known is not None and known.is_damaged:
        raise BranchDamagedError(f"branch {branch.name!r} is damaged: {known.problem}")
