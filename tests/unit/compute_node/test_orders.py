"""Orders to a compute node: repeated, at once, late, and over the node's own death.

Managers are small ones, without PostgreSQL; forks, locks, records and signals are real. Each story runs in a
process of its own with one thread, as a node does.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from excimer.base.ids import NodeId
from excimer.cli.installation import free_ports
from excimer.compute_node import manager_process
from excimer.compute_node.forks import ForkUnsafeError, ProcessWatch, fork
from excimer.compute_node.manager_process import EndpointFailedError, EndpointSlowError
from excimer.compute_node.resources import Resources
from excimer.compute_node.settings import ComputeNodeSettings
from excimer.compute_node.shell import ComputeNode, OvertakenError, StillRunningError
from excimer.service.logs import TIMER_NAME, configure_logging, get_logger
from excimer.service.process_records import find_process
from excimer.service.settings import save_settings
from excimer.service.tasks import TaskScope
from excimer.wire.compute_orders import Started, StopOrder
from tests.kit.compute_orders import start_order
from tests.kit.small_manager import FAILED, run_small_manager

FORK = multiprocessing.get_context("fork")
LIMIT_S = 120
STOP = StopOrder(generation=1, is_immediate=False)
KILL = StopOrder(generation=99, is_immediate=True)
NEVER_READY = {"ready_after_s": "100"}

Story = Callable[[ComputeNode], Awaitable[None]]


class Home:
    """The directories of one node, which its successors find."""

    def __init__(self, root: Path) -> None:
        self.settings = ComputeNodeSettings(
            id=NodeId(1),
            data_dir=root / "node",
            run_dir=root / "run",
            logs_dir=root / "logs",
            endpoints_dir=root / "endpoints",
            http_listen="127.0.0.1:1",
            auth_public_key_path=root / "public.pem",
            auth_token_path=root / "token",
            controller_address="127.0.0.1:1",
        )
        self.settings_file = root / "node.toml"
        for directory in (self.settings.run_dir, self.settings.logs_dir, self.settings.endpoints_dir):
            directory.mkdir(mode=0o700)
        root.chmod(0o755)
        save_settings(self.settings_file, self.settings)
        self.ports = iter(free_ports(20))

    def order(self, name: str, generation: int = 1, **fields: Any) -> Any:
        """With a port of its own unless it is given the one of before."""
        fields.setdefault("http_port", next(self.ports))
        return start_order(name, generation, **fields)

    def pid(self, name: str) -> int | None:
        """Of the manager that holds the endpoint's lock."""
        running = find_process(self.settings.run_dir, f"endpoint-{name}", self.settings.endpoints_dir / name)
        return None if running is None else running.pid

    def play(
        self,
        story: Story,
        *,
        starts_at_once: int = 4,
        leaves: bool = False,
        resources: Resources | None = None,
    ) -> None:
        """`leaves`: the node dies with its managers running, as by SIGKILL. Otherwise it kills them."""

        async def life() -> None:
            async with TaskScope() as scope:
                node = ComputeNode(self.settings, self.settings_file, scope, starts_at_once, resources)
                node.adopt()
                await story(node)
                if not leaves:
                    for each in node.running().endpoints:
                        await node.stop(each.name, KILL)

        def run() -> None:
            pytest.MonkeyPatch().setattr(manager_process, "run_manager", run_small_manager)
            asyncio.run(asyncio.wait_for(life(), LIMIT_S))
            if leaves:
                os._exit(0)

        process = FORK.Process(target=run)
        process.start()
        process.join(LIMIT_S)
        assert process.exitcode == 0, "the story has failed, see what it wrote"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of processes, which set no event
        await asyncio.sleep(0.001)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_starts_at_once_share_one_manager(home: Home) -> None:
    async def story(node: ComputeNode) -> None:
        order = home.order("main")
        answers = await asyncio.gather(*(node.start(order) for _ in range(5)))
        assert [each.is_new for each in answers].count(True) == 1
        assert {each.pid for each in answers} == {home.pid("main")}
        assert await node.start(order) == Started(pid=answers[0].pid, is_new=False)

    home.play(story)


def test_a_stop_ends_a_start_which_says_so(home: Home) -> None:
    async def story(node: ComputeNode) -> None:
        starting = asyncio.create_task(node.start(home.order("main", postgres_settings=NEVER_READY)))
        await until(lambda: node.awake > 0)
        assert (await node.stop("main", STOP)).was_running
        with pytest.raises(EndpointFailedError, match="endpoint-main was stopped while it started"):
            await starting
        assert home.pid("main") is None
        assert not (await node.stop("main", STOP)).was_running, "it may be repeated"

    home.play(story)


def test_a_late_order_is_told_from_the_newest(home: Home) -> None:
    async def story(node: ComputeNode) -> None:
        order = home.order("main")
        await node.start(order)
        await node.stop("main", STOP)
        with pytest.raises(OvertakenError):
            await node.start(order)
        assert (await node.start(home.order("main", 2))).is_new
        with pytest.raises(OvertakenError):
            await node.stop("main", STOP)
        assert home.pid("main") is not None

    home.play(story)


