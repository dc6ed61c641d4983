"""The management API's part about history: archiving, detaching, LSNs and times, sizes.

Tokens, ids and errors are as in `http_api`.
"""

from datetime import UTC, datetime
from typing import Annotated, Literal, Protocol

from fastapi import APIRouter, Body, Query
from pydantic import BaseModel, ConfigDict, Field

from excimer.base.clock import timestamptz_to_unix
from excimer.base.errors import NotFoundError
from excimer.base.ids import TenantId, TimelineId, parse_tenant_id, parse_timeline_id
from excimer.base.lsn import Lsn, parse_lsn
from excimer.pageserver.endpoints.http_api import TenantPath, TimelineAnswer, TimelinePath, timeline_answer
from excimer.pageserver.model import TenantSizes, TimelineDetail

BASE = "/tenant/{tenant_id}/timeline/{timeline_id}"


class NoCommitKnownError(NotFoundError):
    """No commit happened at or before an LSN, as far as the timeline remembers."""


class HistoryOperations(Protocol):
    """What this part of the API asks of the pageserver (`tenants.Tenants`)."""

    async def archive_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineDetail: ...
    async def unarchive_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> TimelineDetail: ...
    async def detach_ancestor(self, tenant_id: TenantId, timeline_id: TimelineId) -> list[TimelineId]: ...
    async def sizes(self, tenant_id: TenantId) -> TenantSizes: ...
    async def timestamp_of_lsn(
        self, tenant_id: TenantId, timeline_id: TimelineId, lsn: Lsn
    ) -> int | None: ...


class ArchivalConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    state: Literal["archived", "unarchived"]


class DetachedAnswer(BaseModel):
    reparented_timelines: list[str] = Field(
        description="timelines that branched off the ancestor at or below the same point, now off this one"
    )


class TimestampAnswer(BaseModel):
    timestamp: datetime = Field(description="when the last commit at or below the LSN happened")


class TimelineSizesAnswer(BaseModel):
    timeline_id: str
    logical_size_bytes: int | None = Field(description="all relations at the head; null: archived")
    resident_size_bytes: int = Field(description="what of its layers lies on this pageserver's disk")
    remote_size_bytes: int = Field(description="its own layers in object storage")


class DamagedAnswer(BaseModel):
    timeline_id: str
    reason: str = Field(description="names what is to be repaired")


class TenantSizesAnswer(BaseModel):
    tenant_id: str
    synthetic_size_bytes: int = Field(description="see docs/architecture/sizes.md")
    archived_size_bytes: int = Field(description="layers of archived timelines; not in the synthetic size")
    timelines: list[TimelineSizesAnswer]
    damaged: list[DamagedAnswer] = Field(description="timelines that are in none of these sizes")

    @classmethod
    def of(cls, tenant_id: TenantId, sizes: TenantSizes) -> "TenantSizesAnswer":
        return cls(
            tenant_id=tenant_id,
            synthetic_size_bytes=sizes.synthetic_size_bytes,
            archived_size_bytes=sizes.archived_size_bytes,
            timelines=[
                TimelineSizesAnswer(
                    timeline_id=each.timeline_id,
                    logical_size_bytes=each.logical_size_bytes,
                    resident_size_bytes=each.resident_size_bytes,
                    remote_size_bytes=each.remote_size_bytes,
                )
                for each in sizes.timelines
            ],
            damaged=[
                DamagedAnswer(timeline_id=each.timeline_id, reason=each.reason) for each in sizes.damaged
            ],
        )


def make_history_router(operations: HistoryOperations) -> APIRouter:
    """Routes below ``/v1``; the caller adds authentication."""
    router = APIRouter(prefix="/v1")
    _add_change_routes(router, operations)
    _add_question_routes(router, operations)
    return router


def _add_change_routes(router: APIRouter, operations: HistoryOperations) -> None:
    @router.put(BASE + "/archival_config", tags=["timeline"], summary="Archive or unarchive a timeline")
    async def set_archival_config(
        tenant_id: TenantPath, timeline_id: TimelinePath, body: Annotated[ArchivalConfig, Body()]
    ) -> TimelineAnswer:
        """An archived timeline is only kept: no branch of it may be unarchived. Repeatable. Refused while a
        timeline is damaged, which may be a branch of it.
        """
        ids = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        if body.state == "archived":
            return timeline_answer(await operations.archive_timeline(*ids))
        return timeline_answer(await operations.unarchive_timeline(*ids))

    @router.put(BASE + "/detach_ancestor", tags=["timeline"], summary="Make a branch a root")
    async def detach_ancestor(tenant_id: TenantPath, timeline_id: TimelinePath) -> DetachedAnswer:
        """Copies what it needs of its ancestors. Repeatable, also after a crash or a lost connection. Refused
        while a timeline is damaged, which may be a sibling.
        """
        moved = await operations.detach_ancestor(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        return DetachedAnswer(reparented_timelines=list(moved))


def _add_question_routes(router: APIRouter, operations: HistoryOperations) -> None:
    @router.get(BASE + "/get_timestamp_of_lsn", tags=["timeline"], summary="The moment of an LSN")
    async def get_timestamp_of_lsn(
        tenant_id: TenantPath, timeline_id: TimelinePath, lsn: Annotated[str, Query(examples=["0/16B3748"])]
    ) -> TimestampAnswer:
        """When the last commit at or below the LSN happened."""
        ids = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        timestamptz = await operations.timestamp_of_lsn(*ids, parse_lsn(lsn))
        if timestamptz is None:
            raise NoCommitKnownError(f"no commit at or before LSN {lsn} is known")
        return TimestampAnswer(timestamp=datetime.fromtimestamp(timestamptz_to_unix(timestamptz), UTC))

    @router.get("/tenant/{tenant_id}/sizes", tags=["tenant"], summary="A tenant's sizes")
    async def get_sizes(tenant_id: TenantPath) -> TenantSizesAnswer:
        """Logical sizes may be some seconds old."""
        parsed = parse_tenant_id(tenant_id)
        return TenantSizesAnswer.of(parsed, await operations.sizes(parsed))
