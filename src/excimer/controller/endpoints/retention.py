"""Routes about how much history a tenant keeps: its settings, garbage collection and compaction by hand.

The controller knows which pageserver to ask, and passes on what that one answers.
"""

import math
from typing import Annotated, Any

import fastapi
from fastapi import APIRouter
from pydantic import AfterValidator

from excimer.controller.endpoints.api_models import Body
from excimer.controller.shell import Controller


def _all_finite(settings: dict[str, Any]) -> dict[str, Any]:
    """JSON as it is written further has no words for the others: they would arrive as null."""
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name[:80]} is not a finite number")
    return settings


Settings = Annotated[dict[str, Any], fastapi.Body(), AfterValidator(_all_finite)]


class BranchBody(Body):
    branch: str = "main"


def add_retention_routes(router: APIRouter, controller: Controller) -> None:
    config = "/tenants/{tenant}/config"

    @router.get(config, tags=["tenants"])
    async def read_config(tenant: str) -> Any:
        """What the tenant has chosen, and what is in effect."""
        return await ask_config("GET", tenant, None)

    @router.put(config, tags=["tenants"])
    async def replace_config(tenant: str, overrides: Settings) -> Any:
        """Replaces what the tenant has chosen."""
        return await ask_config("PUT", tenant, overrides)

    @router.patch(config, tags=["tenants"])
    async def change_config(tenant: str, changes: Settings) -> Any:
        """Changes some settings; null gives one back to its default."""
        return await ask_config("PATCH", tenant, changes)

    @router.post("/tenants/{tenant}/gc", tags=["branches"])
    async def collect_garbage(tenant: str, body: BranchBody) -> Any:
        """Removes the branch's history that nobody retains, now."""
        return await work_on(tenant, body.branch, "do_gc")

    @router.post("/tenants/{tenant}/compact", tags=["branches"])
    async def compact(tenant: str, body: BranchBody) -> Any:
        """Merges layers and makes images, as far as they are due, now."""
        return await work_on(tenant, body.branch, "compact")

    async def ask_config(method: str, reference: str, body: dict[str, Any] | None) -> Any:
        tenant = await controller.find_tenant(reference)
        _, pageserver = await controller.pageserver_of(tenant.tenant_id)
        return await pageserver.tenant_config(method, tenant.tenant_id, body)

    async def work_on(reference: str, branch: str, what: str) -> Any:
        tenant = await controller.find_tenant(reference)
        timeline = await controller.find_branch(tenant.tenant_id, branch)
        _, pageserver = await controller.pageserver_of(tenant.tenant_id)
        answer = await pageserver.work_on_timeline(tenant.tenant_id, timeline.timeline_id, what)
        return {"branch": timeline.name, **answer}
