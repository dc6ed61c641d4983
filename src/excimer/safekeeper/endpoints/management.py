"""HTTP management of timelines: create, look, delete. See ``/docs`` of a running safekeeper.

Not here: the shared endpoints and the answers to errors (`service.http`).
"""

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from excimer.base.clock import Clock
from excimer.base.errors import RefusedError
from excimer.base.ids import parse_tenant_id, parse_timeline_id
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.pgformat.control_file import WAL_PAGE_MAGICS
from excimer.safekeeper.registry import TimelineRegistry
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.safekeeper.wal_remover import WalRemover
from excimer.service.http import bearer_auth
from excimer.wire.auth import Right, TokenVerifier
from excimer.wire.safekeeping import TimelineIdentity

SEGMENT_SIZES_BYTES = tuple(1 << power for power in range(20, 31))
DEFAULT_SEGMENT_SIZE_BYTES = 16 << 20


class BadTimelineError(RefusedError):
    """A timeline cannot have these properties."""


class TimelineCreate(BaseModel):
    """Where the timeline's WAL begins, and which PostgreSQL writes it."""

    start_lsn: str = Field(examples=["0/1493C50"])
    pg_version: int = Field(examples=[18])
    system_id: int
    wal_segment_size: int = DEFAULT_SEGMENT_SIZE_BYTES


class TimelineInfo(BaseModel):
    tenant_id: str
    timeline_id: str
    pg_version: int
    system_id: int
    wal_segment_size: int
    start_lsn: str
    term: int
    flush_lsn: str
    commit_lsn: str
    wal_start_lsn: str = Field(description="WAL below has been removed")
    durable_lsn: str = Field(description="below, everything is durable in object storage")
    horizon_lsn: str = Field(description="below, every safekeeper of the timeline has the WAL")
    wal_kept_for: str = Field(
        description="what keeps WAL longest: object_storage, safekeeper, reader, commit"
    )
    wal_size_bytes: int = Field(description="what the WAL segments take on disk")
    writers: int = Field(description="proposers of computes that are connected now")


def management_router(
    timelines: TimelineRegistry, remover: WalRemover, verifier: TokenVerifier, clock: Clock
) -> APIRouter:
    may_change = Depends(bearer_auth(verifier, clock, Right.MANAGE))
    router = APIRouter(prefix="/v1/tenant/{tenant_id}/timeline", tags=["timeline"], dependencies=[may_change])

    @router.get("", summary="Timelines of a tenant")
    async def list_timelines(tenant_id: str) -> list[TimelineInfo]:
        parsed = parse_tenant_id(tenant_id)
        return [_info(each, remover) for each in timelines.all() if each.identity.tenant_id == parsed]

    @router.get("/{timeline_id}", summary="One timeline")
    async def get_timeline(tenant_id: str, timeline_id: str) -> TimelineInfo:
        return _info(timelines.find(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)), remover)

    @router.post("/{timeline_id}", status_code=201, summary="Create a timeline; again is harmless")
    async def create_timeline(tenant_id: str, timeline_id: str, body: TimelineCreate) -> TimelineInfo:
        if body.pg_version not in WAL_PAGE_MAGICS:
            raise BadTimelineError(f"PostgreSQL {body.pg_version} is not one of {sorted(WAL_PAGE_MAGICS)}")
        if body.wal_segment_size not in SEGMENT_SIZES_BYTES:
            raise BadTimelineError(f"a WAL segment cannot have {body.wal_segment_size} bytes")
        start_lsn = parse_lsn(body.start_lsn)
        if start_lsn == 0 or start_lsn % 8:
            raise BadTimelineError(f"{body.start_lsn} is not the end of a WAL record")
        identity = TimelineIdentity(
            tenant_id=parse_tenant_id(tenant_id),
            timeline_id=parse_timeline_id(timeline_id),
            pg_version=body.pg_version,
            system_id=body.system_id,
            wal_segment_size_bytes=body.wal_segment_size,
        )
        return _info(await timelines.create(identity, start_lsn), remover)

    @router.delete("/{timeline_id}", summary="Delete a timeline with its WAL; again is harmless")
    async def delete_timeline(tenant_id: str, timeline_id: str) -> dict[str, Any]:
        await timelines.delete(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        return {}

    return router


def _info(timeline: SafekeeperTimeline, remover: WalRemover) -> TimelineInfo:
    identity = timeline.identity
    floor = remover.floor(timeline)
    return TimelineInfo(
        tenant_id=identity.tenant_id,
        timeline_id=identity.timeline_id,
        pg_version=identity.pg_version,
        system_id=identity.system_id,
        wal_segment_size=identity.wal_segment_size_bytes,
        start_lsn=format_lsn(timeline.start_lsn),
        term=timeline.term,
        flush_lsn=format_lsn(timeline.flush_lsn),
        commit_lsn=format_lsn(timeline.commit_lsn),
        wal_start_lsn=format_lsn(timeline.first_lsn()),
        durable_lsn=format_lsn(timeline.durable_lsn),
        horizon_lsn=format_lsn(timeline.horizon_lsn),
        wal_kept_for=floor.reason,
        wal_size_bytes=timeline.stored_size_bytes,
        writers=timeline.writers,
    )
