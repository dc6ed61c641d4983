"""Detached processes of a local installation: start what does not run, wait until well, stop.

The supervisor starts them (`supervision`), so that they share memory and come back when they die. Who is who
is in `service.process_records`.

Starting is idempotent. Two commands do not start or stop at the same time (`run/cli.lock`), but they may
wait at the same time until what they started is well.
"""

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec

from excimer.base.errors import RetryableError
from excimer.cli.errors import BusyError, ProcessFailedError
from excimer.cli.installation import (
    Installation,
    Part,
    endpoint_part_name,
    load_installation,
    make_directories,
    renew_certificates,
)
from excimer.cli.supervision import (
    SUPERVISOR,
    ask_supervisor,
    log_path,
    part_states,
    program_path_environment,
    supervisor_lock_dir,
)
from excimer.compute.places import STOP_BEAT_NAME
from excimer.io.private_files import touch_private
from excimer.service import process_records
from excimer.service.health import HTTP_OK
from excimer.service.log_lines import last_error
from excimer.service.process_records import ProcessRecord, is_halted, record_path, settings_path
from excimer.service.settings import save_settings
from excimer.supervisor.protocol import Started, StartPart

START_LIMIT_S: Final = 60.0
STOP_LIMIT_S: Final = 10.0
ENDPOINT_STOP_LIMIT_S: Final = 14.0
"""A manager ends by itself, hard if need be, 11 s after its stop has last got on."""

HALTED_LIMIT_S: Final = 1.0
"""How long a process that somebody has stopped (SIGSTOP) is waited for: it cannot end by itself."""
KILL_LIMIT_S: Final = 10.0
POLL_S: Final = 0.02
BUSY_LIMIT_S: Final = 90.0
PROBE_TIMEOUT_S: Final = 2.0


class HealthTimeoutError(RetryableError):
    """A process runs but does not become well in time."""


class LaunchedProcess(NamedTuple):
    pid: int
    log_start: int
    """Where in the part's log the words of this process begin."""


Launched: TypeAlias = dict[str, LaunchedProcess]


class HealthAnswer(msgspec.Struct, frozen=True):
    """What of `/healthz` is used here."""

    pid: int
    problems: dict[str, str] = {}
    warnings: dict[str, str] = {}
    settings: str = ""
    restart_pending: str = ""
    suspend_delay_s: int | None = None
    cache_size_mib: int | None = None
    cpu_milli: int | None = None
    memory_mib: int | None = None
    resource_limits: str = ""
    last_active_at: int | None = None
    awake_for: str = ""
    start: str = ""
    start_reason: str = ""
    replayed_lsn: str = ""
    lag_bytes: int | None = None


class Probed(NamedTuple):
    status: int
    """0 when nobody, or another process, answers."""
    warnings: list[str]
    """What is to be looked at: why a part is not well, and what is wrong although it does its work."""
    facts: dict[str, str]
    """What a compute says of its settings and its use: `excimer.compute.settings_keeper`, `idle_watch`."""


@contextlib.contextmanager
def exclusive(installation: Installation, note: Callable[[str], None]) -> Iterator[None]:
    """One command at a time starts and stops processes. Raises `BusyError` after `BUSY_LIMIT_S`."""
    make_directories(installation)
    with hold_lock(installation.run_dir / "cli.lock", note, BUSY_LIMIT_S):
        yield


@contextlib.contextmanager
def hold_lock(path: Path, note: Callable[[str], None], limit_s: float) -> Iterator[None]:
    """The lock of a file, which the system releases whatever happens to us. Raises `BusyError`."""
    touch_private(path)
    with open(path, "a") as file:
        deadline = time.monotonic() + limit_s
        is_noted = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BusyError(
                        "another excimer command works on this installation: try again"
                    ) from error
            if not is_noted:
                note("waiting for another excimer command on this installation …")
                is_noted = True
            time.sleep(POLL_S * 5)
        yield


def find_process(installation: Installation, part: str, lock_dir: Path) -> ProcessRecord | None:
    """The running process of a part, from its record or else from its instance lock."""
    return process_records.find_process(installation.run_dir, part, lock_dir)


def start_parts(
    installation: Installation,
    parts: Sequence[Part],
    started: Callable[[str, float], None],
    limit_s: float = START_LIMIT_S,
) -> list[str]:
    """`launch_parts`, then `wait_for_parts`: names of the started."""
    launched = launch_parts(installation, parts)
    wait_for_parts(installation, parts, launched, started, limit_s)
    return list(launched)


def launch_parts(installation: Installation, parts: Sequence[Part]) -> Launched:
    """Starts those that do not run, all at once; to be called in `exclusive`. Answers them by name.

    From then on all of them are watched. Raises as `ask_supervisor`.
    """
    make_directories(installation)
    launched = {part.name: _launch(installation, part) for part in parts}
    return {name: process for name, process in launched.items() if process is not None}


