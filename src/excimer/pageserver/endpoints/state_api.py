"""The management API's part for computes' saved states: what a clean stop leaves and the next start takes.

Bodies are the object's own bytes (`excimer.pgformat.saved_state`). Who may write a timeline's WAL may save
its state, who may read its pages may have it.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, Depends, Path, Request, Response
from starlette.requests import ClientDisconnect

from excimer.base.errors import NotFoundError, RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId, parse_tenant_id, parse_timeline_id
from excimer.base.lsn import Lsn, format_lsn
from excimer.pageserver.endpoints.http_api import TenantPath, TimelinePath
from excimer.pgformat.saved_state import OBJECT_SIZE_BYTES_MAX
from excimer.storage.engine.timeline import Timeline

STATE: Final = "/tenant/{tenant_id}/timeline/{timeline_id}/saved_state/{lsn}"
BODY_S: Final = 30.0
"""From a request's head to the end of its body."""
LsnPath = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="16 hex digits")]


class StateMissingError(NotFoundError):
    """No state was saved at this LSN, or none that could be used."""


class StateTooLargeError(RefusedError):
    """What is to be saved is larger than anybody would take it back."""


class StateSenderLostError(RetryableError):
    """A saved state has come in part."""


class StatefulTimeline(Protocol):
    @property
    def store(self) -> Timeline: ...


class StateOperations(Protocol):
    """What this part of the API asks of the pageserver (`tenants.Tenants`)."""

    def active(self, tenant_id: TenantId, timeline_id: TimelineId, /) -> StatefulTimeline: ...


def is_state(method: str, path: str) -> bool:
    """Whether a request's body is a saved state, which is bounded here."""
    return method == "PUT" and "/saved_state/" in path


def make_state_routers(
    operations: StateOperations,
    may_write: Callable[[Request], Any],
    may_read: Callable[[Request], Any],
) -> Sequence[APIRouter]:
    """`may_write` and `may_read` authorize a request on the timeline of its path."""
    writing = APIRouter(prefix="/v1", dependencies=[Depends(may_write)])
    reading = APIRouter(prefix="/v1", dependencies=[Depends(may_read)])

    @writing.put(STATE, status_code=204, tags=["timeline"], summary="Save what WAL does not carry")
    async def save_state(
        tenant_id: TenantPath, timeline_id: TimelinePath, lsn: LsnPath, request: Request
    ) -> Response:
        """Of a compute that was stopped cleanly at `lsn`. Durable when this is answered; it replaces older
        ones.

        409 `StateSupersededError` when WAL has gone on meanwhile.
        """
        active = operations.active(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        await active.store.saved_states.keep(
            Lsn(int(lsn, 16)), await read_body(request, OBJECT_SIZE_BYTES_MAX)
        )
        return Response(status_code=204)

    @reading.get(STATE, tags=["timeline"], summary="What was saved at an LSN", response_class=Response)
    async def saved_state(tenant_id: TenantPath, timeline_id: TimelinePath, lsn: LsnPath) -> Response:
        """By the last clean stop there, or of the ancestor if the branch begins there; else 404."""
        active = operations.active(parse_tenant_id(tenant_id), parse_timeline_id(timeline_id))
        found = await active.store.find_saved_state(Lsn(int(lsn, 16)))
        if found is None:
            where = format_lsn(Lsn(int(lsn, 16)))
            raise StateMissingError(f"timeline {timeline_id} has no saved state at {where}")
        return Response(found, media_type="application/octet-stream")

    return writing, reading


async def read_body(request: Request, size_bytes_max: int) -> bytes:
    """Raises `StateTooLargeError`, `StateSenderLostError`."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > size_bytes_max:
                    raise StateTooLargeError(f"what is saved may have {size_bytes_max} bytes at most")
                parts.append(chunk)
    except ClientDisconnect as error:
        raise StateSenderLostError("the sender of the saved state has gone: nothing was saved") from error
    except TimeoutError as error:
        raise StateSenderLostError(f"the saved state has not come within {BODY_S:.0f} s") from error
    return b"".join(parts)
