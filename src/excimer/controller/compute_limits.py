"""How much CPU and memory endpoints may have: the one place where it is kept.

A change reaches an endpoint that runs at once, by its compute node; what cannot be changed while PostgreSQL
runs (shared_buffers, chosen from the minimum of memory) follows at its next start.

Not here: keeping to it (`excimer.compute_node.resources`), where there is room for the minimum (`placement`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from excimer.base.errors import RetryableError
from excimer.controller.compute_nodes import ComputeNodes
from excimer.controller.model import BadRequestError, Endpoint
from excimer.controller.store import MetadataStore
from excimer.service.logs import get_logger
from excimer.wire.compute_limits import ComputeLimits, limits_problem
from excimer.wire.compute_orders import LimitsInForce, LimitsOrder

log = get_logger(__name__)


def check_limits(limits: ComputeLimits) -> None:
    """Raises `BadRequestError`."""
    if problem := limits_problem(limits):
        raise BadRequestError(problem)


class LimitsAnswer(NamedTuple):
    endpoint: Endpoint
    in_force: LimitsInForce | None
    """None: its node does not answer; from the endpoint's next start on."""


class LimitsKeeper:
    """Reads and changes them, one change at a time."""

    def __init__(
        self,
        store: MetadataStore,
        nodes: ComputeNodes,
        find_endpoint: Callable[[str], Awaitable[tuple[Endpoint, str]]],
    ) -> None:
        self._store = store
        self._nodes = nodes
        self._find_endpoint = find_endpoint
        self._changing = asyncio.Lock()

    async def change(self, name: str, changes: dict[str, int]) -> LimitsAnswer:
        """`changes`: fields of `ComputeLimits`. Durable when it returns; what the endpoint's node refuses is
        not kept. Raises `UnknownNameError`, `BadRequestError`, RefusedError with the node's reason.
        """
        async with self._changing:
            before, _ = await self._find_endpoint(name)
            limits = msgspec.structs.replace(before.limits, **changes)
            check_limits(limits)
            in_force = await self._order(before, limits)
            if limits != before.limits:
                await asyncio.to_thread(self._store.put_limits, name, limits)
                log.info("limits changed", endpoint=name, limits=limits)
            return LimitsAnswer((await self._find_endpoint(name))[0], in_force)

    async def _order(self, endpoint: Endpoint, limits: ComputeLimits) -> LimitsInForce | None:
        if endpoint.node_id is None:
            return None
        api = await self._nodes.api_of(endpoint.node_id)
        try:
            return await api.change_limits(endpoint.name, LimitsOrder(limits=limits))
        except RetryableError as error:
            log.warning("limits are in force from the next start on", endpoint=endpoint.name, error=error)
            return None
