"""Routes for services that need tokens. The caller shows who it is; which routes are its own, these look at.

Not here: everything that needs the right `manage` (`api`).
"""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from excimer.base.ids import parse_tenant_id, parse_timeline_id
from excimer.controller.access import Access
from excimer.wire.auth import Claims
from excimer.wire.endpoint_tokens import EndpointTokens
from excimer.wire.wal_access import WalAccess


class TokensAnswer(BaseModel):
    """As `excimer.wire.endpoint_tokens` has it."""

    read_pages: str
    write_wal: str | None = Field(description="null: the endpoint does not write")
    read_wal: str | None = Field(description="null: the endpoint does not follow the branch's WAL")
    renewal: str
    valid_for_s: float

    @classmethod
    def of(cls, tokens: EndpointTokens) -> "TokensAnswer":
        return cls(
            read_pages=tokens.read_pages,
            write_wal=tokens.write_wal,
            read_wal=tokens.read_wal,
            renewal=tokens.renewal,
            valid_for_s=tokens.valid_for_s,
        )


class WalMemberAnswer(BaseModel):
    safekeeper_id: int
    address: str


class WalAccessAnswer(BaseModel):
    """As `excimer.wire.wal_access` has it."""

    members: list[WalMemberAnswer]
    token: str
    valid_for_s: float

    @classmethod
    def of(cls, access: WalAccess) -> "WalAccessAnswer":
        members = [
            WalMemberAnswer(safekeeper_id=member.safekeeper_id, address=member.address)
            for member in access.members
        ]
        return cls(members=members, token=access.token, valid_for_s=access.valid_for_s)


def make_access_router(access: Access, authenticate: Callable[[Request], Awaitable[Claims]]) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/endpoints/{name}/tokens", tags=["endpoints"], summary="Renew an endpoint's tokens")
    async def renew_tokens(name: str, claims: Annotated[Claims, Depends(authenticate)]) -> TokensAnswer:
        """For the endpoint's own manager, with its renewal token. 404: it was deleted, or moved."""
        return TokensAnswer.of(await access.renew(name, claims))

    @router.post(
        "/tenants/{tenant_id}/timelines/{timeline_id}/wal_access",
        tags=["nodes"],
        summary="Where a pageserver may read a timeline's WAL",
    )
    async def wal_access(
        tenant_id: str, timeline_id: str, claims: Annotated[Claims, Depends(authenticate)]
    ) -> WalAccessAnswer:
        """For the pageserver that has the tenant, with the token by which it is known."""
        ids = parse_tenant_id(tenant_id), parse_timeline_id(timeline_id)
        return WalAccessAnswer.of(await access.wal_access(*ids, claims))

    return router
