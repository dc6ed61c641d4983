"""The supervisor with a service of a few lines: who dies comes back, and nobody else notices anything."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from excimer.cli.errors import ProcessFailedError
from excimer.cli.installation import Installation, Part
from excimer.cli.local_processes import Running, find_process, start_parts, stop_parts, stop_supervisor
from excimer.cli.supervision import (
    find_supervisor,
    forget_part,
    log_path,
    part_states,
    supervisor_lock_dir,
    supervisor_problem,
)
from excimer.io.private_files import PRIVATE_FILE
from excimer.service.process_records import ProcessRecord
from excimer.supervisor.protocol import WatchedPart, socket_address
from tests.kit.small_service import part_of, small_installation

LIMIT_S = 60.0
START = {
    "type": "start",
    "part": "p",
    "module": "json",
    "lock_dir": "/tmp",
    "log_path": "/tmp/x",
    "environment": [],
    "is_restarted": False,
}
NO_STARTS: tuple[tuple[str, object], ...] = (
    *(("module", "j\0"), ("lock_dir", "/\0"), ("log_path", "/\0"), ("log_path", 1)),
    *(
        ("environment", [variable])
        for variable in ([b"", b"x"], [b"a=b", b"x"], [b"a\0", b""], [b"a", b"\0"])
    ),
)
NO_REQUESTS = (
    *(b"", b"{", b'{"type": "start"}', b'{"type": "forget", "part": 7}', b"\xff" * 100_000),
    *(b'{"type": "forget", "part": "\xff"}', b'{"type": "forget", "part": "\\u0000"}'),
    b'{"type": "parts", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    *(msgspec.json.encode({**START, name: wrong}) for name, wrong in NO_STARTS),
)


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    yield from small_installation(tmp_path, monkeypatch)


def start(installation: Installation, part: Part) -> ProcessRecord:
    start_parts(installation, [part], lambda *_: None)
    return running(installation, part)


def running(installation: Installation, part: Part) -> ProcessRecord:
    process = find_process(installation, part.name, part.lock_dir)
    assert process is not None
    return process


def stop(installation: Installation, part: Part) -> None:
    """For the end of a test; for certain."""
    stop_supervisor(installation, immediate=True)
    stop_parts(installation, [Running(part.name, part.lock_dir, 10)], lambda *_: None, immediate=True)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {LIMIT_S:.0f} s"
        time.sleep(0.01)


def state(installation: Installation, part: Part) -> WatchedPart:
    return part_states(installation)[part.name]


def comes_back(installation: Installation, part: Part, killed: ProcessRecord) -> Callable[[], bool]:
    def is_back() -> bool:
        process = find_process(installation, part.name, part.lock_dir)
        return process is not None and process != killed

    return is_back


def kill(process: ProcessRecord, number: int = signal.SIGKILL) -> None:
    os.kill(process.pid, number)
    wait_until(lambda: not process.is_alive(), f"the end of process {process.pid}")


def test_who_is_killed_comes_back_and_is_counted(installation: Installation) -> None:
    part = part_of(installation)
    for count in (1, 2):
        process = start(installation, part)
        kill(process)
        wait_until(comes_back(installation, part, process), f"restart {count}")
    start_parts(installation, [part], lambda *_: None)  # it runs: waited for, not started
    assert (state(installation, part).restarts, state(installation, part).last_end) == (2, "died of SIGKILL")
    assert "small died of SIGKILL, will restart" in log_path(installation, "supervisor").read_text()
    stop(installation, part)


def test_who_ends_cleanly_or_is_to_be_forgotten_stays_down(installation: Installation) -> None:
    part = part_of(installation)
    kill(start(installation, part), signal.SIGTERM)
    wait_until(lambda: state(installation, part).last_exit_code == 0, "the news of its end")
    assert not state(installation, part).is_awaited
    process = start(installation, part)
    forget_part(installation, part.name)
    kill(process)
    assert part.name not in part_states(installation)
    unwatched = part_of(installation, name="endpoint-like")
    process = start(installation, dataclasses.replace(unwatched, is_restarted=False))
    kill(process)
    wait_until(lambda: state(installation, unwatched).last_exit_code == -signal.SIGKILL, "the news")
    assert not state(installation, unwatched).is_awaited
    assert find_process(installation, part.name, part.lock_dir) is None


def test_who_cannot_start_is_not_tried_again(installation: Installation) -> None:
    part = part_of(installation, "refuse")
    with pytest.raises(ProcessFailedError, match=r"did not start \(exited with code 1\): .*port 5"):
        start(installation, part)
    found = state(installation, part)
    assert (found.is_awaited, found.restarts, found.pid) == (False, 0, None)


def test_services_outlive_their_supervisor_and_are_taken_over(installation: Installation) -> None:
    part = part_of(installation)
    process = start(installation, part)
    first = find_supervisor(installation)
    assert first is not None
    assert supervisor_problem(installation) is None
    os.kill(first.pid, signal.SIGSTOP)
    wait_until(lambda: supervisor_problem(installation) is not None, "it stands still")
    assert f"kill -CONT {first.pid}" in str(supervisor_problem(installation))
    kill(first)
    assert "excimer start" in str(supervisor_problem(installation))
    assert part_states(installation) == {}
    assert start_parts(installation, [part], lambda *_: None) == []
    second = find_supervisor(installation)
    assert second is not None
    assert second != first
    assert supervisor_problem(installation) is None
    assert running(installation, part) == process
    kill(process)
    wait_until(comes_back(installation, part, process), "the restart by the second supervisor")
    kill(second, signal.SIGTERM)
    assert running(installation, part).is_alive()
    stop(installation, part)
    assert find_process(installation, part.name, part.lock_dir) is None


def test_there_is_never_a_second_supervisor(installation: Installation) -> None:
    part = part_of(installation)
    start(installation, part)
    settings = installation.run_dir / "supervisor.toml"
    done = subprocess.run(
        [sys.executable, "-m", "excimer.supervisor", str(settings)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    supervisor = find_supervisor(installation)
    assert supervisor is not None
    assert done.returncode == 1
    assert f"is in use by process {supervisor.pid}" in done.stderr
    assert state(installation, part).pid == running(installation, part).pid
    # Not even a record that was lost makes one: the lock leads to it.
    (installation.run_dir / "supervisor.pid").unlink()
    assert find_supervisor(installation) == supervisor
    stop(installation, part)
    assert find_supervisor(installation) is None


def test_a_fork_has_nothing_of_the_supervisor(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its sockets, lock, signals, session and name, nor the environment of an earlier command."""
    monkeypatch.setenv("OF_THE_FIRST_COMMAND", "1")
    other = part_of(installation, name="other")
    start(installation, other)
    monkeypatch.delenv("OF_THE_FIRST_COMMAND")
    monkeypatch.setenv("OF_THE_SECOND_COMMAND", "2")
    monkeypatch.setenv("NO_TEXT", os.fsdecode(b"\xff"))
    part = part_of(installation)
    process = start(installation, part)
    place = Path(f"/proc/{process.pid}")
    assert (place / "comm").read_text() == "small\n"
    arguments = (place / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    settings = installation.run_dir / "small.toml"
    assert arguments == [os.fsencode(each) for each in (sys.executable, "-m", "small_service", settings)]
    assert os.getsid(process.pid) == process.pid
    fields = dict(line.split(":\t") for line in (place / "status").read_text().splitlines())
    ours = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    assert (fields["SigBlk"], fields["SigIgn"]) == ("0" * 16, ours["SigIgn"])
    supervisor = find_supervisor(installation)
    assert supervisor is not None
    held = {os.readlink(each) for each in (place / "fd").iterdir()}
    theirs = {os.readlink(each) for each in Path(f"/proc/{supervisor.pid}/fd").iterdir()}
    shared = {each for each in held & theirs if each != "/dev/null" and not each.startswith("anon_inode")}
    assert not shared, f"{held} and {theirs}"
    log = log_path(installation, "small")
    assert os.readlink(place / "fd" / "1") == str(log)
    assert log.stat().st_mode & 0o777 == PRIVATE_FILE
    environment = (
        (installation.directory / "small" / "environment").read_bytes().decode("latin-1").split("\n")
    )
    assert {"OF_THE_SECOND_COMMAND=2", "NO_TEXT=\xff"} <= set(environment)
    assert "OF_THE_FIRST_COMMAND=1" not in environment
    stop(installation, other)
    stop(installation, part)


def test_a_restart_that_cannot_be_recorded_is_one_all_the_same(installation: Installation) -> None:
    """As on a full disk: the process is found by its lock, and watched."""
    part = part_of(installation)
    process = start(installation, part)
    record = installation.run_dir / "small.pid"
    record.unlink()
    record.mkdir()
    kill(process)
    wait_until(comes_back(installation, part, process), "the restart")
    second = running(installation, part)
    assert state(installation, part).pid == second.pid
    assert "started and not recorded" in log_path(installation, "supervisor").read_text()
    kill(second)
    wait_until(comes_back(installation, part, second), "the restart after that")
    record.rmdir()
    stop(installation, part)


def test_what_is_no_request_does_no_harm(installation: Installation) -> None:
    part = part_of(installation)
    start(installation, part)
    assert (installation.run_dir / "supervisor.sock").stat().st_mode & 0o777 == PRIVATE_FILE
    for content in NO_REQUESTS:
        with (
            socket.socket(socket.AF_UNIX) as connection,
            socket_address(installation.run_dir) as address,
        ):
            connection.connect(address)
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(LIMIT_S)
            assert connection.recv(100) == b""
    assert state(installation, part).pid == running(installation, part).pid
    stop(installation, part)


def test_a_supervisor_ends_with_its_installation(installation: Installation) -> None:
    part = part_of(installation)
    start(installation, part)
    supervisor = find_supervisor(installation)
    assert supervisor is not None
    stop_parts(installation, [Running(part.name, part.lock_dir, 10)], lambda *_: None, immediate=True)
    installation.directory.rename(installation.directory.with_name("gone"))
    wait_until(lambda: not supervisor.is_alive(), "the end of the supervisor")
    assert not supervisor_lock_dir(installation.run_dir).exists()
