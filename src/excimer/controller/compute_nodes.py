"""The compute nodes that have registered themselves, and calls to them.

Addresses and capacities are durable, so that a controller that comes back can stop what runs; when a node was
last heard of is not.
"""

import asyncio
from typing import Any, Final, TypeVar

import msgspec

from excimer.base.clock import Clock
from excimer.base.ids import NodeId
from excimer.controller.model import ComputeNode, UnknownNameError
from excimer.controller.placement import LOST_S
from excimer.controller.remote import RemoteAnswerError
from excimer.controller.store import MetadataStore
from excimer.controller.tokens import TokenMaker
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger
from excimer.wire.auth import EVERYTHING, Claims, RightMissingError, is_holder
from excimer.wire.compute_orders import (
    LimitsInForce,
    LimitsOrder,
    NodeReport,
    RunningEndpoint,
    RunningEndpoints,
    Started,
    StartOrder,
    StopOrder,
    Stopped,
)

LIST_LIMIT_S: Final = 5.0
STOP_LIMIT_S: Final = 3600.0
"""A stop takes as long as PostgreSQL's last checkpoint gets on; a node that is gone is noticed earlier."""
ANSWER_MARGIN_S: Final = 30.0
"""A start's answer, or why it is late, comes so long after its limit at the latest."""

T = TypeVar("T")

log = get_logger(__name__)


class ComputeNodeApi:
    """One node's API. Each call is safe to repeat."""

    def __init__(self, node: ComputeNode, tokens: TokenMaker) -> None:
        self.name = f"compute node {node.id}"
        self._address = node.http_address
        self._tokens = tokens

    async def start(self, order: StartOrder, *, replaces: bool) -> Started:
        """Raises RefusedError with the reason of a start that failed, RetryableError of one that is slow.

        `replaces`: somebody is stopped first, for as long as that takes.
        """
        path = path_of("v1", "endpoints", order.endpoint)
        limit_s = order.limit_s + (STOP_LIMIT_S if replaces else ANSWER_MARGIN_S)
        return _understood(self.name, await self._client(limit_s).call("PUT", path, order), Started)

    async def stop(self, name: str, order: StopOrder) -> Stopped:
        path = path_of("v1", "endpoints", name, "stop")
        return _understood(self.name, await self._client(STOP_LIMIT_S).post(path, order), Stopped)

    async def change_limits(self, name: str, order: LimitsOrder) -> LimitsInForce:
        path = path_of("v1", "endpoints", name, "limits")
        answer = await self._client(LIST_LIMIT_S).call("PUT", path, order)
        return _understood(self.name, answer, LimitsInForce)

    async def remove(self, name: str) -> None:
        await self._client(STOP_LIMIT_S).delete(path_of("v1", "endpoints", name))

    async def running(self) -> list[RunningEndpoint]:
        answer = await self._client(LIST_LIMIT_S).get(path_of("v1", "endpoints"))
        return _understood(self.name, answer, RunningEndpoints).endpoints

    def _client(self, limit_s: float) -> HttpClient:
        return HttpClient(self.name, self._address, self._tokens.managing(EVERYTHING), limit_s)


class ComputeNodes:
    """Who has registered."""

    def __init__(self, store: MetadataStore, tokens: TokenMaker, clock: Clock) -> None:
        self._store = store
        self._tokens = tokens
        self._clock = clock
        self._nodes: dict[NodeId, ComputeNode] | None = None
        self._heard: dict[NodeId, float] = {}
        self._begun = clock.monotonic()

    async def register(self, node_id: NodeId, report: NodeReport, claims: Claims) -> ComputeNode:
        """Durable when it returns. Raises `RightMissingError` for a token that is not the node's own."""
        if not is_holder(claims, f"compute_node:{node_id}"):
            raise RightMissingError(f"this token of {claims.holder} is not compute node {node_id}'s own")
        node = ComputeNode(
            id=node_id, http_address=report.http_address, capacity=report.capacity, room=report.room
        )
        nodes = await self._known()
        if nodes.get(node_id) != node:
            await asyncio.to_thread(self._store.put_compute_node, node)
            nodes[node_id] = node
            log.info("compute node registered", id=node_id, address=node.http_address, capacity=node.capacity)
        self._heard[node_id] = self._clock.monotonic()
        return node

    async def list_nodes(self) -> list[ComputeNode]:
        return list((await self._known()).values())

    def silent_s(self, node_id: NodeId) -> float:
        """How long a node has not been heard of. Before we started it may have been."""
        return self._clock.monotonic() - self._heard.get(node_id, self._begun)

    def is_present(self, node_id: NodeId) -> bool:
        return self.silent_s(node_id) < LOST_S

    async def api_of(self, node_id: NodeId) -> ComputeNodeApi:
        """Raises `UnknownNameError`."""
        node = (await self._known()).get(node_id)
        if node is None:
            raise UnknownNameError(f"no compute node {node_id}")
        return ComputeNodeApi(node, self._tokens)

    async def apis(self) -> list[ComputeNodeApi]:
        return [ComputeNodeApi(node, self._tokens) for node in await self.list_nodes()]

    async def _known(self) -> dict[NodeId, ComputeNode]:
        if self._nodes is None:
            rows = await asyncio.to_thread(self._store.list_compute_nodes)
            self._nodes = self._nodes or {row.id: row for row in rows}
        return self._nodes


def _understood(service: str, answer: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise RemoteAnswerError(f"{service} gave an answer that is not understood: {error}") from error
