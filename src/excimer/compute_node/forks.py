"""Forks of the node, and hearing of their end and of what they report.

A fork has the node's memory, and nothing else of it: a session, standard streams and a name of its own, none
of its descriptors, no event loop. It never comes back from `fork`. The node has one thread, so that a fork
finds every lock free.

Reports come through a pipe, byte by byte; the end comes through a pidfd, of processes that are not our
children too.
"""

import asyncio
import atexit
import contextlib
import gc
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Never

from excimer.base.errors import RetryableError
from excimer.service.forked_process import close_all_but, forking, leave_parent
from excimer.service.log_files import open_log, rotate
from excimer.service.logs import TIMER_NAME, get_logger
from excimer.service.process_main import EXIT_CRASHED

REPORT_SIZE_BYTES: Final = 64

log = get_logger(__name__)


class ForkUnsafeError(RetryableError):
    """The node has a thread, which a fork would lack."""


class Fork(NamedTuple):
    pid: int
    reports: int
    """A descriptor that is ours to close."""
    log_start: int
    """Where in its log its words begin."""


def fork(name: str, arguments: Sequence[str], log_path: Path, work: Callable[[int], int]) -> Fork:
    """Runs `work` in a fork that shows as `name` with `arguments`, and ends with the exit code it returns.

    `work` gets the descriptor on which it may report. Raises OSError, `ForkUnsafeError`.
    """
    threads = [each.name for each in threading.enumerate() if each.name != TIMER_NAME]
    if len(threads) > 1:
        raise ForkUnsafeError(f"the node has threads: {', '.join(threads)}")
    rotate(log_path)
    output = open_log(log_path)
    reading, writing = os.pipe()
    try:
        log_start = os.lseek(output, 0, os.SEEK_END)
        with forking():
            pid = os.fork()
            if pid == 0:
                _live(name, arguments, output, writing, work)
    except OSError:
        os.close(reading)
        raise
    finally:
        os.close(output)
        os.close(writing)
    os.set_blocking(reading, False)
    return Fork(pid, reading, log_start)


def _live(
    name: str, arguments: Sequence[str], output: int, writing: int, work: Callable[[int], int]
) -> Never:
    """A fork's whole life. What the node has is left where it is: its objects hold closed descriptors."""
    code = EXIT_CRASHED
    try:
        asyncio._set_running_loop(None)
        leave_parent(name, arguments, output=output)
        close_all_but(writing)
        gc.freeze()
        code = work(writing)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        with contextlib.suppress(OSError, ValueError):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class ProcessWatch:
    """Hears of the end of one process, a child of ours or not. To be made on the event loop."""

    def __init__(self, pid: int, ended: Callable[[int | None], None]) -> None:
        """`ended` is called once, with the exit code as `subprocess` has it, None if that cannot be known.

        Raises ProcessLookupError.
        """
        self._pid = pid
        self._ended = ended
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._over)

    def look(self) -> None:
        """Notices now an end that the event loop has not come to yet."""
        if self._pidfd >= 0 and _is_readable(self._pidfd):
            self._over()

    def _over(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        code = None
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(self._pid, 0)
            code = os.waitstatus_to_exitcode(status)
        self._ended(code)


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()  # select(2) knows descriptors below 1024 only
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def watch_reports(descriptor: int, reported: Callable[[bytes], None]) -> None:
    """Calls `reported` with what comes, until the other end is closed; then closes ours."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            content = os.read(descriptor, REPORT_SIZE_BYTES)
        except BlockingIOError:
            return
        if content:
            reported(content)
            return
        loop.remove_reader(descriptor)
        os.close(descriptor)

    loop.add_reader(descriptor, read)


async def run_in_fork(name: str, log_path: Path, work: Callable[[], None]) -> bool:
    """Work that would block the event loop; whether it came to its end. Its errors are in the log."""

    def run(_: int) -> int:
        work()
        return 0

    started = fork(name, ["-m", "excimer.compute_node", name], log_path, run)
    os.close(started.reports)
    over: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
    ProcessWatch(started.pid, over.set_result)
    return await asyncio.shield(over) == 0
