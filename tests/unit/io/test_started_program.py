"""A program that is started without a copy of our memory is as harmless as any other, and ends with us."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from excimer._native import program_start
from excimer.compute.activity_sampler import child_pids
from excimer.io.processes import unprivileged_user
from excimer.io.started_program import StartedProgram, start_program
from tests.kit.directories import reachable_directory

SHELL = "/bin/sh"


def status_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().splitlines()


async def written_by(script: str, tmp_path: Path, environment: dict[str, str] | None = None) -> list[str]:
    """Lines that a shell wrote while it ran `script`."""
    path = tmp_path / "output"
    with path.open("wb") as file:
        program = start_program(
            [SHELL, "-c", script],
            environment=environment or {},
            directory=Path("/"),
            output=file.fileno(),
            death_signal=signal.SIGQUIT,
        )
        await program.wait()
    return path.read_text().splitlines()


def test_it_is_not_root_and_has_nothing_of_ours(tmp_path: Path) -> None:
    ours = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(ours, True)
    try:
        script = f"id -u; id -g; id -G; pwd; env | grep -c EXCIMER; cat; test -e /proc/$$/fd/{ours}; echo $?"
        lines = asyncio.run(written_by(script, tmp_path, {"PATH": os.environ["PATH"], "EXCIMER_X": "a b"}))
    finally:
        os.close(ours)
    user = unprivileged_user()
    expected = (os.geteuid(), os.getegid()) if user is None else (user.uid, user.gid)
    assert lines[:2] == [str(number) for number in expected]
    assert "0" not in lines[2].split() or user is None
    assert lines[3:] == ["/", "1", "1"], "a descriptor of ours is open in it, or something else is ours"


def test_it_is_in_a_session_of_its_own_and_takes_signals_as_at_birth() -> None:
    """Our handlers, what we block, and what Python ignores are not its."""

    async def scenario() -> tuple[int, dict[str, int]]:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
        program = start_program(
            ["/bin/sleep", "60"],
            environment={},
            directory=Path("/"),
            output=2,
            death_signal=signal.SIGQUIT,
        )
        try:
            fields = dict(line.split(":", 1) for line in status_of(program.pid))
            masks = {name: int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")}
            return os.getsid(program.pid) - program.pid, masks
        finally:
            program.send_signal(signal.SIGTERM)
            assert await program.wait() == -signal.SIGTERM
            program.send_signal(signal.SIGTERM)  # nobody any more

    session, masks = asyncio.run(scenario())
    assert session == 0
    # The C library's own, 32 and 33, may be seen until the kernel has ended the execution's last steps.
    assert (masks["SigBlk"], masks["SigIgn"] & 0x7FFFFFFF, masks["SigCgt"] & 0x7FFFFFFF) == (0, 0, 0)


def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    async def scenario(program: str, directory: Path) -> StartedProgram:
        return start_program([program], environment={}, directory=directory, output=2, death_signal=0)

    children = set(child_pids(os.getpid()))
    no_program = tmp_path / "text"
    no_program.write_text("text")
    no_program.chmod(0o600)
    for program, directory, error in (
        ("/no/such/program", Path("/"), FileNotFoundError),
        (str(no_program), Path("/"), PermissionError),
        (SHELL, tmp_path / "nowhere", FileNotFoundError),
    ):
        with pytest.raises(error):
            asyncio.run(scenario(program, directory))
    with pytest.raises(ValueError, match="zero byte"):
        program_start.start(b"/bin/true", [b"a\0b"], [], b"/", (2, 2, 2), None, 0)
    assert set(child_pids(os.getpid())) <= children, "a child that failed is left"


DYING = """
import asyncio, os, signal, sys
from pathlib import Path
from excimer.io.started_program import start_program

async def main():
    program = start_program(
        ["/bin/sleep", "60"],
        environment={},
        directory=Path(sys.argv[1]),
        output=2,
        death_signal=signal.SIGQUIT,
    )
    print(program.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_it_dies_with_us() -> None:
    with reachable_directory() as directory:
        told = subprocess.run(
            [sys.executable, "-c", DYING, str(directory)], stdout=subprocess.PIPE, check=False, timeout=30
        )
        assert told.returncode == -signal.SIGKILL
        pid = int(told.stdout)
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            assert poll.poll(10_000), "it outlives us"
            os.close(ended)
