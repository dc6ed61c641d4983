"""One running postgres: start it, know when it is ready, stop it, find one that was left behind.

Readiness is read from postmaster.pid, which costs nothing; connecting to ask would fork a backend
and log an error each time.
"""

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from excimer.base.errors import RefusedError, RetryableError
from excimer.compute.activity_sampler import child_pids
from excimer.compute.stop_progress import (
    ON_ITS_OWN,
    STILL_S,
    AroundStop,
    StopProgress,
    StopSigns,
    checkpointer_work,
)
from excimer.io.processes import describe_exit
from excimer.io.started_program import StartedProgram, start_program
from excimer.pgformat.auto_conf import AUTO_CONF_NAME
from excimer.service.log_files import open_log
from excimer.service.logs import get_logger

FIRST_UNPRIVILEGED_PORT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
USUAL_FIRST_UNPRIVILEGED_PORT = 1024
START_TIMEOUT_S = 60.0
RECEIVERS_TIMEOUT_S = 1.5
"""Of a fast shutdown: how long readers of WAL may take what is left. PostgreSQL waits for the slowest."""
SMART_STOP_TIMEOUT_S = 3.0
LOG_READ_SIZE_BYTES = 1 << 16
_READY_POLL_S = 0.002
_STOP_POLL_S = 0.25
_KILL_ROUNDS = 500
_KILL_POLL_S = 0.01
_STATUS_LINE = 7
_SHARED_MEMORY_LINE = 6
_IPC_RMID = 0

_WALSENDER = re.compile(rb"postgres: (?:.*: )?walsender ")

_libc = ctypes.CDLL(None)

log = get_logger(__name__)


class ReservedPortError(RefusedError):
    """PostgreSQL's port is one that only root may listen on, and PostgreSQL never runs as root."""


class PostgresStartError(RetryableError):
    """postgres did not come up."""


def check_port(port: int) -> None:
    """Raises `ReservedPortError`. That we ourselves may listen there as root says nothing of PostgreSQL."""
    try:
        first_free = int(FIRST_UNPRIVILEGED_PORT.read_text())
    except (OSError, ValueError):
        first_free = USUAL_FIRST_UNPRIVILEGED_PORT
    if port < first_free:
        raise ReservedPortError(
            f"PostgreSQL cannot listen on port {port}, "
            f"which is reserved for root: choose one from {first_free} on"
        )


