"""Endpoints are woken by calls of the controller, outlive their compute node, and lie on several of them."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from excimer.base.ids import NodeId
from excimer.cli.installation import free_ports, load_installation
from excimer.compute_node.cgroups import look_at_machine, prepare_cgroups
from excimer.compute_node.settings import ComputeNodeSettings
from excimer.service.process_records import start_ticks
from excimer.service.settings import save_settings
from excimer.wire.auth import Claims, encode_token
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

LIMIT_S = 120.0
MUCH = 100_000
"""More room than the installation's own node has."""
SQUATTER = """
import socket, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(flush=True)
input()
"""
BRANCHES = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1) as stack:
        stack.create_main()
        yield stack
    after = prepare_cgroups(stack.directory / "endpoints", None, look_at_machine())
    left = after.groups()
    after.leave()
    assert not left, "groups of a stopped installation"


class Controller:
    """Its API, as a proxy calls it."""

    def __init__(self, stack: Stack) -> None:
        installation = load_installation(stack.directory)
        self._options: dict[str, Any] = {
            "base_url": f"http://{installation.controller_address}/v1",
            "headers": {"Authorization": f"Bearer {installation.admin_token()}"},
            "timeout": LIMIT_S,
        }

    def post(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        with httpx.Client(**self._options) as client:
            return client.post(path, json=body or {})

    def get(self, path: str) -> Any:
        with httpx.Client(**self._options) as client:
            return client.get(path).raise_for_status().json()

    def start_at_once(self, names: Sequence[str]) -> list[httpx.Response]:
        async def story() -> list[httpx.Response]:
            async with httpx.AsyncClient(**self._options) as client:
                calls = (client.post(f"/endpoints/{name}/start", json={}) for name in names)
                return await asyncio.gather(*calls)

        return asyncio.run(story())


@pytest.fixture
def controller(stack: Stack) -> Controller:
    return Controller(stack)


def suspend(controller: Controller, name: str = "main") -> None:
    controller.post(f"/endpoints/{name}/stop", {"suspend": True}).raise_for_status()


def test_a_call_wakes_and_answers_when_connections_are_accepted(stack: Stack, controller: Controller) -> None:
    suspend(controller)
    answers = [answer.raise_for_status().json() for answer in controller.start_at_once(["main"] * 4)]
    assert sum(answer["started"] for answer in answers) == 1, "they share one start"
    assert len({answer["pid"] for answer in answers}) == 1
    assert {answer["endpoint"]["state"] for answer in answers} == {"running"}
    place = {(answer["host"], answer["port"]) for answer in answers}
    assert place == {("127.0.0.1", stack.endpoint("main")["postgres_port"])}
    assert stack.query("select 1") == [(1,)], "at the first try"


def test_a_start_that_fails_says_why(stack: Stack, controller: Controller) -> None:
    stack.text("endpoint", "stop", "main")
    taken = stack.endpoint("main")["postgres_port"]
    with subprocess.Popen(
        [
            *(sys.executable, "-c"),
            SQUATTER,
            str(taken),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as squatter:
        assert squatter.stdout is not None
        squatter.stdout.readline()
        answer = controller.post("/endpoints/main/start", {"limit_s": 20})
        squatter.communicate(b"\n")
    assert answer.status_code == 400
    assert "endpoint-main did not start (exited with code" in answer.json()["message"]
    assert f"port {taken}" in answer.json()["message"]
    controller.post("/endpoints/main/start").raise_for_status()


def test_endpoints_outlive_their_node_which_adopts_them(stack: Stack, controller: Controller) -> None:
    controller.post("/endpoints/main/start").raise_for_status()
    manager, node = stack.pid("endpoint-main"), stack.pid("compute-node")
    with stack.connect() as session:
        os.kill(node, signal.SIGKILL)
        stack.wait_until(lambda: stack.pid("compute-node") != node, "the node to be back")
        assert session.execute("select 1").fetchone() == (1,)
        stack.wait_until(lambda: node_is_well(stack), "the node to be well")
        answer = controller.post("/endpoints/main/start").raise_for_status().json()
        assert (answer["started"], answer["pid"]) == (False, manager)
        assert session.execute("select 2").fetchone() == (2,)
    suspend(controller)
    assert start_ticks(manager) is None, "it is over, reaped or not"
    assert controller.post("/endpoints/main/start").raise_for_status().json()["started"]


def node_is_well(stack: Stack) -> bool:
    rows = {row["part"]: row["state"] for row in status(stack)}
    return bool(rows["compute-node"] == "running")


def status(stack: Stack) -> Any:
    return json.loads(stack.run("--json", "status").stdout)["parts"]


def nodes(controller: Controller) -> Any:
    return controller.get("/compute_nodes")["compute_nodes"]


@contextlib.contextmanager
def other_node(stack: Stack, number: int, capacity: int) -> Iterator[Path]:
    """Another node beside the installation's, as on another machine: nothing of the two is shared."""
    installation = load_installation(stack.directory)
    root = stack.directory.parent / f"node-{number}"
    for made in ("run", "logs", "endpoints"):
        (root / made).mkdir(parents=True, mode=0o700 if made != "endpoints" else 0o755)
    root.chmod(0o755)
    private_pem = (installation.keys_dir / "private.pem").read_bytes()
    (root / "token").write_text(encode_token(private_pem, Claims(holder=f"compute_node:{number}")))
    settings = ComputeNodeSettings(
        id=NodeId(number),
        data_dir=root / "node",
        run_dir=root / "run",
        logs_dir=root / "logs",
        endpoints_dir=root / "endpoints",
        http_listen=f"127.0.0.1:{free_ports(1)[0]}",
        auth_public_key_path=installation.keys_dir / "public.pem",
        auth_token_path=root / "token",
        controller_address=installation.controller_address,
        capacity=capacity,
    )
    save_settings(root / "node.toml", settings)
    with (
        (root / "logs" / "node.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "excimer.compute_node", str(root / "node.toml")], stdout=log, stderr=log
        ) as process,
    ):
        try:
            yield root
        finally:
            for record in (root / "run").glob("*.pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
            process.terminate()


def test_endpoints_are_placed_by_room_and_woken_at_once_where_they_were(
    stack: Stack, controller: Controller
) -> None:
    for name in BRANCHES:
        stack.text("timeline", "branch", "--branch-name", name, "--ancestor", "main")
        stack.text("endpoint", "create", name, "--branch-name", name, "--suspend-after", "never")
    stack.text("endpoint", "stop", "main")
    with other_node(stack, 2, MUCH + 1), other_node(stack, 3, MUCH):
        stack.wait_until(
            lambda: [row["present"] for row in nodes(controller)] == [True] * 3,
            "three nodes",
        )
        answers = [answer.raise_for_status().json() for answer in controller.start_at_once(BRANCHES)]
        places = sorted(answer["endpoint"]["node_id"] for answer in answers)
        assert places == [2, 2, 2, 3], "where there is most room"
        for answer in answers:
            url = stack.url("main").replace(str(stack.endpoint("main")["postgres_port"]), str(answer["port"]))
            with psycopg.connect(url) as connection:
                assert connection.execute("select 1").fetchone() == (1,)
        placed = {answer["endpoint"]["name"]: answer["endpoint"]["node_id"] for answer in answers}
        for name in BRANCHES:
            suspend(controller, name)
        woken = controller.start_at_once([*BRANCHES, "main", *BRANCHES])
        rows = [answer.raise_for_status().json() for answer in woken]
        assert {row["endpoint"]["name"]: row["endpoint"]["node_id"] for row in rows} == placed | {"main": 1}
        assert sum(row["started"] for row in rows) == len(BRANCHES) + 1
        for name in BRANCHES:
            suspend(controller, name)
    assert nodes(controller)[0]["awake"] == 1


def test_an_endpoint_has_a_group_and_limits_over_its_whole_life(stack: Stack, controller: Controller) -> None:
    groups = prepare_cgroups(
        load_installation(stack.directory).directory / "endpoints", None, look_at_machine()
    )
    if groups.directory is None:
        pytest.skip(f"no groups can be made here: {groups.lacks['cpu']}")
    group = groups.directory / "endpoint-main"
    suspend(controller)
    assert not group.exists()
    said = stack.text("endpoint", "limits", "main", "--cpu", "0.5..2", "--memory", "512MB..1GB")
    assert said.startswith("endpoint main has cpu 0.5..2, memory 512MB..1GB")
    controller.post("/endpoints/main/start").raise_for_status()
    assert stack.query("show shared_buffers") == [("128MB",)]
    with stack.connect() as session:
        [(backend,)] = session.execute("select pg_backend_pid()").fetchall()
        inside = set(map(int, (group / "cgroup.procs").read_text().split()))
        assert {stack.pid("endpoint-main"), backend} <= inside, "the manager, and what it starts"
    shown = json.loads(stack.run("--json", "endpoint", "limits", "main").stdout)
    for name, now, low, high in (("cpu", "cpu_milli", 500, 2000), ("memory", "memory_mib", 512, 1024)):
        assert (shown[now] == 0) if name in groups.lacks else (low <= shown[now] <= high)
    [node] = [row for row in status(stack) if row["part"] == "compute-node"]
    told = " ".join(node["warnings"])
    assert all(reason in told for reason in groups.lacks.values())
    [row] = [row for row in status(stack) if row["part"] == "endpoint-main"]
    assert (row["limits"]["cpu_min_milli"], row["limits"]["memory_max_mib"]) == (500, 1024)
    assert groups.described() in stack.run("doctor").stdout
    postmaster = postmaster_in(group, stack)
    os.kill(postmaster, signal.SIGKILL)
    stack.wait_until(lambda: answers(stack), "PostgreSQL to be started again")
    again = postmaster_in(group, stack)
    assert again != postmaster, "and it is in the group, too"
    stack.text("endpoint", "limits", "main", "--cpu", "unlimited", "--memory", "unlimited")
    suspend(controller)
    assert not group.exists(), "a suspended endpoint leaves nothing"


def postmaster_in(group: Path, stack: Stack) -> int:
    """The parent of a session's backend, which is in the group."""
    with stack.connect() as session:
        [(backend,)] = session.execute("select pg_backend_pid()").fetchall()
        lines = Path(f"/proc/{backend}/status").read_text().splitlines()
    [postmaster] = [int(line.split()[1]) for line in lines if line.startswith("PPid:")]
    assert str(postmaster) in (group / "cgroup.procs").read_text().split()
    return postmaster


def answers(stack: Stack) -> bool:
    with contextlib.suppress(psycopg.OperationalError):
        return stack.query("select 1") == [(1,)]
    return False
