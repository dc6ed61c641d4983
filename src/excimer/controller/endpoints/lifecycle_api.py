"""Routes that start and stop endpoints, for users and for whoever wakes one for a client."""

from fastapi import APIRouter
from pydantic import BaseModel, Field

from excimer.controller.endpoints.api_models import Body, EndpointAnswer
from excimer.controller.shell import Controller

START_LIMIT_S = 60.0


class StartBody(Body):
    limit_s: float = Field(
        START_LIMIT_S,
        gt=0,
        le=600,
        description="How long the answer may be waited for; the start goes on all the same.",
    )
    restart: bool = Field(default=False, description="Stop first what runs.")
    immediate: bool = Field(default=False, description="Kill what is stopped first; no commit is lost.")


class StopBody(Body):
    immediate: bool = Field(default=False, description="Kill at once; no commit is lost.")
    suspend: bool = Field(
        default=False, description="Whoever wants it again starts it. Nothing if it does not run."
    )


class AwakeAnswer(BaseModel):
    endpoint: EndpointAnswer
    host: str
    port: int
    pid: int
    started: bool = Field(description="It did not run before.")


class StoppedAnswer(BaseModel):
    endpoint: EndpointAnswer
    stopped: bool = Field(description="It ran before.")


def add_lifecycle_routes(router: APIRouter, controller: Controller) -> None:
    @router.post("/endpoints/{name}/start", tags=["endpoints"])
    async def start_endpoint(name: str, wanted: StartBody) -> AwakeAnswer:
        """Answers when it accepts connections. Repeatable; who asks for the same shares the start."""
        awake = await controller.lifecycle.start(
            name, limit_s=wanted.limit_s, is_restart=wanted.restart, is_immediate=wanted.immediate
        )
        endpoint = awake.endpoint
        return AwakeAnswer(
            endpoint=EndpointAnswer.of(endpoint, awake.branch),
            host=endpoint.listen_host,
            port=endpoint.postgres_port,
            pid=awake.pid,
            started=awake.is_new,
        )

    @router.post("/endpoints/{name}/stop", tags=["endpoints"])
    async def stop_endpoint(name: str, wanted: StopBody) -> StoppedAnswer:
        """Answers when nothing of it runs. Repeatable."""
        endpoint, was_running = await controller.lifecycle.stop(
            name, is_immediate=wanted.immediate, is_suspend=wanted.suspend
        )
        answer = EndpointAnswer.of(endpoint, await controller.branch_name(endpoint))
        return StoppedAnswer(endpoint=answer, stopped=was_running)