def wait_for_parts(
    installation: Installation,
    parts: Sequence[Part],
    launched: Launched,
    started: Callable[[str, float], None],
    limit_s: float = START_LIMIT_S,
) -> None:
    """Waits until all are well, whoever started them; other commands may work meanwhile.

    Calls `started` with name and time of each launched part as it becomes well. Raises
    `ProcessFailedError` or `HealthTimeoutError` with the end of a part's log; the others go on running.
    """
    begun = time.monotonic()
    waiting = list(parts)
    while waiting:
        for part in list(waiting):
            if _is_well(installation, part):
                waiting.remove(part)
                if part.name in launched:
                    started(part.name, time.monotonic() - begun)
            else:
                _check_progress(installation, part, launched.get(part.name), begun + limit_s)
        if waiting:
            time.sleep(POLL_S)


def refresh_machine(installation: Installation) -> None:
    """What endpoints take from this machine at their start is as the configuration now says; to be called in
    `exclusive`.
    """
    renew_certificates(installation)
    current = load_installation(installation.directory)
    if current.config.compute_node_http_port is not None:
        _save_settings(current, current.compute_node())


def _save_settings(installation: Installation, part: Part) -> None:
    save_settings(
        settings_path(installation.run_dir, part.name),
        msgspec.structs.replace(
            part.settings, log_path=log_path(installation, part.name), tls=installation.config.tls
        ),
        "Written by excimer at each start; changes are lost.",
    )


def _is_absent(installation: Installation, part: Part) -> bool:
    return find_process(installation, part.name, part.lock_dir) is None


def _is_well(installation: Installation, part: Part) -> bool:
    process = find_process(installation, part.name, part.lock_dir)
    return process is not None and probe(part.http_address, process.pid) == HTTP_OK


def _launch(installation: Installation, part: Part) -> LaunchedProcess | None:
    """Has the supervisor start a part that does not run, or watch one that does; None for the latter."""
    log = log_path(installation, part.name)
    if _is_absent(installation, part):
        _save_settings(installation, part)
    request = StartPart(
        part=part.name,
        module=part.module,
        lock_dir=part.lock_dir,
        log_path=log,
        environment=tuple(
            (os.fsencode(name), os.fsencode(value)) for name, value in program_path_environment().items()
        ),
        is_restarted=part.is_restarted,
    )
    answer = ask_supervisor(installation, request)
    if isinstance(answer, Started) and answer.is_new:
        return LaunchedProcess(answer.pid, answer.log_start)
    return None


def _check_progress(
    installation: Installation, part: Part, launched: LaunchedProcess | None, deadline: float
) -> None:
    """Raises when a part that is not well has ended and does not come back, or has had its time."""
    process = find_process(installation, part.name, part.lock_dir)
    state = None if process is not None else part_states(installation).get(part.name)
    comes_back = state is not None and (state.is_awaited or state.pid is not None)
    has_ended = process is None and not comes_back
    if not has_ended and time.monotonic() <= deadline:
        return
    problems = [] if has_ended else _own_words(installation, part)
    log_start = 0 if launched is None else launched.log_start
    reason = "; ".join(problems) or last_error(log_path(installation, part.name), log_start)
    said = f"{reason}; see `excimer logs {part.name}`"
    was_stopped = state is None or state.last_exit_code in (0, -signal.SIGTERM)
    if has_ended and launched is not None and was_stopped:
        raise ProcessFailedError(f"{part.name} was stopped while it started, perhaps by another command")
    how = f" ({state.last_end})" if state is not None and state.last_end else ""
    if has_ended:
        raise ProcessFailedError(f"{part.name} did not start{how}: {said}")
    if process is None:
        raise ProcessFailedError(f"{part.name} dies again and again{how}: {said}")
    raise HealthTimeoutError(f"{part.name} runs but does not become ready: {said}")


def _own_words(installation: Installation, part: Part) -> list[str]:
    """What a part that runs says is wrong with it: more to the point than the last line of its log."""
    process = find_process(installation, part.name, part.lock_dir)
    return [] if process is None else probe_health(part.http_address, process.pid).warnings


@dataclass(frozen=True, slots=True)
class Running:
    """What is to be stopped: a part's name, where its instance lock is, how long it may take.

    The time begins anew whenever the file `beat` in that directory changes.
    """

    part: str
    lock_dir: Path
    limit_s: float
    beat: str | None = None

    def read_beat(self) -> bytes:
        """What it says now; nothing if there is none."""
        if self.beat is None:
            return b""
        try:
            return (self.lock_dir / self.beat).read_bytes()
        except OSError:
            return b""


