"""Limits of CPU and memory, as the controller keeps them, and the room that minimums take."""

from pathlib import Path

import msgspec
import pytest

from excimer.base.ids import NodeId
from excimer.controller.model import ComputeNode, Endpoint
from excimer.controller.placement import NodesFullError, plan_compute_node
from excimer.controller.sqlite_store import SqliteStore
from excimer.wire.compute_limits import ComputeLimits, ComputeSize
from tests.unit.controller.test_cache_size import Ask, make, play
from tests.unit.controller.test_sqlite_store import ENDPOINT, filled

LIMITS = ComputeLimits(cpu_min_milli=250, cpu_max_milli=2000, memory_min_mib=512, memory_max_mib=4096)
FIELDS = msgspec.structs.asdict(LIMITS)


def test_they_survive_reopening_and_nothing_else_changes(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.put_limits("nobody", LIMITS)
    store.put_limits("ep", LIMITS)
    node = ComputeNode(id=NodeId(1), http_address="h:1", capacity=3, room=ComputeSize(2000, 4096))
    store.put_compute_node(node)
    store.close()
    store = SqliteStore(tmp_path)
    assert store.list_endpoints() == [msgspec.structs.replace(ENDPOINT, limits=LIMITS)]
    assert store.list_compute_nodes() == [node]
    store.close()


def test_they_are_given_changed_and_shown(tmp_path: Path) -> None:
    async def story(ask: Ask) -> None:
        none = (await make(ask, "a")).json()["limits"]
        assert set(none.values()) == {0}
        assert (await make(ask, "bb", limits=FIELDS)).json()["limits"] == FIELDS
        refused = await make(ask, "ccc", limits={"cpu_max_milli": 1000})
        assert refused.status_code == 400
        assert "limits of CPU are 100 to" in refused.json()["message"]
        path = "/v1/endpoints/bb/limits"
        changed = (await ask("PATCH", path, json={"memory_max_mib": 8192})).json()
        assert changed == {"limits": FIELDS | {"memory_max_mib": 8192}, "in_force": True, "unkept": ""}
        refused = await ask("PATCH", path, json={"memory_min_mib": 9000})
        assert refused.json()["message"] == "the minimum of memory, 9000 MiB, is above its maximum, 8192 MiB"
        assert (await ask("PATCH", "/v1/endpoints/nobody/limits", json={})).status_code == 404
        assert (await ask("GET", "/v1/endpoints/bb")).json()["limits"]["memory_max_mib"] == 8192
        unlimited = {"memory_min_mib": 0, "memory_max_mib": 0}
        assert (await ask("PATCH", path, json=unlimited)).json()["limits"] == FIELDS | unlimited

    play(tmp_path, story)


def endpoint(name: str, cpu_min_milli: int, memory_min_mib: int, node_id: int | None = None) -> Endpoint:
    limits = ComputeLimits(
        cpu_min_milli=cpu_min_milli,
        cpu_max_milli=64_000 if cpu_min_milli else 0,
        memory_min_mib=memory_min_mib,
        memory_max_mib=1 << 20 if memory_min_mib else 0,
    )
    made: Endpoint = msgspec.structs.replace(
        ENDPOINT,
        name=name,
        limits=limits,
        state="stopped" if node_id is None else "running",
        node_id=None if node_id is None else NodeId(node_id),
    )
    return made


def test_the_minimum_is_set_aside_and_what_is_beyond_is_not() -> None:
    nodes = [
        ComputeNode(id=NodeId(1), http_address="h:1", capacity=90, room=ComputeSize(2000, 4096)),
        ComputeNode(id=NodeId(2), http_address="h:1", capacity=10, room=ComputeSize(4000, 2048)),
    ]
    here = {NodeId(1): 0.0, NodeId(2): 0.0}

    def place(wanted: Endpoint, *awake: Endpoint) -> int:
        return plan_compute_node(wanted, awake, nodes, here).id

    assert place(endpoint("e", 2000, 4096)) == 1, "all of it"
    assert place(endpoint("e", 2001, 256)) == 2
    taken = endpoint("other", 500, 3072, node_id=1)
    assert place(endpoint("e", 1500, 1024), taken) == 1
    assert place(endpoint("e", 250, 1025), taken) == 2
    assert place(endpoint("e", 0, 0), taken) == 1, "without limits only the count counts"
    again = msgspec.structs.replace(endpoint("e", 1600, 256), node_id=NodeId(1))
    assert place(again, taken) == 2, "where it was it does not fit any more"
    with pytest.raises(
        NodesFullError,
        match=r"no compute node has room for the minimum of endpoint e, 2\.5 CPU and 3072 MiB, beside the "
        r"minimums of 1 endpoints awake",
    ):
        place(endpoint("e", 2500, 3072), taken)


def test_a_node_of_before_counts_endpoints_only() -> None:
    node = ComputeNode(id=NodeId(1), http_address="h:1", capacity=1)
    assert plan_compute_node(endpoint("e", 4000, 4096), [], [node], {NodeId(1): 0.0}).id == 1
