"""Routes about the history of branches: restore, reset, archive, detach, LSNs and moments, sizes."""

from datetime import datetime
from random import SystemRandom
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import AwareDatetime, BaseModel, Field

from excimer.base.ids import TimelineId, new_timeline_id
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.controller.endpoints.api_models import Body, BranchAnswer, HexId, LsnText
from excimer.controller.endpoints.reading import point_in_history
from excimer.controller.model import BadRequestError, Timeline
from excimer.controller.shell import Controller


class ReplaceBody(Body):
    timeline_id: HexId | None = Field(None, description="Chosen by the client, so that it may ask again.")
    preserve_under_name: str | None = Field(None, description="Name for what the branch was.")
    keep_active: bool = Field(False, description="Its subscriptions stay enabled.")


class RestoreBody(ReplaceBody):
    at_lsn: LsnText | None = None
    at_timestamp: datetime | None = None


class ReplacedAnswer(BaseModel):
    branch: BranchAnswer
    old_branch: BranchAnswer | None = Field(description="What the branch was; null: it is gone.")

    @classmethod
    def of(cls, new: Timeline, old: Timeline | None) -> "ReplacedAnswer":
        return cls(branch=BranchAnswer.of(new), old_branch=None if old is None else BranchAnswer.of(old))


class LsnAnswer(BaseModel):
    lsn: str


class TimestampAnswer(BaseModel):
    timestamp: datetime


class BranchSizes(BaseModel):
    timeline_id: str
    name: str
    logical_size_bytes: int | None = Field(description="All relations at the head; null: archived.")
    resident_size_bytes: int = Field(description="Of its layers, on the pageserver's disk.")
    remote_size_bytes: int = Field(description="Its own layers in object storage.")


class DamagedBranch(BaseModel):
    timeline_id: str
    name: str
    reason: str = Field(description="Names what in object storage is to be repaired.")


class SizesAnswer(BaseModel):
    tenant_id: str
    name: str
    synthetic_size_bytes: int
    archived_size_bytes: int
    branches: list[BranchSizes]
    damaged: list[DamagedBranch] = Field(
        description="Branches that are not served, and in none of the sizes."
    )


def add_history_routes(router: APIRouter, controller: Controller) -> None:
    _add_replacing_routes(router, controller, SystemRandom())
    _add_state_routes(router, controller)
    _add_question_routes(router, controller)


def _add_replacing_routes(router: APIRouter, controller: Controller, chance: SystemRandom) -> None:
    base = "/tenants/{tenant}/branches/{branch:path}"

    def chosen_id(body: ReplaceBody) -> TimelineId:
        return TimelineId(body.timeline_id) if body.timeline_id else new_timeline_id(chance)

    @router.post(base + "/restore", tags=["branches"])
    async def restore_branch(tenant: str, branch: str, body: RestoreBody) -> ReplacedAnswer:
        """The branch as it was at an LSN or a time; what it was until now stays under another name."""
        at = point_in_history(body.at_lsn, body.at_timestamp)
        if at is None:
            raise BadRequestError("say what to restore to: an LSN or a time")
        done = await controller.history.restore(
            tenant,
            branch,
            chosen_id(body),
            at,
            body.preserve_under_name,
            keeps_subscriptions=body.keep_active,
        )
        return ReplacedAnswer.of(*done)

    @router.post(base + "/reset", tags=["branches"])
    async def reset_branch(tenant: str, branch: str, body: ReplaceBody) -> ReplacedAnswer:
        """The branch as its parent is now; what it was goes unless a name is given or something needs it."""
        done = await controller.history.reset(
            tenant, branch, chosen_id(body), body.preserve_under_name, keeps_subscriptions=body.keep_active
        )
        return ReplacedAnswer.of(*done)


def _add_state_routes(router: APIRouter, controller: Controller) -> None:
    base = "/tenants/{tenant}/branches/{branch:path}"

    @router.post(base + "/archive", tags=["branches"])
    async def archive_branch(tenant: str, branch: str) -> BranchAnswer:
        """Keeps it in object storage only; `archiving`: it is finished later."""
        return BranchAnswer.of(await controller.history.archive(tenant, branch))

    @router.post(base + "/unarchive", tags=["branches"])
    async def unarchive_branch(tenant: str, branch: str) -> BranchAnswer:
        """In service again; `unarchiving`: it is finished later."""
        return BranchAnswer.of(await controller.history.unarchive(tenant, branch))

    @router.post(base + "/activate", tags=["branches"])
    async def activate_branch(tenant: str, branch: str) -> BranchAnswer:
        """Background workers of its extensions run from the next start on; nothing is disabled any more."""
        return BranchAnswer.of(await controller.history.activate(tenant, branch))

    @router.post(base + "/detach_ancestor", tags=["branches"])
    async def detach_branch(tenant: str, branch: str) -> BranchAnswer:
        """Makes it independent of its parent; `detaching`: it is finished later."""
        return BranchAnswer.of(await controller.history.detach(tenant, branch))


def _add_question_routes(router: APIRouter, controller: Controller) -> None:
    @router.get("/tenants/{tenant}/lsn_at_timestamp", tags=["branches"])
    async def lsn_at_timestamp(
        tenant: str, timestamp: Annotated[AwareDatetime, Query()], branch: str = "main"
    ) -> LsnAnswer:
        """The newest LSN before any commit later than the timestamp."""
        at = point_in_history(None, timestamp)
        return LsnAnswer(lsn=format_lsn(await controller.history.lsn_at(tenant, branch, str(at))))

    @router.get("/tenants/{tenant}/timestamp_of_lsn", tags=["branches"])
    async def timestamp_of_lsn(tenant: str, lsn: LsnText, branch: str = "main") -> TimestampAnswer:
        """When the last commit at or below the LSN happened."""
        found = await controller.history.timestamp_of(tenant, branch, Lsn(parse_lsn(lsn)))
        return TimestampAnswer(timestamp=datetime.fromisoformat(found))

    @router.get("/tenants/{tenant}/sizes", tags=["tenants"])
    async def sizes(tenant: str) -> SizesAnswer:
        """Of the tenant and its branches; logical ones may be some seconds old."""
        found, answer = await controller.history.sizes(tenant)
        return SizesAnswer(
            tenant_id=found.tenant_id,
            name=found.name,
            synthetic_size_bytes=answer["synthetic_size_bytes"],
            archived_size_bytes=answer["archived_size_bytes"],
            branches=[BranchSizes(**row) for row in answer["timelines"]],
            damaged=[DamagedBranch(**row) for row in answer["damaged"]],
        )
