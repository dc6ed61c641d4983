"""Importing a cluster over HTTP: one request whose body is an import stream (`wire.import_stream`).

A sender that goes away, or is silent for `SILENCE_S`, breaks the import off, and all of it is removed.

Not here: what the stream means (`excimer.pageserver.cluster_import`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Protocol, TypeVar, get_type_hints

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from excimer.base.errors import RetryableError
from excimer.base.ids import TenantId, TimelineId, parse_tenant_id, parse_timeline_id
from excimer.pageserver.model import ImportProgress, TimelineDetail

SILENCE_S = 600.0
"""A sender may wait for a source's checkpoint or WAL, but not for ever."""

ID_PATTERN = "^[0-9a-fA-F]{32}$"
IdPath = Annotated[str, Path(pattern=ID_PATTERN, description="32 hex digits")]
Answer = TypeVar("Answer", bound=BaseModel)


class SenderLostError(RetryableError):
    """The import stream broke off."""


class ImportOperations(Protocol):
    """What these routes ask of the pageserver (`tenants.Tenants`)."""

    async def import_timeline(
        self, tenant_id: TenantId, timeline_id: TimelineId, chunks: AsyncIterator[bytes]
    ) -> TimelineDetail: ...
    def running_imports(self, tenant_id: TenantId) -> list[ImportProgress]: ...


class ImportAnswer(BaseModel):
    timeline_id: str
    received_bytes: int


def is_import(method: str, path: str) -> bool:
    """Whether a request's body is an import stream, which may have any length."""
    return method == "POST" and "/import/" in path


def add_import_routes(
    router: APIRouter, operations: ImportOperations, answer: Callable[[TimelineDetail], Answer]
) -> None:
    """`answer` is how the API shows a timeline; its return type goes into the API's description."""
    base = "/tenant/{tenant_id}/import"

    @router.get(base, tags=["import"], summary="The imports that are going on")
    async def list_imports(tenant_id: IdPath) -> list[ImportAnswer]:
        found = operations.running_imports(parse_tenant_id(tenant_id))
        return [
            ImportAnswer(timeline_id=each.timeline_id, received_bytes=each.received_bytes) for each in found
        ]

    @router.post(
        base + "/{timeline_id}",
        status_code=201,
        tags=["import"],
        summary="Import a cluster as a timeline",
        response_model=get_type_hints(answer)["return"],
    )
    async def import_timeline(tenant_id: IdPath, timeline_id: IdPath, request: Request) -> Answer:
        """The body is an import stream. The timeline exists when this is answered, or not at all."""
        ids = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        return answer(await operations.import_timeline(*ids, _chunks(request)))


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(SILENCE_S):
                chunk = await anext(stream, None)
        except ClientDisconnect as error:
            raise SenderLostError("the sender of the cluster has gone: nothing was imported") from error
        except TimeoutError as error:
            raise SenderLostError(f"the sender of the cluster was silent for {SILENCE_S:.0f} s") from error
        if chunk is None:
            return
        if chunk:
            yield chunk
