"""One manager that runs: forked here, or found running by a node that came back.

::

    launch --> starting --ready--> ready --not ready--> starting again (its postgres crashed)
                   '-----------------'---------------> ended

A manager reports through a pipe when its PostgreSQL begins and ceases to accept connections. One that was
found has another node's pipe, and is asked (`/healthz`) instead.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from excimer.base.errors import RefusedError, RetryableError
from excimer.compute.__main__ import run_manager
from excimer.compute.places import STOP_BEAT_NAME
from excimer.compute.settings import ComputeSettings
from excimer.compute_node.forks import ProcessWatch, fork, watch_reports
from excimer.compute_node.manager_settings import part_name
from excimer.io.private_files import make_private_dir
from excimer.io.processes import describe_exit, hide_memory
from excimer.service.health import HTTP_OK
from excimer.service.http_client import HttpClient, UnreachableError
from excimer.service.log_lines import last_error
from excimer.service.logs import get_logger
from excimer.service.process_records import (
    find_process,
    is_halted,
    record_path,
    settings_path,
    write_record,
)
from excimer.service.settings import SettingsError, load_settings, save_settings
from excimer.wire.compute_limits import ComputeLimits
from excimer.wire.endpoint_tokens import EndpointTokens

STOP_LIMIT_S: Final = 14.0
"""A manager ends by itself, hard if need be, 11 s after its stop has last got on."""
HALTED_LIMIT_S: Final = 1.0
"""How long a process that somebody has stopped (SIGSTOP) is waited for: it cannot end by itself."""
BEAT_INTERVAL_S: Final = 0.5
"""How often it is looked whether a stop gets on."""
KILL_LIMIT_S: Final = 10.0
ASK_LIMIT_S: Final = 2.0
ASK_INTERVAL_S: Final = 0.05
SETTINGS_COMMENT: Final = "Written by the compute node at each start; changes are lost."
READY: Final = b"r"
NOT_READY: Final = b"n"
STOPPED: Final = (0, -signal.SIGTERM)

log = get_logger(__name__)


class EndpointFailedError(RefusedError):
    """A manager ended before its PostgreSQL accepted connections."""


class EndpointSlowError(RetryableError):
    """A manager runs, and its PostgreSQL does not accept connections in time."""


class EndpointStuckError(RetryableError):
    """Not even SIGKILL ends a manager."""


class HealthAnswer(msgspec.Struct, frozen=True):
    """What of `/healthz` is used here."""

    pid: int
    problems: dict[str, str] = {}


class ManagerProcess:
    """To be made on the event loop, by `launch` or `find`."""

    def __init__(
        self, settings: ComputeSettings, pid: int, *, reports: int | None, log_start: int = 0
    ) -> None:
        self.settings = settings
        self.pid = pid
        self.log_start = log_start
        self.exit_code: int | None = None
        self.has_ended = False
        self._is_adopted = reports is None
        self._is_ready = False
        self._changed = asyncio.Event()
        self.on_end: Callable[[ManagerProcess], None] = lambda _: None
        self._watch = ProcessWatch(pid, self._ended)
        if reports is not None:
            watch_reports(reports, self._reported)

    @property
    def name(self) -> str:
        """Of the endpoint."""
        return self.settings.endpoint_name

    @property
    def part(self) -> str:
        return part_name(self.name)

    @property
    def generation(self) -> int:
        return self.settings.generation

    @classmethod
    def launch(
        cls, settings: ComputeSettings, run_dir: Path, tokens: EndpointTokens, join: Callable[[], None]
    ) -> "ManagerProcess":
        """Forks it; `join` is called in the fork before anything else, and may raise to end it. Raises
        OSError, `ForkUnsafeError`.
        """
        part = part_name(settings.endpoint_name)
        path = settings_path(run_dir, part)
        assert settings.log_path is not None
        make_private_dir(settings.endpoint_dir, passable=True)
        save_settings(path, settings, SETTINGS_COMMENT)
        work = partial(_run, path, tokens, join)
        started = fork(part, ["-m", "excimer.compute", str(path)], settings.log_path, work)
        try:
            write_record(run_dir, part, started.pid)
        except OSError as error:  # a full disk: its instance lock leads to it
            log.warning("started and not recorded", part=part, pid=started.pid, error=error)
        log.info("manager started", endpoint=settings.endpoint_name, pid=started.pid)
        return cls(settings, started.pid, reports=started.reports, log_start=started.log_start)

    @classmethod
    def find(cls, run_dir: Path, endpoint_dir: Path) -> "ManagerProcess | None":
        """The one that runs in an endpoint's directory, by its record or its instance lock; or None."""
        part = part_name(endpoint_dir.name)
        running = find_process(run_dir, part, endpoint_dir)
        if running is None:
            return None
        try:
            settings = load_settings(settings_path(run_dir, part), ComputeSettings)
            found = cls(settings, running.pid, reports=None)
        except (SettingsError, ProcessLookupError) as error:
            log.warning("a running manager is left alone", part=part, pid=running.pid, error=error)
            return None
        log.info("watches a running manager", endpoint=found.name, pid=found.pid)
        return found

    def note_limits(self, run_dir: Path, limits: ComputeLimits) -> None:
        """For a node that comes back. Raises OSError."""
        self.settings = msgspec.structs.replace(self.settings, limits=limits)
        save_settings(settings_path(run_dir, self.part), self.settings, SETTINGS_COMMENT)

    # Its life

    def look(self) -> None:
        """Notices now if it has just died."""
        self._watch.look()

    def _reported(self, content: bytes) -> None:
        self._is_ready = content[-1:] == READY
        self._notify()

    def _ended(self, code: int | None) -> None:
        self.exit_code, self.has_ended, self._is_ready = code, True, False
        how = "ended" if code is None else describe_exit(code)
        (log.info if code in STOPPED else log.warning)(f"manager {how}", endpoint=self.name, pid=self.pid)
        self._notify()
        self.on_end(self)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_ready(self, deadline: float) -> bool:
        """True when PostgreSQL accepts connections, False when the manager has ended. `deadline` is of
        `time.monotonic`; raises TimeoutError.
        """
        async with asyncio.timeout(deadline - time.monotonic()):
            while not self._is_ready and not self.has_ended:
                if self._is_adopted and await self.ask() == []:
                    return True
                await self._wait_change(ASK_INTERVAL_S if self._is_adopted else None)
        return not self.has_ended

    async def wait_end(self, limit_s: float) -> bool:
        """Whether it has ended within `limit_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not self.has_ended:
                    await self._wait_change(None)
        return self.has_ended

    async def _wait_change(self, limit_s: float | None) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._changed.wait()
        except TimeoutError:
            if limit_s is None:
                raise

    async def ask(self) -> list[str] | None:
        """What it says is wrong with it, nothing if it serves; None: it does not answer."""
        client = HttpClient(self.part, self.settings.http_listen, timeout_s=ASK_LIMIT_S)
        try:
            status, body = await client.look("/healthz")
            answer = msgspec.json.decode(body, type=HealthAnswer)
        except (UnreachableError, msgspec.DecodeError):
            return None
        if answer.pid != self.pid:
            return None
        if status == HTTP_OK:
            return []
        return [f"{about}: {problem}" for about, problem in sorted(answer.problems.items())] or ["it starts"]

    async def stop(self, *, is_immediate: bool) -> None:
        """SIGTERM, and SIGKILL when it has not got on for its limit. Raises `EndpointStuckError`."""
        self.send_signal(signal.SIGKILL if is_immediate else signal.SIGTERM)
        if is_immediate or not await self._ends_by_itself():
            self.send_signal(signal.SIGKILL)
            if not await self.wait_end(KILL_LIMIT_S):
                raise EndpointStuckError(f"{self.part} (process {self.pid}) cannot be stopped")

    async def _ends_by_itself(self) -> bool:
        """Its stop takes as long as PostgreSQL's last checkpoint, while that gets on."""
        begun_s = moved_s = time.monotonic()
        beat = self._stop_beat()
        while not await self.wait_end(BEAT_INTERVAL_S):
            now_s = time.monotonic()
            if (newest := self._stop_beat()) != beat:
                beat, moved_s = newest, now_s
            is_halted_long = now_s - begun_s > HALTED_LIMIT_S and is_halted(self.pid)
            if is_halted_long or now_s - moved_s > STOP_LIMIT_S:
                return False
        return True

    def _stop_beat(self) -> bytes:
        try:
            return (self.settings.endpoint_dir / STOP_BEAT_NAME).read_bytes()
        except OSError:
            return b""

    def send_signal(self, number: signal.Signals) -> None:
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    # Words

    def failure(self) -> EndpointFailedError:
        """Why it ended before it was ready."""
        if self.exit_code in STOPPED:
            return EndpointFailedError(
                f"{self.part} was stopped while it started, perhaps by another command"
            )
        how = "" if self.exit_code is None else f" ({describe_exit(self.exit_code)})"
        return EndpointFailedError(f"{self.part} did not start{how}: {self._last_words()}")

    async def slowness(self) -> EndpointSlowError:
        """For what it waits."""
        problems = await self.ask() or []
        said = f"{'; '.join(problems)}; see `excimer logs {self.part}`" if problems else self._last_words()
        return EndpointSlowError(f"{self.part} runs but does not become ready: {said}")

    def _last_words(self) -> str:
        assert self.settings.log_path is not None
        reason = last_error(self.settings.log_path, self.log_start)
        return f"{reason}; see `excimer logs {self.part}`"


def forget_record(run_dir: Path, part: str) -> None:
    record_path(run_dir, part).unlink(missing_ok=True)


def _run(path: Path, tokens: EndpointTokens, join: Callable[[], None], reports: int) -> int:
    join()
    hide_memory()
    return run_manager(path, tokens, partial(_report, reports))


def _report(descriptor: int, is_ready: bool) -> None:
    with contextlib.suppress(OSError):  # the node has died: another one asks
        os.write(descriptor, READY if is_ready else NOT_READY)
