"""Routes about what is in a branch: where its pages can be read, its layers, how a page comes about.

The controller knows which pageserver to ask, and passes on what that one answers.
"""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel

from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.controller.endpoints.access_api import WalAccessAnswer
from excimer.controller.endpoints.api_models import Body, LsnText
from excimer.controller.model import BadRequestError
from excimer.controller.shell import Controller
from excimer.controller.tokens import READING_TOKEN_LIFE_S


class BranchAccessBody(Body):
    branch: str = "main"
    at_lsn: LsnText | None = None
    at_timestamp: datetime | None = None


class BranchAccessAnswer(BaseModel):
    """All that a reader of a branch's pages needs."""

    tenant_id: str
    timeline_id: str
    branch: str
    pg_version: int
    lsn: str
    page_service_address: str
    pageserver_http_address: str
    token: str
    valid_for_s: float


class BranchWalBody(Body):
    branch: str = "main"


class BranchWalAnswer(BaseModel):
    """All that a receiver of a branch's WAL needs."""

    tenant_id: str
    timeline_id: str
    branch: str
    access: WalAccessAnswer


def point_in_history(at_lsn: str | None, at_timestamp: datetime | None) -> Lsn | str | None:
    """The LSN, the moment as RFC 3339 in UTC, or None for the head. Raises `BadRequestError`."""
    if at_lsn is not None and at_timestamp is not None:
        raise BadRequestError("a point in history is an LSN or a time, not both")
    if at_lsn is not None:
        return parse_lsn(at_lsn)
    if at_timestamp is None:
        return None
    if at_timestamp.tzinfo is None:
        raise BadRequestError("a time needs its zone, like 2026-01-31T12:00:00Z")
    try:
        return at_timestamp.astimezone(UTC).isoformat().replace("+00:00", "Z")
    except OverflowError as error:
        raise BadRequestError("in UTC the time is not within the years 1 to 9999") from error


def add_reading_routes(router: APIRouter, controller: Controller) -> None:
    @router.post("/tenants/{tenant}/branch_access", tags=["branches"])
    async def branch_access(tenant: str, body: BranchAccessBody) -> BranchAccessAnswer:
        """Where and with which token a branch can be read, and the LSN of the point asked for."""
        at = point_in_history(body.at_lsn, body.at_timestamp)
        timeline, lsn = await controller.point_in_branch(tenant, body.branch, at)
        pageserver, _ = await controller.pageserver_of(timeline.tenant_id)
        return BranchAccessAnswer(
            tenant_id=timeline.tenant_id,
            timeline_id=timeline.timeline_id,
            branch=timeline.name,
            pg_version=timeline.pg_version,
            lsn=format_lsn(lsn),
            page_service_address=pageserver.page_service_address,
            pageserver_http_address=pageserver.http_address,
            token=controller.reading_token(timeline),
            valid_for_s=READING_TOKEN_LIFE_S,
        )

    @router.post("/tenants/{tenant}/branch_wal", tags=["branches"])
    async def branch_wal(tenant: str, body: BranchWalBody) -> BranchWalAnswer:
        """Where and with which token a branch's committed WAL can be received."""
        found = await controller.find_tenant(tenant)
        timeline = await controller.find_branch(found.tenant_id, body.branch)
        access = await controller.access.wal_for_user(timeline.tenant_id, timeline.timeline_id)
        return BranchWalAnswer(
            tenant_id=timeline.tenant_id,
            timeline_id=timeline.timeline_id,
            branch=timeline.name,
            access=WalAccessAnswer.of(access),
        )

    @router.get("/tenants/{tenant}/layer_map", tags=["branches"])
    async def layer_map(tenant: str, branch: str = "main") -> Any:
        """The layers of a branch, as its pageserver has them."""
        found = await controller.find_tenant(tenant)
        timeline = await controller.find_branch(found.tenant_id, branch)
        _, pageserver = await controller.pageserver_of(found.tenant_id)
        names = {row.timeline_id: row.name for row in await controller.list_timelines(found.tenant_id)}
        answer = await pageserver.layer_map(found.tenant_id, timeline.timeline_id)
        for child in answer["branches"]:
            child["name"] = names.get(child["timeline_id"])
        return {"branch": timeline.name, **answer}

    @router.get("/tenants/{tenant}/explain_page", tags=["branches"])
    async def explain_page(
        tenant: str,
        page: Annotated[str, Query(description="SPC/DB/REL FORK BLOCK, as the pageserver reads it")],
        branch: str = "main",
        at_lsn: LsnText | None = None,
        at_timestamp: datetime | None = None,
    ) -> Any:
        """How a page of a branch is made at a point of its history, layer by layer."""
        at = point_in_history(at_lsn, at_timestamp)
        timeline, lsn = await controller.point_in_branch(tenant, branch, at)
        _, pageserver = await controller.pageserver_of(timeline.tenant_id)
        answer = await pageserver.explain_page(
            timeline.tenant_id, timeline.timeline_id, {"page": page, "lsn": format_lsn(lsn)}
        )
        names = {row.timeline_id: row.name for row in await controller.list_timelines(timeline.tenant_id)}
        for visit in answer["visits"]:
            visit["branch"] = names.get(visit["timeline_id"])
        return {"branch": timeline.name, **answer}
