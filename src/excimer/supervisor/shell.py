"""The supervisor's loop: one thread, no event loop, so that it can fork at any moment.

It waits for a request, for the end of a child, and for the moment of the next restart. In a child that it
forks, `supervise` returns too, with what that is to run: lock, socket and selector are left on the way out,
as the supervisor itself leaves them.

Not here: when something is restarted (`restart_plan`).
"""

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, assert_never

import msgspec

from excimer.io.processes import describe_exit
from excimer.service.forked_process import FORK_SIGNALS, forking
from excimer.service.instance_lock import InstanceLock
from excimer.service.log_files import open_log, rotate
from excimer.service.logs import get_logger
from excimer.service.process_records import find_process, write_record
from excimer.supervisor.child import Launched, become, launch_of
from excimer.supervisor.preload import preload
from excimer.supervisor.protocol import (
    SOCKET_NAME,
    Answer,
    Failed,
    ForgetPart,
    Parts,
    ReadParts,
    Request,
    Started,
    StartPart,
    receive,
    socket_address,
)
from excimer.supervisor.restart_plan import STOPPED, Leave, Life, Restart, plan_restart
from excimer.supervisor.settings import SupervisorSettings
from excimer.supervisor.watched import Watched

LOCK_DIR_NAME: Final = "supervisor"
CLIENT_LIMIT_S: Final = 2.0
"""For a client that was halted in the middle of its request; meanwhile nobody else is served."""
ADOPTED_POLL_S: Final = 0.5
"""How often those are looked at that are not our children: we do not hear of their end."""
QUIET_S: Final = 10.0
BACKLOG: Final = 64
OWN_MODULES: Final = "excimer."
ENDED_KEPT_S: Final = 600.0

log = get_logger(__name__)


def supervise(settings: SupervisorSettings) -> Launched | None:
    """Serves until SIGTERM, then None. In a forked service: what that is to run.

    Raises `AlreadyRunningError`, OSError; and as `preload`, at the first start of a service.
    """
    with (
        InstanceLock(settings.run_dir / LOCK_DIR_NAME, "supervisor"),
        _listening(settings.run_dir) as listening,  # from here on clients wait rather than fail
        _signals_as_bytes() as signals,
        selectors.DefaultSelector() as selector,
    ):
        selector.register(listening, selectors.EVENT_READ)
        selector.register(signals, selectors.EVENT_READ)
        log.info("supervisor ready", run_dir=str(settings.run_dir))
        return Supervisor(settings, listening, signals, selector).run()


@contextlib.contextmanager
def _listening(run_dir: Path) -> Iterator[socket.socket]:
    """We hold the lock, so a socket that is there is nobody's."""
    (run_dir / SOCKET_NAME).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        with socket_address(run_dir) as address:
            listening.bind(address)
        os.chmod(run_dir / SOCKET_NAME, 0o600)
        listening.listen(BACKLOG)
        yield listening


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[socket.socket]:
    """A socket with the number of each of our signals as a byte; a fork takes its signals back itself."""
    reading, writing = socket.socketpair()
    with reading, writing:
        reading.setblocking(False)
        writing.setblocking(False)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        for number in FORK_SIGNALS:
            signal.signal(number, lambda *_: None)
        yield reading


