"""On which compute node an endpoint is to be awake. Pure.

Where it was last comes first, because its directory is there and its start is warm; else the node with the
most room. A node that has not been heard of for `LOST_S` gets nothing new.

There is room for an endpoint where one more may be awake, and where the minimums of CPU and memory of all who
are awake, its own among them, do not come to more than the node has. What it may have beyond its minimum is
not set aside for it.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from excimer.base.errors import RetryableError
from excimer.base.ids import NodeId
from excimer.controller.model import ComputeNode, Endpoint
from excimer.wire.compute_limits import ComputeSize

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
    others = [each for each in endpoints if each.state == "running" and each.name != endpoint.name]
    loads = {node.id: _Load.of([each for each in others if each.node_id == node.id]) for node in present}
    fitting = [node for node in present if _room(node, loads[node.id], endpoint) > 0]
    for node in fitting:
        if node.id == endpoint.node_id:
            return node
    if fitting:
        return max(fitting, key=lambda node: (_room(node, loads[node.id], endpoint), -node.id))
    awake = sum(load.endpoints for load in loads.values())
    if any(node.capacity > loads[node.id].endpoints for node in present):
        raise NodesFullError(
            f"no compute node has room for the minimum of endpoint {endpoint.name}, "
            f"{_shown(endpoint.limits.minimum)}, beside the minimums of {awake} endpoints awake: "
            "suspend or stop one, or lower its minimum"
        )
    raise NodesFullError(f"all compute nodes are full, with {awake} endpoints awake: suspend or stop one")


class _Load(NamedTuple):
    """What is set aside on a node."""

    endpoints: int
    cpu_milli: int
    memory_mib: int

    @classmethod
    def of(cls, endpoints: Sequence[Endpoint]) -> "_Load":
        sizes = [each.limits.minimum for each in endpoints]
        return cls(len(sizes), sum(size.cpu_milli for size in sizes), sum(size.memory_mib for size in sizes))


def _room(node: ComputeNode, load: _Load, endpoint: Endpoint) -> int:
    """How many more may be awake; 0 if the minimum of this one does not fit."""
    wanted = endpoint.limits.minimum
    fits = all(
        not (size and room) or taken + size <= room
        for size, taken, room in (
            (wanted.cpu_milli, load.cpu_milli, node.room.cpu_milli),
            (wanted.memory_mib, load.memory_mib, node.room.memory_mib),
        )
    )
    return max(0, node.capacity - load.endpoints) if fits else 0


def _shown(size: ComputeSize) -> str:
    said = [f"{size.cpu_milli / 1000:g} CPU"] if size.cpu_milli else []
    return " and ".join(said + ([f"{size.memory_mib} MiB"] if size.memory_mib else []))
