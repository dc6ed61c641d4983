"""The node's HTTP API, for the controller: `excimer.wire.compute_orders` has the bodies."""

from collections.abc import Mapping
from typing import Any

from excimer.base.clock import Clock
from excimer.base.errors import RefusedError
from excimer.compute_node.shell import ComputeNode
from excimer.service.light_api import LightApi, Route
from excimer.wire.auth import TokenVerifier
from excimer.wire.compute_orders import (
    LimitsInForce,
    LimitsOrder,
    RunningEndpoints,
    Started,
    StartOrder,
    StopOrder,
    Stopped,
)


class WrongNameError(RefusedError):
    """An order's path and body name two endpoints."""


def make_api(node: ComputeNode, verifier: TokenVerifier, clock: Clock) -> LightApi:
    async def list_running(_: Mapping[str, str], __: Any) -> RunningEndpoints:
        return node.running()

    async def start(parts: Mapping[str, str], order: StartOrder) -> Started:
        if parts["name"] != order.endpoint:
            raise WrongNameError(f"the order is for endpoint {order.endpoint}, not {parts['name']}")
        return await node.start(order)

    async def stop(parts: Mapping[str, str], order: StopOrder) -> Stopped:
        return await node.stop(parts["name"], order)

    async def change_limits(parts: Mapping[str, str], order: LimitsOrder) -> LimitsInForce:
        return await node.change_limits(parts["name"], order.limits)

    async def remove(parts: Mapping[str, str], _: Any) -> None:
        await node.remove(parts["name"])

    routes = [
        Route("GET", "/v1/endpoints", None, list_running),
        Route("PUT", "/v1/endpoints/{name}", StartOrder, start),
        Route("POST", "/v1/endpoints/{name}/stop", StopOrder, stop),
        Route("PUT", "/v1/endpoints/{name}/limits", LimitsOrder, change_limits),
        Route("DELETE", "/v1/endpoints/{name}", None, remove),
    ]
    return LightApi(routes, verifier, clock)
