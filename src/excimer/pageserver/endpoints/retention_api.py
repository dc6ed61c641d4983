"""The management API's part about how much history is kept: settings, garbage collection, leases.

Ids and errors are as in `http_api`. Who may read a timeline's pages may lease its LSNs, in its own name.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import APIRouter, Body, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from excimer.base.ids import TenantId, TimelineId, parse_tenant_id, parse_timeline_id
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.pageserver.endpoints.http_api import TenantPath, TimelinePath
from excimer.pageserver.history_keeper import Lease, TenantConfig
from excimer.storage.engine.garbage_collector import GcOutcome
from excimer.wire.auth import Claims, Resource, Right, authorize

TIMELINE = "/tenant/{tenant_id}/timeline/{timeline_id}"
HOLDER_LENGTH_MAX = 100


class RetentionOperations(Protocol):
    """What this part of the API asks of the pageserver (`history_keeper.HistoryKeeper`)."""

    def config(self, tenant_id: TenantId) -> TenantConfig: ...
    async def set_config(self, tenant_id: TenantId, overrides: dict[str, Any]) -> TenantConfig: ...
    async def change_config(self, tenant_id: TenantId, changes: dict[str, Any]) -> TenantConfig: ...
    async def collect_garbage(self, tenant_id: TenantId, timeline_id: TimelineId) -> GcOutcome: ...
    async def compact(self, tenant_id: TenantId, timeline_id: TimelineId) -> int: ...
    async def lease(
        self, tenant_id: TenantId, timeline_id: TimelineId, lsn: Lsn, holder: str, *, onwards: bool = False
    ) -> Lease: ...
    async def release_leases(self, tenant_id: TenantId, timeline_id: TimelineId, holder: str) -> int: ...


class ConfigAnswer(BaseModel):
    overrides: dict[str, int | float] = Field(description="what the tenant has chosen")
    effective: dict[str, int | float] = Field(description="that, and the defaults for the rest")
    problem: str | None = Field(
        description="why what the tenant has chosen cannot be read; nothing is collected until it is PUT anew"
    )

    @classmethod
    def of(cls, config: TenantConfig) -> "ConfigAnswer":
        return cls(
            overrides=config.overrides,
            effective=msgspec.structs.asdict(config.effective),
            problem=config.problem,
        )


class GcAnswer(BaseModel):
    cutoff_lsn: str = Field(description="everything at or above can be read")
    held_points: int = Field(description="branch points and leases below it, which can be read too")
    layers_removed: int
    removed_bytes: int
    wrote_images: bool = Field(description="whether images of all pages were written, so that more could go")

    @classmethod
    def of(cls, outcome: GcOutcome) -> "GcAnswer":
        return cls(
            cutoff_lsn=format_lsn(outcome.cutoff_lsn),
            held_points=outcome.held_points,
            layers_removed=outcome.layers_removed,
            removed_bytes=outcome.removed_bytes,
            wrote_images=outcome.has_written_images,
        )


class CompactAnswer(BaseModel):
    steps: int = Field(description="merges, and pieces of image rounds; 0: nothing was due")


class LeaseBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lsn: str
    holder: str = Field(
        "", max_length=HOLDER_LENGTH_MAX, description="who may give it back early; empty: the token's holder"
    )
    onwards: bool = Field(
        False, description="all from this LSN on, instead of the holder's former lease of that kind"
    )


class LeaseAnswer(BaseModel):
    lsn: str
    valid_until: datetime = Field(description="ask again before; later the LSN may be gone")
    valid_for_s: float = Field(description="the same, for whose clock is another")


class ReleaseAnswer(BaseModel):
    released: int = Field(description="LSNs that this holder had leased")


def make_retention_router(operations: RetentionOperations) -> APIRouter:
    """For operators. The caller adds authentication."""
    router = APIRouter(prefix="/v1")
    _add_config_routes(router, operations)

    @router.put(TIMELINE + "/do_gc", tags=["timeline"], summary="Collect garbage now")
    async def do_gc(tenant_id: TenantPath, timeline_id: TimelinePath) -> GcAnswer:
        """By the tenant's settings. Not before one lease length has passed since the tenant was attached.

        409 `GcStandsStillError` while a timeline of the tenant is damaged: what it needs is not known.
        """
        ids = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        return GcAnswer.of(await operations.collect_garbage(*ids))

    @router.put(TIMELINE + "/compact", tags=["timeline"], summary="Compact now")
    async def compact(tenant_id: TenantPath, timeline_id: TimelinePath) -> CompactAnswer:
        """Everything that is due by the tenant's settings."""
        ids = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        return CompactAnswer(steps=await operations.compact(*ids))

    return router


