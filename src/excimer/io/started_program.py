"""A program that the event loop has started and watches, for starts that somebody waits for.

asyncio's own way forks this whole process, because the user is changed and something is done before the
program runs; `_native.program_start` does that without a copy of our memory.

Not here: programs whose output is wanted, or that nobody waits for (`processes`).
"""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from excimer._native import program_start
from excimer.io.processes import unprivileged_user


class StartedProgram:
    """To be made on the event loop, by `start_program`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """As `subprocess` has it: negative for a signal; None while it runs."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        self._loop.add_reader(self._pidfd, self._reap)

    async def wait(self) -> int:
        """Its `returncode`; any number may wait, and cease to."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        os.close(self._pidfd)
        self._ended.set_result(self.returncode)


def start_program(
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str],
    directory: Path,
    output: int,
    death_signal: int,
) -> StartedProgram:
    """As the unprivileged user, in a session of its own, with nothing to read. `output` takes what it writes.

    The kernel sends it `death_signal` when the thread that called this ends, however that happens. Blocks for
    a millisecond, until the program is executed. Raises OSError.
    """
    user = unprivileged_user()
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pid = program_start.start(
            os.fsencode(arguments[0]),
            [os.fsencode(argument) for argument in arguments],
            [os.fsencode(f"{name}={value}") for name, value in environment.items()],
            os.fsencode(directory),
            (nothing, output, output),
            None if user is None else (user.uid, user.gid, user.groups),
            death_signal,
        )
    finally:
        os.close(nothing)
    return StartedProgram(pid)
