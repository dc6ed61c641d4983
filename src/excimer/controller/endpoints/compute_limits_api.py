"""The routes about what CPU and memory an endpoint may have, for users."""

from fastapi import APIRouter
from pydantic import BaseModel, Field

from excimer.controller.endpoints.api_models import Body, LimitsFields
from excimer.controller.shell import Controller


class ChangeLimitsBody(Body):
    """What is not given stays as it is; both ends of a range 0: no limit."""

    cpu_min_milli: int | None = Field(None, description="Thousandths of a core.")
    cpu_max_milli: int | None = None
    memory_min_mib: int | None = None
    memory_max_mib: int | None = None


class LimitsAnswer(BaseModel):
    limits: LimitsFields
    in_force: bool = Field(description="At once, or when it starts; False: what runs now could not be told.")
    unkept: str = Field(description="Which of them the endpoint's machine cannot keep to, and why.")


def add_limits_routes(router: APIRouter, controller: Controller) -> None:
    @router.patch("/endpoints/{name}/limits", tags=["endpoints"])
    async def change_limits(name: str, body: ChangeLimitsBody) -> LimitsAnswer:
        """In force at once where the endpoint runs; shared_buffers follows the minimum at its next start."""
        changed = await controller.limits.change(name, body.model_dump(exclude_none=True))
        runs = changed.endpoint.state == "running"
        return LimitsAnswer(
            limits=LimitsFields.of(changed.endpoint.limits),
            in_force=changed.in_force is not None or not runs,
            unkept="" if changed.in_force is None else changed.in_force.unkept,
        )