def test_who_waits_for_a_start_follows_its_successor(home: Home) -> None:
    async def story(node: ComputeNode) -> None:
        first = asyncio.create_task(node.start(home.order("main", postgres_settings=NEVER_READY)))
        await until(lambda: node.awake > 0)
        second = await node.start(home.order("main", 2))
        assert (await first).pid == second.pid == home.pid("main")

    home.play(story)


def test_a_start_that_fails_says_why_and_one_that_is_slow_goes_on(home: Home) -> None:
    async def story(node: ComputeNode) -> None:
        with pytest.raises(EndpointFailedError, match=rf"did not start \(exited with code 3\): {FAILED};"):
            await node.start(home.order("main", postgres_settings={"exit_code": "3"}))
        assert (await node.start(home.order("main"))).is_new, "it may be tried again"
        with pytest.raises(EndpointSlowError, match="endpoint-slow runs but does not become ready: "):
            await node.start(home.order("slow", limit_s=0.2, postgres_settings=NEVER_READY))
        assert home.pid("slow") is not None

    home.play(story)


def test_a_node_that_comes_back_adopts_what_runs_and_hears_of_its_end(home: Home) -> None:
    order = home.order("main")
    found: list[int | None] = []

    async def before(node: ComputeNode) -> None:
        await node.start(order)
        await node.start(home.order("other", 7))

    async def after(node: ComputeNode) -> None:
        found.append(home.pid("main"))
        assert {each.name: each.generation for each in node.running().endpoints} == {"main": 1, "other": 7}
        assert await node.start(order) == Started(pid=home.pid("main") or 0, is_new=False)
        os.kill(home.pid("other") or 0, signal.SIGKILL)
        await until(lambda: node.awake == 1)
        with pytest.raises(StillRunningError):
            await node.remove("main")
        assert (await node.stop("main", STOP)).was_running
        assert home.pid("main") is None
        await node.remove("main")
        assert not (home.settings.endpoints_dir / "main").exists()

    home.play(before, leaves=True)
    assert home.pid("main") is not None, "managers outlive their node"
    home.play(after)


def test_starts_are_let_in_in_the_order_in_which_they_came(home: Home) -> None:
    ready: list[str] = []
    most = 0

    async def start(node: ComputeNode, name: str) -> None:
        nonlocal most
        await node.start(home.order(name))
        most = max(most, node.starting)
        ready.append(name)

    async def story(node: ComputeNode) -> None:
        names = [f"e{number}" for number in range(6)]
        await asyncio.gather(*(start(node, name) for name in names))
        assert ready == names
        assert most <= 1

    home.play(story, starts_at_once=1)


def test_one_that_never_becomes_ready_does_not_keep_others_for_long(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("excimer.compute_node.shell.SLOT_LIMIT_S", 0.1)

    async def story(node: ComputeNode) -> None:
        stuck = asyncio.create_task(node.start(home.order("stuck", postgres_settings=NEVER_READY)))
        await until(lambda: node.awake > 0)
        assert (await node.start(home.order("main"))).is_new
        stuck.cancel()

    home.play(story, starts_at_once=1)


def test_a_fork_has_nothing_of_its_node_but_its_memory(home: Home, tmp_path: Path) -> None:
    async def story(_: ComputeNode) -> None:
        def work(reports: int) -> int:
            opened = {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
            has_loop = asyncio._get_running_loop() is not None
            is_alone = os.getsid(0) == os.getpid()
            os.write(reports, f"{opened == {'0', '1', '2', str(reports)}} {has_loop} {is_alone}".encode())
            return 7

        made = fork("probe", ["-m", "probe"], tmp_path / "probe.log", work)
        code: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        ProcessWatch(made.pid, code.set_result)
        assert await code == 7
        assert os.read(made.reports, 99) == b"True False True"

    home.play(story)


def test_a_node_with_threads_does_not_fork(home: Home, tmp_path: Path) -> None:
    async def story(_: ComputeNode) -> None:
        over = threading.Event()
        thread = threading.Thread(target=over.wait)
        thread.start()
        with pytest.raises(ForkUnsafeError, match="the node has threads"):
            fork("probe", [], tmp_path / "probe.log", lambda _: 0)
        over.set()
        thread.join()

    home.play(story)


def test_a_node_whose_log_withholds_lines_forks_all_the_same(home: Home, tmp_path: Path) -> None:
    """The log has a timer's thread then, and knows what to do without it."""

    async def story(node: ComputeNode) -> None:
        configure_logging("node")
        while not any(each.name == TIMER_NAME for each in threading.enumerate()):
            get_logger("test").info("said again and again")
        assert (await node.start(home.order("main"))).is_new

    home.play(story)
