"""Processes: clean stop on SIGTERM, hard end of a stuck one, exit codes, locks, light imports."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from excimer.service.instance_lock import AlreadyRunningError, InstanceLock

PROGRAM = """
import asyncio, sys, time
from pathlib import Path
from excimer.base.errors import RefusedError
from excimer.service.instance_lock import InstanceLock
from excimer.service.process_main import run_service
from excimer.service.settings import Settings

class S(Settings, frozen=True):
    data_dir: Path
    how: str = ""

moved_s = [0.0]

async def get_on_slowly():
    try:
        await asyncio.sleep(60)
    finally:
        until = time.monotonic() + 3
        while (now := time.monotonic()) < until:
            moved_s[0] = now
            await asyncio.sleep(0.02)
        print("cleaned up", flush=True)

async def serve(settings):
    with InstanceLock(settings.data_dir, "example"):
        print("ready", flush=True)
        if settings.how == "refused":
            raise RefusedError("the sky is falling")
        if settings.how == "crash":
            1 / 0
        if settings.how == "stuck":
            await asyncio.to_thread(time.sleep, 60)
        if settings.how == "slow":
            await get_on_slowly()
        try:
            await asyncio.sleep(60)
        finally:
            print("cleaned up", flush=True)

limit_s = 1.5 if sys.argv[-1].endswith("slow.toml") else 0.3
sys.exit(run_service("example", S, serve, stop_limit_s=limit_s, moved_s=lambda: moved_s[0]))
"""


def start(tmp_path: Path, how: str = "") -> "subprocess.Popen[str]":
    settings = tmp_path / f"{how}.toml"
    settings.write_text(f"data_dir = '{tmp_path / 'data'}'\nhow = '{how}'\n")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clean_stop(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "cleaned up\n"), errors


@pytest.mark.parametrize(
    ("how", "code", "said"), [("refused", 1, "the sky is falling"), ("crash", 70, "ZeroDivisionError")]
)
def test_failures_have_codes_and_words(tmp_path: Path, how: str, code: int, said: str) -> None:
    process = start(tmp_path, how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert said in errors
    assert ("Traceback" in errors) == (how == "crash")


def test_a_stuck_process_ends_anyway(tmp_path: Path) -> None:
    process = start(tmp_path, "stuck")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "example did not stop in time" in errors


def test_a_process_that_gets_on_with_its_end_is_waited_for(tmp_path: Path) -> None:
    process = start(tmp_path, "slow")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "cleaned up\n"), errors


def test_wrong_usage() -> None:
    for arguments in ([], ["--help"], ["/nonexistent.toml"]):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


def test_second_instance_is_refused(tmp_path: Path) -> None:
    with (
        InstanceLock(tmp_path, "pageserver"),
        pytest.raises(
            AlreadyRunningError, match=f"pageserver: {tmp_path} is in use by process {os.getpid()}"
        ),
    ):
        InstanceLock(tmp_path, "pageserver")
    InstanceLock(tmp_path, "pageserver").release()


def test_the_light_kit_imports_nothing_heavy() -> None:
    """The compute manager stands in a user's wake-up path."""
    light = (
        "settings tasks logs health light_http plain_metrics http_client instance_lock listen process_main"
    )
    code = f"import sys; [__import__('excimer.service.' + n) for n in '{light}'.split()]; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20
    ).stdout.split()
    heavy = {
        "fastapi",
        "pydantic",
        "uvicorn",
        "rich",
        "structlog",
        "prometheus_client",
        "nats",
        "cryptography",
    }
    assert not heavy & set(loaded)