def make_lease_router(
    operations: RetentionOperations, authenticate: Callable[[Request], Awaitable[Claims]]
) -> APIRouter:
    """For whoever reads pages; each authorizes by itself."""
    router = APIRouter(prefix="/v1")

    @router.post(TIMELINE + "/lsn_lease", tags=["timeline"], summary="Keep an LSN readable for a while")
    async def lsn_lease(
        tenant_id: TenantPath,
        timeline_id: TimelinePath,
        body: Annotated[LeaseBody, Body()],
        claims: Annotated[Claims, Depends(authenticate)],
    ) -> LeaseAnswer:
        """Grants or renews a lease; refused for an LSN whose history is gone."""
        tenant, timeline = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        holder = body.holder or claims.holder
        _authorize_lease(claims, Resource(tenant, timeline), holder)
        lease = await operations.lease(tenant, timeline, parse_lsn(body.lsn), holder, onwards=body.onwards)
        return LeaseAnswer(
            lsn=format_lsn(lease.lsn),
            valid_until=datetime.fromtimestamp(lease.valid_until, UTC),
            valid_for_s=lease.valid_for_s,
        )

    @router.delete(TIMELINE + "/lsn_lease/{holder:path}", tags=["timeline"], summary="Give leases back")
    async def release_lsn_leases(
        tenant_id: TenantPath,
        timeline_id: TimelinePath,
        holder: str,
        claims: Annotated[Claims, Depends(authenticate)],
    ) -> ReleaseAnswer:
        """Ends all leases of a holder on a timeline, and no one else's."""
        tenant, timeline = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        _authorize_lease(claims, Resource(tenant, timeline), holder)
        return ReleaseAnswer(released=await operations.release_leases(tenant, timeline, holder))

    return router


def _authorize_lease(claims: Claims, resource: Resource, holder: str) -> None:
    """In its own name (the token's holder, or that and a slash and more) a reader; in any name a manager."""
    is_own = holder == claims.holder or holder.startswith(f"{claims.holder}/")
    authorize(claims, Right.READ_PAGES if is_own else Right.MANAGE, resource)


def _add_config_routes(router: APIRouter, operations: RetentionOperations) -> None:
    path = "/tenant/{tenant_id}/config"

    @router.get(path, tags=["tenant"], summary="A tenant's settings")
    async def read_config(tenant_id: TenantPath) -> ConfigAnswer:
        return ConfigAnswer.of(operations.config(parse_tenant_id(tenant_id)))

    @router.put(path, tags=["tenant"], summary="Replace what a tenant has chosen")
    async def replace_config(
        tenant_id: TenantPath, overrides: Annotated[dict[str, Any], Body()]
    ) -> ConfigAnswer:
        """All other settings go back to their defaults. Durable, and in force at once."""
        return ConfigAnswer.of(await operations.set_config(parse_tenant_id(tenant_id), overrides))

    @router.patch(path, tags=["tenant"], summary="Change some settings of a tenant")
    async def change_config(
        tenant_id: TenantPath, changes: Annotated[dict[str, Any], Body()]
    ) -> ConfigAnswer:
        """`null` gives a setting back to its default. Durable, and in force at once."""
        return ConfigAnswer.of(await operations.change_config(parse_tenant_id(tenant_id), changes))