class PostgresProcess:
    """A postmaster that dies with its manager."""

    def __init__(self, process: StartedProgram, data_dir: Path, log_path: Path, log_start_bytes: int) -> None:
        self._process = process
        self._data_dir = data_dir
        self._log_path = log_path
        self._log_start_bytes = log_start_bytes

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.returncode

    @classmethod
    def start(
        cls,
        postgres: Path,
        data_dir: Path,
        environment: Mapping[str, str],
        log_path: Path,
        options: Sequence[str] = (),
    ) -> "PostgresProcess":
        """Launches postgres as the unprivileged user; `wait_ready` says when it serves."""
        with os.fdopen(open_log(log_path), "ab") as file:
            log_start_bytes = file.tell()
            process = start_program(
                [postgres, "-D", data_dir, *options],
                environment=environment,
                directory=data_dir,
                output=file.fileno(),
                death_signal=signal.SIGQUIT,
            )
        return cls(process, data_dir, log_path, log_start_bytes)

    async def wait_ready(self) -> None:
        """Until clients can connect. Raises `PostgresStartError` if postgres exits or takes too long."""
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not self._is_ready():
            if self._process.returncode is not None:
                status = self._process.returncode
                raise PostgresStartError(f"postgres {describe_exit(status)} at start{self._fatal()}")
            if asyncio.get_running_loop().time() > deadline:
                raise PostgresStartError(f"postgres was not ready after {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(_READY_POLL_S)

    async def wait_exit(self) -> int:
        """Its exit status; negative for a signal, as in `subprocess`."""
        return await self._process.wait()

    def reload(self) -> None:
        """Makes it read its configuration, pg_hba.conf and certificate again."""
        self._signal(signal.SIGHUP)

    async def let_leave(self) -> None:
        """A smart shutdown, for one that nobody uses and nobody can begin to use. `stop` it then.

        Who is still at the door hears SQLSTATE 57P03; a fast shutdown would disconnect it without a word.
        """
        if self._signal(signal.SIGTERM):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), SMART_STOP_TIMEOUT_S)

    async def stop(self, around: AroundStop = ON_ITS_OWN) -> None:
        """A fast shutdown, for as long as it gets on (`stop_progress`); then a `kill`.

        A reader of WAL that is slow, or gone without a word, would hold the checkpoint up, and a kill cost
        what the stop keeps. So readers other than our own walsender are disconnected in time.
        """
        if self._signal(signal.SIGINT):
            started_s = time.monotonic()
            progress = StopProgress(started_s)
            is_alone = False
            while not await self._has_ended(_STOP_POLL_S):
                now_s = time.monotonic()
                if not is_alone and now_s - started_s >= RECEIVERS_TIMEOUT_S:
                    self._disconnect_receivers(around.own_walsender())
                    is_alone = True
                if not progress.may_go_on(self._stop_signs(around), now_s):
                    log.warning("postgres does not get on with its shutdown, and is killed", still_s=STILL_S)
                    break
                around.beat.move(progress.moved_s)
        await self.kill()

    def _stop_signs(self, around: AroundStop) -> StopSigns:
        children = child_pids(self._process.pid)
        return StopSigns(len(children), checkpointer_work(children), *around.quorum())

    async def kill(self) -> None:
        """Ends it, and whatever else runs in its directory, if it has not ended already."""
        if self._signal(signal.SIGQUIT):
            try:
                await asyncio.wait_for(self._process.wait(), 1.0)
            except TimeoutError:
                self._signal(signal.SIGKILL)
                await self._process.wait()
        await kill_left_behind(self._data_dir)

    def log_lines(self) -> list[str]:
        """The first lines that it wrote; none if they cannot be read."""
        try:
            with self._log_path.open("rb") as file:
                file.seek(self._log_start_bytes)
                return file.read(LOG_READ_SIZE_BYTES).decode(errors="replace").splitlines()
        except OSError:
            return []

    async def _has_ended(self, wait_s: float) -> bool:
        try:
            await asyncio.wait_for(self._process.wait(), wait_s)
        except TimeoutError:
            return False
        return True

    def _disconnect_receivers(self, own_walsender: int | None) -> None:
        """Those that do not take what they are sent: PostgreSQL's own time limit, made short, ends them.

        SIGTERM would not: it has them say goodbye first, to somebody who does not listen.
        """
        if own_walsender is None:  # which one is ours cannot be told, and our WAL must arrive
            return
        with contextlib.suppress(OSError), (self._data_dir / AUTO_CONF_NAME).open("a") as settings:
            settings.write("\nwal_sender_timeout = 500ms\n")  # the next start writes the file anew
        for pid in child_pids(self._process.pid) - {own_walsender}:
            with contextlib.suppress(OSError):
                if _WALSENDER.match(Path(f"/proc/{pid}/cmdline").read_bytes()):
                    os.kill(pid, signal.SIGHUP)
                    log.warning("a reader of WAL holds up the stop, and is disconnected", pid=pid)

    def _signal(self, number: int) -> bool:
        if self._process.returncode is not None:
            return False
        self._process.send_signal(number)
        return True

    def _fatal(self) -> str:
        """What it said when it gave up, as the end of a sentence; may be nothing."""
        found = [line for line in self.log_lines() if " FATAL: " in line or " PANIC: " in line]
        return f": {found[-1].partition(': ')[2].strip()}" if found else ""

    def _is_ready(self) -> bool:
        try:
            lines = (self._data_dir / "postmaster.pid").read_text().split("\n")
        except OSError:
            return False
        if len(lines) <= _STATUS_LINE or lines[0] != str(self._process.pid):
            return False
        return lines[_STATUS_LINE].strip() in ("ready", "standby")


async def kill_left_behind(data_dir: Path) -> None:
    """Kills every process that runs in `data_dir` and waits until it is gone.

    Backends outlive a killed postmaster for a moment, and a killed manager may leave a whole
    postgres; either would go on writing into a directory that is about to be removed. They are
    found by their working directory: each backend is its own session, and pids are reused. The kernel
    names that directory without links, and marks one that somebody has removed already.
    """
    directory = os.path.realpath(data_dir)  # noqa: ASYNC240 - as quick as reading /proc
    for _ in range(_KILL_ROUNDS):
        remaining = [pid for pid in _pids() if _runs_in(pid, directory)]
        if not remaining:
            _release_shared_memory(data_dir)
            return
        for pid in remaining:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        await asyncio.sleep(_KILL_POLL_S)
    raise PostgresStartError(f"processes {remaining} in {data_dir} cannot be killed")


def _release_shared_memory(data_dir: Path) -> None:
    """Removes the System V segment that a killed postmaster left; nobody else would.

    Its id is the second number of the seventh line of postmaster.pid. A segment that some other
    program has made meanwhile under the same id is not ours to remove, and the kernel refuses it
    unless we are root; so only one that nobody is attached to, of the postmaster's user, goes.
    """
    try:
        status = (data_dir / "postmaster.pid").read_text().split("\n")[_SHARED_MEMORY_LINE].split()
        key, segment = int(status[0]), int(status[1])
        owner = data_dir.stat().st_uid
        listed = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    except (OSError, ValueError, IndexError):
        return
    for row in listed:
        is_ours = (int(row[0]) & 0xFFFFFFFF, int(row[1])) == (key & 0xFFFFFFFF, segment)
        if is_ours and int(row[6]) == 0 and int(row[7]) == owner:
            _libc.shmctl(segment, _IPC_RMID, None)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _runs_in(pid: int, directory: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)") == directory
    except OSError:
        return False