class Supervisor:
    def __init__(
        self,
        settings: SupervisorSettings,
        listening: socket.socket,
        signals: socket.socket,
        selector: selectors.BaseSelector,
    ) -> None:
        self._settings = settings
        self._listening = listening
        self._signals = signals
        self._selector = selector
        self._watched: dict[str, Watched] = {}
        self._in_fork: Launched | None = None

    def run(self) -> Launched | None:
        """Until SIGTERM, or until the installation's directory is gone."""
        while self._in_fork is None:
            ready = {key.fileobj for key, _ in self._selector.select(self._wait_s())}
            if self._signals in ready and signal.SIGTERM in self._signals.recv(256):
                log.info("supervisor stops; services go on", parts=len(self._watched))
                (self._settings.run_dir / SOCKET_NAME).unlink(missing_ok=True)
                return None
            self._look_at_processes()
            self._restart_due()
            if self._in_fork is None and self._listening in ready:
                self._serve()
            if self._in_fork is None and not self._keep_log_short():
                return None
        return self._in_fork

    def _wait_s(self) -> float:
        now = time.monotonic()
        waits = [watched.restart_at - now for watched in self._watched.values() if watched.restart_at]
        if any(watched.is_adopted for watched in self._watched.values()):
            waits.append(ADOPTED_POLL_S)
        return max(0.0, min([QUIET_S, *waits]))

    def _keep_log_short(self) -> bool:
        """False when the installation was removed under us."""
        if not self._settings.run_dir.exists():
            return False
        if self._settings.log_path is not None:
            with contextlib.suppress(OSError):  # a full disk: there is nowhere to say so
                rotate(self._settings.log_path)
        return True

    # Requests

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        with connection:
            try:
                request = receive(connection, CLIENT_LIMIT_S)
            except (OSError, msgspec.DecodeError) as error:
                log.warning("a request was not understood", error=error)
                return
            answer = self._answer(request)
            if answer is None:
                return  # we are the fork
            connection.settimeout(CLIENT_LIMIT_S)
            with contextlib.suppress(OSError):  # it was interrupted: what it wanted is done
                connection.sendall(msgspec.json.encode(answer))

    def _answer(self, request: Request) -> Answer | None:
        """None in a fork."""
        match request:
            case StartPart():
                return self._start(request)
            case ForgetPart():
                self._watched.pop(request.part, None)
                return self._states()
            case ReadParts():
                return self._states()
            case _ as never:
                assert_never(never)

    def _states(self) -> Parts:
        return Parts(parts={name: watched.state() for name, watched in self._watched.items()})

    def _start(self, request: StartPart) -> Answer | None:
        known = self._watched.get(request.part)
        running = find_process(self._settings.run_dir, request.part, request.lock_dir)
        if running is not None:
            if known is None or known.record != running:
                log.info("watches a running process", part=request.part, pid=running.pid)
                self._watched[request.part] = Watched(request, running, is_adopted=True)
            return Started(pid=running.pid, is_new=False, log_start=0)
        self._forget_long_ended()
        watched = self._watched[request.part] = Watched(request, None)
        try:
            return self._launch(watched)
        except OSError as error:
            del self._watched[request.part]
            return Failed(reason=f"{request.part} cannot be started: {error}")

    def _forget_long_ended(self) -> None:
        """Nobody asks any more how they ended."""
        limit = time.monotonic() - ENDED_KEPT_S
        for name, watched in list(self._watched.items()):
            if watched.ended_at is not None and watched.restart_at is None and watched.ended_at < limit:
                del self._watched[name]

    # Processes

    def _launch(self, watched: Watched) -> Started | None:
        """Forks it; None in the fork. Raises OSError."""
        start = watched.start
        if start.module.startswith(OWN_MODULES):
            preload()
        rotate(start.log_path)
        log_file = open_log(start.log_path)
        try:
            log_start = os.lseek(log_file, 0, os.SEEK_END)
            with forking():
                pid = os.fork()
                if pid == 0:
                    self._in_fork = launch_of(start, self._settings)
                    become(self._in_fork, start.environment, log_file)
                    return None
                watched.launched(pid, time.monotonic())
                self._record(watched, pid)
        finally:
            if self._in_fork is None:
                os.close(log_file)
        log.info("started", part=start.part, pid=pid)
        return Started(pid=pid, is_new=True, log_start=log_start)

    def _record(self, watched: Watched, pid: int) -> None:
        """On a full disk there is no record; the process runs, and its instance lock leads to it."""
        try:
            watched.record = write_record(self._settings.run_dir, watched.start.part, pid)
        except OSError as error:
            log.warning("started and not recorded", part=watched.start.part, pid=pid, error=error)

    def _look_at_processes(self) -> None:
        """Notices who has ended."""
        codes: dict[int, int] = {}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                codes[pid] = os.waitstatus_to_exitcode(status)
        for watched in list(self._watched.values()):
            if watched.pid in codes:
                self._ended(watched, codes[watched.pid])
            elif watched.is_adopted and watched.record is not None and not watched.record.is_alive():
                self._ended(watched, None)

    def _ended(self, watched: Watched, code: int | None) -> None:
        now = time.monotonic()
        part = watched.start.part
        how = "ended" if code is None else describe_exit(code)
        life = Life(now - watched.started_at, code, is_restart=watched.restarts > 0)
        plan = (
            plan_restart(life, watched.failures) if watched.start.is_restarted else Leave(code not in STOPPED)
        )
        watched.ended(how, code, now)
        match plan:
            case Leave():
                (log.warning if plan.is_failure else log.info)(f"{part} {how}", part=part)
            case Restart():
                watched.restart_at, watched.failures = now + plan.wait_s, plan.failures
                log.warning(f"{part} {how}, will restart", part=part, wait_s=plan.wait_s)
            case _ as never:
                assert_never(never)

    def _restart_due(self) -> None:
        """At most one in a fork: there the rest is not ours to start."""
        now = time.monotonic()
        for watched in list(self._watched.values()):
            if watched.restart_at is None or watched.restart_at > now:
                continue
            start = watched.start
            running = find_process(self._settings.run_dir, start.part, start.lock_dir)
            if running is not None:  # somebody else was faster
                watched.adopted(running)
                continue
            try:
                watched.restarts += 1
                self._launch(watched)
            except OSError as error:
                watched.restart_at = now + QUIET_S
                log.warning("cannot be started", part=start.part, error=error)
            if self._in_fork is not None:
                return
