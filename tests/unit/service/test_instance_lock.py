"""Who may have a directory whose owner was killed, and when."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.service import instance_lock
from excimer.service.instance_lock import AlreadyRunningError, InstanceLock

LIMIT_S = 60
OWNER = """
import subprocess, sys
from pathlib import Path
from excimer.service.instance_lock import InstanceLock
lock = InstanceLock(Path(sys.argv[1]), "owner")
subprocess.Popen(["sleep", "600"], pass_fds=[lock._fd], stdout=subprocess.DEVNULL)
print("ready", flush=True)
input()
"""
"""Its child stands for what a killed process has not let go of yet: a thread that writes, for example."""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


def child_of(owner: "subprocess.Popen[str]") -> int:
    return int(Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text())


def test_a_killed_owner_is_waited_for_until_it_has_ended(
    tmp_path: Path, owner: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = threading.Event()
    sleep = time.sleep

    def look_again(seconds: float) -> None:
        looks.set()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", look_again)
    monkeypatch.setattr(instance_lock, "ENDING_LIMIT_S", LIMIT_S)
    child = child_of(owner)
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # remains, as long as nobody collects it
    locks: list[InstanceLock] = []
    thread = threading.Thread(target=lambda: locks.append(InstanceLock(tmp_path / "data", "heir")))
    thread.start()
    assert looks.wait(LIMIT_S)
    assert locks == []
    os.kill(child, signal.SIGKILL)
    thread.join(LIMIT_S)
    assert len(locks) == 1
    assert (tmp_path / "data" / "LOCK").read_text() == f"{os.getpid()}\n"
    locks[0].release()


def test_an_owner_that_does_not_end_is_named_at_last(
    tmp_path: Path, owner: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance_lock, "ENDING_LIMIT_S", 0.05)
    child = child_of(owner)
    owner.kill()
    owner.wait(LIMIT_S)
    with pytest.raises(AlreadyRunningError, match=f"in use by process {owner.pid}: stop it first"):
        InstanceLock(tmp_path / "data", "heir")
    os.kill(child, signal.SIGKILL)


def test_an_owner_that_lives_is_named_at_once(
    tmp_path: Path, owner: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", pytest.fail)
    child = child_of(owner)
    with pytest.raises(AlreadyRunningError, match=f"in use by process {owner.pid}"):
        InstanceLock(tmp_path / "data", "heir")
    os.kill(child, signal.SIGKILL)
