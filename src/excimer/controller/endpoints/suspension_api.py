"""The route about when an endpoint is suspended and whether it is, for users and for its own compute."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from excimer.controller.endpoints.api_models import Body, time_or_none
from excimer.controller.model import Endpoint, EndpointState
from excimer.controller.suspension import Suspension

Reason = Annotated[Literal["", "idle", "asked"], Field(description="Why it is suspended.")]


class ChangeSuspensionBody(Body):
    suspend_delay_s: int | None = Field(None, description="0: never.")
    state: EndpointState | None = Field(None, description="What has become of it.")
    last_active_at: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] | None = Field(
        None, description="Seconds since 1970."
    )
    reason: Reason = ""


class SuspensionAnswer(BaseModel):
    suspend_delay_s: int
    state: EndpointState
    last_active_at: datetime | None
    suspends: int
    suspend_reason: str

    @classmethod
    def of(cls, endpoint: Endpoint) -> "SuspensionAnswer":
        return cls(
            suspend_delay_s=endpoint.suspend_delay_s,
            state=endpoint.state,
            last_active_at=time_or_none(endpoint.last_active_at),
            suspends=endpoint.suspends,
            suspend_reason=endpoint.suspend_reason,
        )


def make_suspension_router(suspension: Suspension, allowed: Any) -> APIRouter:
    """`allowed`: the endpoint itself, and users."""
    router = APIRouter(prefix="/v1/endpoints/{name}/suspension", tags=["endpoints"])

    @router.get("", dependencies=[Depends(allowed)])
    async def read_suspension(name: str) -> SuspensionAnswer:
        return SuspensionAnswer.of(await suspension.read(name))

    @router.patch("", dependencies=[Depends(allowed)])
    async def change_suspension(name: str, body: ChangeSuspensionBody) -> SuspensionAnswer:
        """A running compute takes a new delay over when it is told to look (SIGHUP)."""
        return SuspensionAnswer.of(
            await suspension.change(
                name,
                delay_s=body.suspend_delay_s,
                state=body.state,
                last_active_at=body.last_active_at,
                reason=body.reason,
            )
        )

    return router
