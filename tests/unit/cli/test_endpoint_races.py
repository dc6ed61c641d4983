"""Commands on one endpoint at the same time: whoever asks gets what they asked for, if it came about.

The controller and the compute's manager are replaced, by a row and by a small service that takes a moment to
become ready; processes, locks and records are real.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from excimer.cli.commands import endpoint
from excimer.cli.commands.endpoint import _stop_now, start_endpoint, stop_endpoint
from excimer.cli.errors import ProcessFailedError
from excimer.cli.installation import Installation, Part, create_installation, free_ports, new_config
from excimer.cli.local_processes import stop_supervisor
from excimer.cli.session import Session
from excimer.service.settings import Settings

SERVICE = """
import asyncio, sys
from pathlib import Path
from excimer.service.health import Health
from excimer.service.instance_lock import InstanceLock
from excimer.service.light_http import serving_light_http
from excimer.service.process_main import run_service
from excimer.service.settings import Settings

class S(Settings, frozen=True):
    data_dir: Path
    http_listen: str
    ready_after_s: float

async def serve(settings):
    with InstanceLock(settings.data_dir, "service"):
        health = Health("service")
        async with serving_light_http(settings.http_listen, health, lambda: b""):
            await asyncio.sleep(settings.ready_after_s)
            health.ready = True
            await asyncio.Event().wait()

sys.exit(run_service("service", S, serve))
"""
LIMIT_S = 120
FORK = multiprocessing.get_context("fork")


class SlowSettings(Settings, frozen=True):
    data_dir: Path
    http_listen: str
    ready_after_s: float


class FakeController:
    row: ClassVar[dict[str, Any]] = {"name": "main", "mode": "static", "timeline_id": "t", "branch": "main"}

    def __init__(self, *_: object) -> None:
        pass

    def get(self, *_: str) -> Any:
        return {"endpoint": self.row}


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "slow_service.py").write_text(SERVICE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    made = create_installation(tmp_path / "state", new_config(18, 1))
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    settings = SlowSettings(data_dir=made.endpoint_dir("main"), http_listen=listen, ready_after_s=0.5)
    part = Part("endpoint-main", "slow_service", settings, listen, settings.data_dir)
    monkeypatch.setattr(Installation, "endpoint_part", lambda *_: part)
    monkeypatch.setattr(endpoint, "ControllerClient", FakeController)
    try:
        yield made
    finally:
        stop_supervisor(made, immediate=True)


def restart(installation: Installation) -> None:
    session = Session(installation.directory, as_json=True)
    start_endpoint(
        session,
        installation,
        "main",
        stop_first=lambda: _stop_now(session, installation, "main", immediate=False),
    )


def start(installation: Installation) -> None:
    start_endpoint(Session(installation.directory, as_json=True), installation, "main")


def stop(installation: Installation) -> None:
    stop_endpoint(Session(installation.directory, as_json=True), installation, "main", immediate=False)


def start_that_is_stopped(installation: Installation) -> None:
    with pytest.raises(ProcessFailedError, match="was stopped while it started"):
        start(installation)


def at_once(installation: Installation, *works: Callable[[Installation], None]) -> list[int | None]:
    """Their exit codes, each in a process of its own."""
    processes = [FORK.Process(target=work, args=(installation,)) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
        assert process.exitcode is not None, "a command does not end"
    return [process.exitcode for process in processes]


def test_restarts_and_starts_at_once_all_succeed_and_one_process_runs(installation: Installation) -> None:
    try:
        assert at_once(installation, restart, start, restart, start, restart) == [0] * 5
        assert endpoint.is_running(installation, "main")
    finally:
        stop(installation)
    assert not endpoint.is_running(installation, "main")


def test_two_stops_at_once_both_succeed(installation: Installation) -> None:
    start(installation)
    assert at_once(installation, stop, stop) == [0, 0]
    assert not endpoint.is_running(installation, "main")


def test_a_start_that_somebody_stops_says_so(installation: Installation) -> None:
    process = FORK.Process(target=start_that_is_stopped, args=(installation,))
    process.start()
    while not endpoint.is_running(installation, "main"):
        assert process.is_alive(), "the start is over before its process was seen"
    stop(installation)
    process.join(LIMIT_S)
    assert process.exitcode == 0
