"""On which compute node an endpoint is to be awake. Pure.

Where it was last comes first, because its directory is there and its start is warm; else the node with the
most room. A node that has not been heard of for `LOST_S` gets nothing new.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from excimer.base.errors import RetryableError
from excimer.base.ids import NodeId
from excimer.controller.model import ComputeNode, Endpoint

LOST_S: Final = 20.0
"""Four reports of a node."""


class NoComputeNodeError(RetryableError):
    """No compute node is there that could have the endpoint."""


class NodesFullError(NoComputeNodeError):
    """All have as many endpoints awake as they may."""


def plan_compute_node(
    endpoint: Endpoint,
    endpoints: Sequence[Endpoint],
    nodes: Sequence[ComputeNode],
    silent_s: Mapping[NodeId, float],
) -> ComputeNode:
    """`endpoints` are all there are, `silent_s` says how long each node has not been heard of.

    Raises `NoComputeNodeError`, `NodesFullError`.
    """
    present = [node for node in nodes if silent_s[node.id] < LOST_S]
    if not present:
        raise NoComputeNodeError(
            "no compute node is there: `excimer start` starts this machine's"
            if not nodes
            else f"compute node {', '.join(str(node.id) for node in nodes)} has not been heard of"
        )
    awake = {node.id: 0 for node in present}
    for other in endpoints:
        if other.state == "running" and other.name != endpoint.name and other.node_id in awake:
            awake[other.node_id] += 1
    room = {node.id: node.capacity - awake[node.id] for node in present}
    for node in present:
        if node.id == endpoint.node_id and room[node.id] > 0:
            return node
    best = max(present, key=lambda node: (room[node.id], -node.id))
    if room[best.id] <= 0:
        raise NodesFullError(
            f"all compute nodes are full, with {sum(awake.values())} endpoints awake: suspend or stop one"
        )
    return best