def running_endpoint(installation: Installation, name: str) -> Running:
    """An endpoint's manager, whose stop takes as long as PostgreSQL's last checkpoint."""
    directory = installation.endpoint_dir(name)
    return Running(endpoint_part_name(name), directory, ENDPOINT_STOP_LIMIT_S, STOP_BEAT_NAME)


def stop_parts(
    installation: Installation,
    parts: Sequence[Running],
    stopped: Callable[[str, float], None],
    *,
    immediate: bool,
) -> list[str]:
    """Stops parts at once: SIGTERM, SIGKILL after their limits (from the start if `immediate`).

    Calls `stopped` with a part's name and time; answers the names of those that ran. Raises
    `ProcessFailedError` for a process that not even SIGKILL ends.
    """
    begun = time.monotonic()
    found = [(each, find_process(installation, each.part, each.lock_dir)) for each in parts]
    running = [_Ending(each, record, begun) for each, record in found if record is not None]
    for each in running:
        _signal(each.record, signal.SIGKILL if immediate else signal.SIGTERM)
    left = list(running)
    while left:
        for each in list(left):
            if each.look():
                left.remove(each)
                stopped(f"{each.part.part} stopped", time.monotonic() - begun)
        if left:
            time.sleep(POLL_S)
    for part in parts:
        record_path(installation.run_dir, part.part).unlink(missing_ok=True)
    return [each.part.part for each in running]


class _Ending:
    """A process that has been told to end."""

    def __init__(self, part: Running, record: ProcessRecord, begun_s: float) -> None:
        self.part = part
        self.record = record
        self._beat = part.read_beat()
        self._deadline_s = begun_s + part.limit_s
        self._halted_until_s = begun_s + HALTED_LIMIT_S
        self._is_killed = False

    def look(self) -> bool:
        """Whether it is gone; kills it if its time is over. Raises `ProcessFailedError`."""
        if not self.record.is_alive():
            return True
        now_s = time.monotonic()
        if (beat := self.part.read_beat()) != self._beat and not self._is_killed:
            self._beat, self._deadline_s = beat, now_s + self.part.limit_s
        is_halted_long = now_s > self._halted_until_s and is_halted(self.record.pid)
        if now_s <= self._deadline_s and (self._is_killed or not is_halted_long):
            return False
        if self._is_killed:
            raise ProcessFailedError(f"{self.part.part} (process {self.record.pid}) cannot be stopped")
        _signal(self.record, signal.SIGKILL)
        self._is_killed, self._deadline_s = True, now_s + KILL_LIMIT_S
        return False


def stop_supervisor(installation: Installation, *, immediate: bool) -> None:
    """Before services are stopped, for it would start them again. Raises as `stop_parts`."""
    supervisor = Running(SUPERVISOR, supervisor_lock_dir(installation.run_dir), STOP_LIMIT_S)
    stop_parts(installation, [supervisor], lambda *_: None, immediate=immediate)


def _signal(record: ProcessRecord, number: signal.Signals) -> None:
    if record.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)


def probe(http_address: str, pid: int | None, limit_s: float = PROBE_TIMEOUT_S) -> int:
    """The status that `/healthz` of process `pid` answers; 0 when nobody, or another process, answers."""
    return probe_health(http_address, pid, limit_s).status


def probe_health(http_address: str, pid: int | None, limit_s: float = PROBE_TIMEOUT_S) -> Probed:
    """The same, with its warnings."""
    import http.client

    from excimer.service.blocking_http import http_connection

    connection = http_connection(http_address, limit_s)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        body = msgspec.json.decode(answer.read(), type=HealthAnswer)
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return Probed(0, [], {})
    finally:
        connection.close()
    if body.pid != pid:
        return Probed(0, [], {})
    return Probed(
        answer.status,
        [f"{about}: {problem}" for about, problem in sorted(body.problems.items())]
        + [f"{about} is {warning}" for about, warning in sorted(body.warnings.items())],
        {
            "settings": body.settings,
            "restart_pending": body.restart_pending,
            "suspend_delay_s": "" if body.suspend_delay_s is None else str(body.suspend_delay_s),
            "cache_size_mib": "" if body.cache_size_mib is None else str(body.cache_size_mib),
            "cpu_milli": "" if body.cpu_milli is None else str(body.cpu_milli),
            "memory_mib": "" if body.memory_mib is None else str(body.memory_mib),
            "resource_limits": body.resource_limits,
            "last_active_at": "" if body.last_active_at is None else str(body.last_active_at),
            "awake_for": body.awake_for,
            "start": body.start,
            "start_reason": body.start_reason,
            "replayed_lsn": body.replayed_lsn,
            "lag_bytes": "" if body.lag_bytes is None else str(body.lag_bytes),
        },
    )
