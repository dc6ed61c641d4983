"""The management API's part for replication slots: a compute keeps them, the next one takes them over.

Bodies are the object's own bytes (`excimer.pgformat.kept_slots`). Who may write a timeline's WAL may do both.
"""

from collections.abc import Callable
from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, Depends, Path, Request, Response

from excimer.base.errors import NotFoundError
from excimer.base.ids import TenantId, TimelineId, parse_tenant_id, parse_timeline_id
from excimer.pageserver.endpoints.http_api import TenantPath, TimelinePath
from excimer.pageserver.endpoints.state_api import read_body
from excimer.pgformat.kept_slots import OBJECT_SIZE_BYTES_MAX
from excimer.storage.engine.timeline import Timeline

SLOTS: Final = "/tenant/{tenant_id}/timeline/{timeline_id}/replication_slots/{term}"
NumberPath = Annotated[int, Path(ge=0, lt=1 << 63)]


class SlotsMissingError(NotFoundError):
    """No replication slot of the timeline was ever saved, or none that can be used."""


class SlottedTimeline(Protocol):
    @property
    def store(self) -> Timeline: ...


class SlotOperations(Protocol):
    """What this part of the API asks of the pageserver (`tenants.Tenants`)."""

    def active(self, tenant_id: TenantId, timeline_id: TimelineId, /) -> SlottedTimeline: ...


def is_slots(method: str, path: str) -> bool:
    """Whether a request's body is replication slots, which is bounded here."""
    return method == "PUT" and "/replication_slots/" in path


def make_slots_router(operations: SlotOperations, may_write: Callable[[Request], Any]) -> APIRouter:
    """`may_write` authorizes a request on the timeline of its path."""
    router = APIRouter(prefix="/v1", dependencies=[Depends(may_write)])

    @router.put(SLOTS + "/{sequence}", status_code=204, tags=["timeline"], summary="Keep replication slots")
    async def keep_slots(
        tenant_id: TenantPath,
        timeline_id: TimelinePath,
        term: NumberPath,
        sequence: NumberPath,
        request: Request,
    ) -> Response:
        """All of a compute that was elected in `term`, at its `sequence`th change. Durable when answered.

        409 `SlotsSupersededError` when a newer compute has taken over.
        """
        active = operations.active(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        await active.store.kept_slots.keep(term, sequence, await read_body(request, OBJECT_SIZE_BYTES_MAX))
        return Response(status_code=204)

    @router.post(SLOTS, tags=["timeline"], summary="Take replication slots over", response_class=Response)
    async def take_slots_over(tenant_id: TenantPath, timeline_id: TimelinePath, term: NumberPath) -> Response:
        """For a compute that was elected in `term`: the newest; older terms are refused from now on."""
        active = operations.active(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        found = await active.store.kept_slots.take_over(term)
        if found is None:
            raise SlotsMissingError(f"timeline {timeline_id} has no replication slots")
        return Response(found, media_type="application/octet-stream")

    return router
