"""The management API: tenants and timelines over HTTP, for the controller and operators.

LSNs are text as PostgreSQL writes them, ids 32 hex digits. Every route needs a bearer token with the right
`manage` on what its path names. Errors are mapped to statuses by `service.http`, the one table of that kind.

Not here: archiving, detaching, sizes (`history_api`); pages and basebackups, which computes ask for
over the page service.
"""

from datetime import datetime
from typing import Annotated, Protocol

from fastapi import APIRouter, Body, Path, Query, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from excimer.base.clock import unix_to_timestamptz
from excimer.base.errors import RefusedError
from excimer.base.ids import TenantId, TimelineId, parse_tenant_id, parse_timeline_id
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.pageserver.endpoints.import_api import ImportOperations, add_import_routes
from excimer.pageserver.lsn_by_timestamp import LsnAtTimestamp
from excimer.pageserver.model import NewTimeline, TenantRecord, TimelineDetail
from excimer.pgformat.role_catalog import is_initial_verifier

ID_PATTERN = "^[0-9a-fA-F]{32}$"
TenantPath = Annotated[str, Path(pattern=ID_PATTERN, description="32 hex digits")]
TimelinePath = Annotated[str, Path(pattern=ID_PATTERN, description="32 hex digits")]


class TenantOperations(ImportOperations, Protocol):
    """What the API asks of the pageserver (`tenants.Tenants`)."""

    async def attach(self, tenant_id: TenantId, generation: int) -> TenantRecord: ...
    def tenants(self) -> list[TenantRecord]: ...
    async def delete_tenant(self, tenant_id: TenantId) -> None: ...
    async def create_timeline(self, tenant_id: TenantId, new: NewTimeline) -> TimelineDetail: ...
    def timelines(self, tenant_id: TenantId) -> list[TimelineDetail]: ...
    def timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineDetail: ...
    async def logical_size_bytes(self, tenant_id: TenantId, timeline_id: TimelineId) -> int | None: ...
    async def delete_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> None: ...
    async def flush(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineDetail: ...
    async def lsn_at_timestamp(
        self, tenant_id: TenantId, timeline_id: TimelineId, timestamptz: int
    ) -> LsnAtTimestamp: ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CreateTenant(_Strict):
    tenant_id: str = Field(pattern=ID_PATTERN)
    generation: int = Field(1, ge=1, description="grows with each attachment of the tenant to a pageserver")


class TenantAnswer(BaseModel):
    tenant_id: str
    generation: int


class CreateTimeline(_Strict):
    new_timeline_id: str = Field(pattern=ID_PATTERN)
    pg_version: int | None = Field(None, description="14 to 18; a branch has its ancestor's")
    ancestor_timeline_id: str | None = Field(None, pattern=ID_PATTERN)
    ancestor_start_lsn: str | None = Field(
        None, description="where to branch, rounded down to where a record can end; omitted: the newest"
    )
    password_verifier: str | None = Field(
        None,
        description="SCRAM-SHA-256 verifier of a new cluster's superuser: salt of 16 bytes, 4096 iterations",
    )


class TimelineAnswer(BaseModel):
    tenant_id: str
    timeline_id: str
    pg_version: int
    system_id: int
    wal_segment_size: int
    ancestor_timeline_id: str | None
    ancestor_lsn: str | None
    last_record_lsn: str
    prev_record_lsn: str
    disk_consistent_lsn: str
    remote_consistent_lsn: str
    oldest_lsn: str
    physical_size_bytes: int
    logical_size_bytes: int | None = Field(
        None, description="size of all relations; only where one timeline is asked for"
    )
    wal_source: str | None
    problem: str | None = Field(
        description="why the timeline takes no more WAL, or is damaged; null: all is well"
    )
    is_archived: bool = Field(False, description="only kept: not served, no endpoint can start on it")
    is_damaged: bool = Field(
        False,
        description="its manifest in object storage, or an ancestor's, cannot be read: not served; `problem` "
        "names the object, and what only an unreadable manifest would tell is 0",
    )


class LsnAnswer(BaseModel):
    lsn: str
    kind: str = Field(description="'between' commits, or 'newest': no commit is known after the timestamp")


def timeline_answer(detail: TimelineDetail, logical_size_bytes: int | None = None) -> TimelineAnswer:
    return TimelineAnswer(
        tenant_id=detail.tenant_id,
        timeline_id=detail.timeline_id,
        pg_version=detail.pg_version,
        system_id=detail.system_id,
        wal_segment_size=detail.wal_segment_size,
        ancestor_timeline_id=detail.ancestor_timeline_id,
        ancestor_lsn=None if detail.ancestor_lsn is None else format_lsn(detail.ancestor_lsn),
        last_record_lsn=format_lsn(detail.last_record_lsn),
        prev_record_lsn=format_lsn(detail.prev_record_lsn),
        disk_consistent_lsn=format_lsn(detail.disk_consistent_lsn),
        remote_consistent_lsn=format_lsn(detail.remote_consistent_lsn),
        oldest_lsn=format_lsn(detail.oldest_lsn),
        physical_size_bytes=detail.physical_size_bytes,
        logical_size_bytes=logical_size_bytes,
        wal_source=detail.wal_source,
        problem=detail.problem,
        is_archived=detail.is_archived,
        is_damaged=detail.is_damaged,
    )


def new_timeline(body: CreateTimeline) -> NewTimeline:
    """Raises `RefusedError` for an LSN without an ancestor, or one that is not an LSN."""
    if body.ancestor_start_lsn is not None and body.ancestor_timeline_id is None:
        raise RefusedError("ancestor_start_lsn needs ancestor_timeline_id")
    if body.password_verifier is not None:
        if body.ancestor_timeline_id is not None:
            raise RefusedError("a branch has its ancestor's roles and passwords: omit password_verifier")
        if not is_initial_verifier(body.password_verifier):
            raise RefusedError("password_verifier is no SCRAM-SHA-256 verifier as initdb makes it")
    return NewTimeline(
        timeline_id=parse_timeline_id(body.new_timeline_id),
        pg_version=body.pg_version,
        ancestor_timeline_id=None
        if body.ancestor_timeline_id is None
        else parse_timeline_id(body.ancestor_timeline_id),
        ancestor_start_lsn=None if body.ancestor_start_lsn is None else parse_lsn(body.ancestor_start_lsn),
        password_verifier=body.password_verifier,
    )


def make_router(operations: TenantOperations) -> APIRouter:
    """All routes below ``/v1``; the caller adds authentication."""
    router = APIRouter(prefix="/v1")
    _add_tenant_routes(router, operations)
    _add_timeline_routes(router, operations)
    _add_action_routes(router, operations)
    add_import_routes(router, operations, timeline_answer)
    return router


def _add_tenant_routes(router: APIRouter, operations: TenantOperations) -> None:
    @router.post("/tenant", status_code=201, tags=["tenant"], summary="Create or attach a tenant")
    async def create_tenant(body: Annotated[CreateTenant, Body()]) -> TenantAnswer:
        """Attaches what object storage has of the tenant; idempotent for the same generation."""
        record = await operations.attach(parse_tenant_id(body.tenant_id), body.generation)
        return TenantAnswer(tenant_id=record.tenant_id, generation=record.generation)

    @router.get("/tenant", tags=["tenant"], summary="The attached tenants")
    async def list_tenants() -> list[TenantAnswer]:
        return [
            TenantAnswer(tenant_id=record.tenant_id, generation=record.generation)
            for record in operations.tenants()
        ]

    @router.delete("/tenant/{tenant_id}", status_code=204, tags=["tenant"], summary="Delete a tenant")
    async def delete_tenant(tenant_id: TenantPath) -> Response:
        """Deletes all its timelines, in object storage too."""
        await operations.delete_tenant(parse_tenant_id(tenant_id))
        return Response(status_code=204)


def _add_timeline_routes(router: APIRouter, operations: TenantOperations) -> None:
    base = "/tenant/{tenant_id}/timeline"

    @router.post(base, status_code=201, tags=["timeline"], summary="Create a timeline or a branch")
    async def create_timeline(
        tenant_id: TenantPath, body: Annotated[CreateTimeline, Body()]
    ) -> TimelineAnswer:
        """Idempotent: asking again with the same fields answers with the timeline that exists."""
        detail = await operations.create_timeline(parse_tenant_id(tenant_id), new_timeline(body))
        return timeline_answer(detail)

    @router.get(base, tags=["timeline"], summary="A tenant's timelines")
    async def list_timelines(tenant_id: TenantPath) -> list[TimelineAnswer]:
        return [timeline_answer(detail) for detail in operations.timelines(parse_tenant_id(tenant_id))]

    @router.get(base + "/{timeline_id}", tags=["timeline"], summary="One timeline with its sizes")
    async def get_timeline(tenant_id: TenantPath, timeline_id: TimelinePath) -> TimelineAnswer:
        ids = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        size = await operations.logical_size_bytes(*ids)
        return timeline_answer(operations.timeline(*ids), size)

    @router.delete(base + "/{timeline_id}", status_code=204, tags=["timeline"], summary="Delete a timeline")
    async def delete_timeline(tenant_id: TenantPath, timeline_id: TimelinePath) -> Response:
        """Refused while other timelines branch from it, and while another one is damaged, which may. Deleting
        a damaged timeline gives up on it.
        """
        await operations.delete_timeline(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        return Response(status_code=204)


def _add_action_routes(router: APIRouter, operations: TenantOperations) -> None:
    base = "/tenant/{tenant_id}/timeline/{timeline_id}"

    @router.get(base + "/get_lsn_by_timestamp", tags=["timeline"], summary="The LSN at a moment")
    async def get_lsn_by_timestamp(
        tenant_id: TenantPath,
        timeline_id: TimelinePath,
        timestamp: Annotated[AwareDatetime, Query(description="ISO 8601 with a time zone")],
    ) -> LsnAnswer:
        """The newest LSN before any commit later than the timestamp."""
        found = await operations.lsn_at_timestamp(
            parse_tenant_id(tenant_id), parse_timeline_id(timeline_id), _timestamptz(timestamp)
        )
        return LsnAnswer(lsn=format_lsn(found.lsn), kind=found.answer.value)

    @router.post(base + "/flush", tags=["timeline"], summary="Make everything received durable")
    async def flush(tenant_id: TenantPath, timeline_id: TimelinePath) -> TimelineAnswer:
        return timeline_answer(
            await operations.flush(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        )


def _timestamptz(moment: datetime) -> int:
    return unix_to_timestamptz(moment.timestamp())
