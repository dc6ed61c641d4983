"""Routes about compute nodes: by which they register, for themselves; and which there are, for users."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from excimer.base.address import parse_address
from excimer.base.ids import NodeId
from excimer.controller.endpoints.api_models import Body
from excimer.controller.shell import Controller
from excimer.wire.auth import Claims
from excimer.wire.compute_limits import ComputeSize
from excimer.wire.compute_orders import NodeReport


class RoomBody(Body):
    """What the minimums of the endpoints that are awake may come to together; 0: it is not counted."""

    cpu_milli: Annotated[int, Field(ge=0)] = 0
    memory_mib: Annotated[int, Field(ge=0)] = 0


class NodeReportBody(Body):
    """As `excimer.wire.compute_orders` has it."""

    http_address: str
    capacity: Annotated[int, Field(ge=1)] = Field(description="How many endpoints may be awake on it.")
    room: RoomBody = RoomBody()


class RegisteredAnswer(BaseModel):
    id: int


class ComputeNodeRow(BaseModel):
    id: int
    http_address: str
    capacity: int = Field(description="How many endpoints may be awake on it.")
    awake: int
    room: RoomBody
    present: bool = Field(description="It has been heard of within the last 20 seconds.")


class ComputeNodesAnswer(BaseModel):
    compute_nodes: list[ComputeNodeRow]


def make_registration_router(
    controller: Controller, authenticate: Callable[[Request], Awaitable[Claims]]
) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.put("/compute_nodes/{node_id}", tags=["nodes"], summary="Register a compute node")
    async def register(
        node_id: int, body: NodeReportBody, claims: Annotated[Claims, Depends(authenticate)]
    ) -> RegisteredAnswer:
        """For the node itself, at its start and every few seconds, with the token by which it is known."""
        report = NodeReport(
            http_address=str(parse_address(body.http_address)),
            capacity=body.capacity,
            room=ComputeSize(body.room.cpu_milli, body.room.memory_mib),
        )
        node = await controller.compute_nodes.register(NodeId(node_id), report, claims)
        return RegisteredAnswer(id=node.id)

    return router


def add_compute_node_routes(router: APIRouter, controller: Controller) -> None:
    @router.get("/compute_nodes", tags=["nodes"])
    async def list_compute_nodes() -> ComputeNodesAnswer:
        endpoints = [endpoint for endpoint, _ in await controller.list_endpoints()]
        rows = [
            ComputeNodeRow(
                id=node.id,
                http_address=node.http_address,
                capacity=node.capacity,
                awake=sum(each.node_id == node.id and each.state == "running" for each in endpoints),
                room=RoomBody(cpu_milli=node.room.cpu_milli, memory_mib=node.room.memory_mib),
                present=controller.compute_nodes.is_present(node.id),
            )
            for node in await controller.compute_nodes.list_nodes()
        ]
        return ComputeNodesAnswer(compute_nodes=rows)
