"""Routes for services that need tokens. The caller shows who it is; which routes are its own, these look at.

Not here: everything that needs the right `manage` (`api`).
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from excimer.controller.access import Access
from excimer.wire.auth import Claims
from excimer.wire.endpoint_tokens import EndpointTokens


class TokensAnswer(BaseModel):
    """As `excimer.wire.endpoint_tokens` has it."""

    read_pages: str
    write_wal: str | None = Field(description="null: the endpoint does not write")
    renewal: str
    valid_for_s: float

    @classmethod
    def of(cls, tokens: EndpointTokens) -> "TokensAnswer":
        return cls(
            read_pages=tokens.read_pages,
            write_wal=tokens.write_wal,
            renewal=tokens.renewal,
            valid_for_s=tokens.valid_for_s,
        )


def make_access_router(access: Access, authenticate: Callable[[Request], Claims]) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/endpoints/{name}/tokens", tags=["endpoints"], summary="Renew an endpoint's tokens")
    async def renew_tokens(name: str, claims: Annotated[Claims, Depends(authenticate)]) -> TokensAnswer:
        """For the endpoint's own manager, with its renewal token. 404: it was deleted, or moved."""
        return TokensAnswer.of(await access.renew(name, claims))

    return router
