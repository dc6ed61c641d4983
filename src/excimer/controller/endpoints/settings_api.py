"""Routes about an endpoint's PostgreSQL settings, for users and for the endpoint's own compute."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from excimer.base.clock import Clock
from excimer.controller import core
from excimer.controller.endpoint_settings import SettingsChange
from excimer.controller.endpoints.api_models import Body
from excimer.controller.shell import Controller
from excimer.service.http import bearer_auth
from excimer.wire.auth import EVERYTHING, Right, TokenVerifier, authorize, is_holder


class ChangeSettingsBody(Body):
    set: dict[str, str] = Field({}, description="By name.")
    unset: list[str] = Field([], description="Names; `*`: all. Done before `set`.")


class SettingsAnswer(BaseModel):
    settings: dict[str, str]
    changed: list[str] = Field(description="Names that this request changed.")
    at_start_only: list[str] = Field(description="Names that are in force only after a new start.")

    @classmethod
    def of(cls, change: SettingsChange) -> "SettingsAnswer":
        return cls(settings=change.settings, changed=change.changed, at_start_only=change.at_start_only)


def make_settings_router(controller: Controller, verifier: TokenVerifier, clock: Clock) -> APIRouter:
    """A user may change every endpoint's list, a compute only its own."""
    router = APIRouter(prefix="/v1/endpoints/{name}/settings", tags=["endpoints"])
    allowed: Any = Depends(owner_or_user(verifier, clock))

    @router.get("", dependencies=[allowed])
    async def read_settings(name: str) -> SettingsAnswer:
        return SettingsAnswer.of(await controller.settings.read(name))

    @router.patch("", dependencies=[allowed])
    async def change_settings(name: str, body: ChangeSettingsBody) -> SettingsAnswer:
        """Checked by the PostgreSQL build of the endpoint, then stored: all of it or nothing."""
        return SettingsAnswer.of(await controller.settings.change(name, body.set, body.unset))

    return router


def owner_or_user(verifier: TokenVerifier, clock: Clock) -> Callable[[Request, str], Awaitable[None]]:
    """For routes with a `name`: the compute of that endpoint, or who may manage everything."""
    authenticate = bearer_auth(verifier, clock)

    async def check(request: Request, name: str) -> None:
        claims = await authenticate(request)
        if not is_holder(claims, core.holder_of(name)):
            authorize(claims, Right.MANAGE, EVERYTHING)

    return check
