"""Starts and stops as the controller decides them, with compute nodes that remember what they were told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from excimer.base.errors import ConflictError, ExcimerError, RefusedError
from excimer.base.ids import NodeId, TimelineId
from excimer.compute_node.endpoints.api import make_api
from excimer.controller.endpoint_lifecycle import (
    EndpointFailedError,
    EndpointUnreadyError,
    StillRunningError,
)
from excimer.controller.model import ComputeNode, Endpoint
from excimer.controller.placement import LOST_S, NoComputeNodeError, plan_compute_node
from excimer.service.health import Health
from excimer.service.light_http import serving_light_http
from excimer.service.tasks import SystemClock
from excimer.wire.auth import Claims, TokenVerifier
from excimer.wire.compute_orders import (
    NodeReport,
    RunningEndpoint,
    RunningEndpoints,
    Started,
    StartOrder,
    StopOrder,
    Stopped,
)
from tests.kit.storage_fakes import KEYS, World, fake_world
from tests.unit.controller.test_shell import make_tenant
from tests.unit.controller.test_sqlite_store import ENDPOINT

OLD, NEW = TimelineId("dd" * 16), TimelineId("ee" * 16)
PRIMARY = msgspec.structs.replace(ENDPOINT, mode="primary", lsn=None, state="stopped")


class FailingError(RefusedError):
    """What a manager said."""


class RememberingNode:
    def __init__(self) -> None:
        self.orders: list[StartOrder] = []
        self.stops: list[StopOrder] = []
        self.up: dict[str, StartOrder] = {}
        self.fails: list[ExcimerError] = []
        self.on_start: Callable[[], Awaitable[None]] | None = None

    def running(self) -> RunningEndpoints:
        return RunningEndpoints(
            endpoints=[
                RunningEndpoint(
                    name=order.endpoint,
                    pid=1,
                    generation=order.generation,
                    timeline_id=order.timeline_id,
                    mode=order.mode,
                )
                for order in self.up.values()
            ]
        )

    async def start(self, order: StartOrder) -> Started:
        self.orders.append(order)
        if self.fails:
            raise self.fails.pop()
        known = self.up.get(order.endpoint)
        self.up[order.endpoint] = order
        if self.on_start is not None:
            await self.on_start()
        return Started(pid=order.generation, is_new=known is None or known.generation < order.generation)

    async def stop(self, name: str, order: StopOrder) -> Stopped:
        self.stops.append(order)
        return Stopped(was_running=self.up.pop(name, None) is not None)

    async def remove(self, name: str) -> None:
        if name in self.up:
            raise ConflictError(f"endpoint {name} runs")


@contextlib.asynccontextmanager
async def with_node(world: World, node_id: int = 1, capacity: int = 9) -> AsyncIterator[RememberingNode]:
    node = RememberingNode()
    api = make_api(cast(Any, node), TokenVerifier(KEYS.public_pem), SystemClock())
    async with serving_light_http("127.0.0.1:0", Health("node"), lambda: b"", routes=api) as address:
        report = NodeReport(http_address=str(address), capacity=capacity)
        claims = Claims(holder=f"compute_node:{node_id}")
        await world.controller.compute_nodes.register(NodeId(node_id), report, claims)
        yield node


def play(tmp_path: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_world(tmp_path) as world:
            await make_tenant(world)
            await create(world, "main")
            await story(world)

    asyncio.run(asyncio.wait_for(main(), 60))


async def create(world: World, name: str) -> None:
    number = len(await world.controller.list_endpoints())
    await world.controller.create_endpoint(
        name,
        "shop",
        "main",
        mode="primary",
        at=None,
        pg_version=None,
        ports=(5000 + number, 6000 + number),
        postgres_settings={},
    )


async def row(world: World, name: str = "main") -> tuple[str, int, int | None]:
    endpoint, _ = await world.controller.find_endpoint(name)
    return endpoint.state, endpoint.generation, endpoint.node_id


async def start(world: World, name: str = "main", **options: Any) -> Any:
    return await world.controller.lifecycle.start(name, limit_s=5.0, **options)


def test_a_start_is_of_one_generation_until_the_endpoint_sleeps(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        async with with_node(world) as node:
            assert (await start(world)).is_new
            assert not (await start(world)).is_new
            assert await row(world) == ("running", 1, 1)
            await world.controller.suspension.change(
                "main", delay_s=None, state="suspended", last_active_at=None, reason="idle"
            )
            assert (await start(world)).is_new, "the old manager is on its way out"
            assert (await start(world, is_restart=True)).is_new
            assert [order.generation for order in node.orders] == [1, 1, 2, 3]
            after, was_running = await world.controller.lifecycle.stop("main", is_immediate=True)
            assert (after.state, was_running, node.stops[0].generation) == ("stopped", True, 3)
            after, was_running = await world.controller.lifecycle.stop(
                "main", is_immediate=False, is_suspend=True
            )
            assert (after.state, was_running) == ("stopped", False), "what does not run is not suspended"

    play(tmp_path, story)


def test_a_start_that_fails_says_why_and_leaves_the_row(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with pytest.raises(NoComputeNodeError):
            await start(world)
        async with with_node(world) as node:
            node.fails = [FailingError("endpoint-main did not start: for a reason")]
            with pytest.raises(EndpointFailedError, match=r"^endpoint-main did not start: for a reason$"):
                await start(world)
            assert (await row(world))[0] == "stopped"
        with pytest.raises(EndpointUnreadyError, match="compute node 1 is not reachable"):
            await start(world)
        assert (await row(world))[0] == "stopped"

    play(tmp_path, story)


def test_a_generation_that_the_node_knows_to_be_stopped_is_not_used_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        async with with_node(world) as node:
            await start(world)
            node.fails = [ConflictError("stopped meanwhile")]
            assert (await start(world)).is_new
            assert [order.generation for order in node.orders] == [1, 1, 2]

    play(tmp_path, story)


def test_a_second_primary_of_a_branch_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, "rival")
        async with with_node(world) as node:
            await start(world)
            said = "branch main has a running primary, endpoint main: stop that first"
            with pytest.raises(StillRunningError, match=said):
                await start(world, "rival")
            node.up.clear()  # it was killed
            assert (await start(world, "rival")).is_new

    play(tmp_path, story)


def test_a_branch_that_was_replaced_while_its_endpoint_started_is_started_anew(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        async with with_node(world) as node:

            async def replace() -> None:
                node.on_start = None
                await world.controller.history.reset("shop", "dev", NEW, None)

            await world.controller.create_timeline(
                "shop", OLD, "dev", ancestor="main", at=None, pg_version=None
            )
            await world.controller.delete_endpoint("main")
            await world.controller.create_endpoint(
                *("main", "shop", "dev"),
                mode="primary",
                at=None,
                pg_version=None,
                ports=(5000, 6000),
                postgres_settings={},
            )
            node.on_start = replace
            awake = await start(world)
            assert awake.endpoint.timeline_id == NEW
            assert [order.timeline_id for order in node.orders] == [OLD, NEW]
            assert [order.generation for order in node.orders] == [1, 2]

    play(tmp_path, story)


def test_an_endpoint_that_runs_is_not_deleted(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        async with with_node(world) as node:
            await start(world)
            with pytest.raises(StillRunningError, match="endpoint main runs: stop it first"):
                await world.controller.delete_endpoint("main")
        with pytest.raises(EndpointUnreadyError):
            await world.controller.delete_endpoint("main")
        assert node.up, "nobody has stopped it"

    play(tmp_path, story)


def test_endpoints_go_where_there_is_room_and_back_to_where_they_were(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for name in ("b", "c", "d"):
            await world.controller.create_timeline(
                "shop", TimelineId(f"{name}0" * 16), name, ancestor="main", at=None, pg_version=None
            )
        async with with_node(world, 1, 1) as one, with_node(world, 2, 1) as two:
            for number, name in enumerate(("b", "c", "d")):
                await world.controller.create_endpoint(
                    *(name, "shop", name),
                    mode="primary",
                    at=None,
                    pg_version=None,
                    ports=(5100 + number, 6100 + number),
                    postgres_settings={},
                )
            await start(world, "b")
            await start(world, "c")
            assert (list(one.up), list(two.up)) == (["b"], ["c"])
            with pytest.raises(NoComputeNodeError, match="are full, with 2 endpoints awake"):
                await start(world, "d")
            two.up.clear()  # it was killed, and takes no room
            await start(world, "d")
            assert list(two.up) == ["d"]
            await world.controller.lifecycle.stop("d", is_immediate=False)
            await start(world, "c")
            await world.controller.lifecycle.stop("c", is_immediate=False, is_suspend=True)
            await world.controller.lifecycle.stop("b", is_immediate=False)
            await start(world, "c")
            assert list(two.up) == ["c"], "its directory is there"

    play(tmp_path, story)


def test_a_node_that_is_silent_gets_nothing_new() -> None:
    nodes = [ComputeNode(id=NodeId(number), http_address="h:1", capacity=number) for number in (1, 2, 3)]
    here = {NodeId(1): 0.0, NodeId(2): 0.0, NodeId(3): LOST_S}
    assert plan_compute_node(PRIMARY, [], nodes, here).id == 2
    was_there = msgspec.structs.replace(PRIMARY, node_id=NodeId(1))
    assert plan_compute_node(was_there, [], nodes, here).id == 1
    full: Endpoint = msgspec.structs.replace(PRIMARY, name="other", state="running", node_id=NodeId(1))
    assert plan_compute_node(was_there, [full], nodes, here).id == 2
    with pytest.raises(NoComputeNodeError, match="compute node 3 has not been heard of"):
        plan_compute_node(PRIMARY, [], nodes[2:], here)
