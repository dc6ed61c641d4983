"""Detached processes of a local installation: start what does not run, wait until well, stop.

Who is who: a pid alone may belong to somebody else after a restart of the machine, so `run/PART.pid`
also holds the process's start time (and the boot's id). If the CLI was interrupted between starting a
process and recording it, the process's own instance lock leads to it.

Starting is idempotent. Two commands do not start or stop at the same time (`run/cli.lock`), but they may
wait at the same time until what they started is well.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec

import excimer
from excimer.base.errors import RetryableError
from excimer.cli.errors import BusyError, ProcessFailedError
from excimer.cli.installation import Installation, Part, make_directories
from excimer.cli.log_lines import last_error
from excimer.io.private_files import touch_private, write_private
from excimer.service.health import HTTP_OK
from excimer.service.instance_lock import LOCK_FILE_NAME
from excimer.service.log_files import open_log, rotate
from excimer.service.settings import save_settings

START_LIMIT_S: Final = 60.0
STOP_LIMIT_S: Final = 10.0
ENDPOINT_STOP_LIMIT_S: Final = 8.0
"""A manager ends by itself, hard if need be, after 5 s."""

HALTED_LIMIT_S: Final = 1.0
"""How long a process that somebody has stopped (SIGSTOP) is waited for: it cannot end by itself."""
KILL_LIMIT_S: Final = 10.0
POLL_S: Final = 0.02
BUSY_LIMIT_S: Final = 90.0
PROBE_TIMEOUT_S: Final = 2.0

STAT_START_TIME: Final = 19
"""Index of a process's start time among the fields of /proc/PID/stat after the program's name."""


class HealthTimeoutError(RetryableError):
    """A process runs but does not become well in time."""


class LaunchedProcess(NamedTuple):
    process: "subprocess.Popen[bytes]"
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


class Probed(NamedTuple):
    status: int
    """0 when nobody, or another process, answers."""
    warnings: list[str]
    """What is to be looked at: why a part is not well, and what is wrong although it does its work."""
    facts: dict[str, str]
    """What a compute says of its settings, see `excimer.compute.settings_keeper`."""


class ProcessRecord(msgspec.Struct, frozen=True):
    """Identifies one process on one boot of the machine."""

    pid: int
    start_ticks: int
    boot_id: str

    def is_alive(self) -> bool:
        return self.boot_id == _boot_id() and _start_ticks(self.pid) == self.start_ticks


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
    record = _read_record(_record_path(installation, part))
    if record is not None and record.is_alive():
        return record
    return _find_by_lock(lock_dir, settings_path(installation, part))


def settings_path(installation: Installation, part: str) -> Path:
    return installation.run_dir / f"{part}.toml"


def log_path(installation: Installation, part: str) -> Path:
    return installation.logs_dir / f"{part}.log"


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
    """Starts those that do not run, all at once; to be called in `exclusive`. Answers them by name."""
    make_directories(installation)
    return {part.name: _launch(installation, part) for part in parts if _is_absent(installation, part)}


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
    try:
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
    finally:
        for process, _ in launched.values():
            process.returncode = process.poll() or 0  # it outlives us on purpose: no warning about that


def _is_absent(installation: Installation, part: Part) -> bool:
    return find_process(installation, part.name, part.lock_dir) is None


def _is_well(installation: Installation, part: Part) -> bool:
    process = find_process(installation, part.name, part.lock_dir)
    return process is not None and probe(part.http_address, process.pid) == HTTP_OK


def _launch(installation: Installation, part: Part) -> LaunchedProcess:
    settings = settings_path(installation, part.name)
    log = log_path(installation, part.name)
    save_settings(
        settings,
        msgspec.structs.replace(part.settings, log_path=log, tls=installation.config.tls),
        "Written by excimer at each start; changes are lost.",
    )
    rotate(log)
    with os.fdopen(open_log(log), "ab") as output, _interrupts_later():
        log_start = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", part.module, str(settings)],
            stdin=subprocess.PIPE if part.standard_input else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(),
            cwd="/",
            start_new_session=True,
        )
        _write_record(_record_path(installation, part.name), process.pid)
        _hand_over(process, part.standard_input)
    return LaunchedProcess(process, log_start)


def _hand_over(process: "subprocess.Popen[bytes]", content: bytes) -> None:
    """Less than a pipe holds, so that this does not wait; whether it was read shows in its health."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(content)


def _environment() -> dict[str, str]:
    """Ours, with the Excimer that runs here findable from the root directory too."""
    source = str(Path(excimer.__file__).parent.parent)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, *map(os.path.abspath, others)])}


def _check_progress(
    installation: Installation, part: Part, launched: LaunchedProcess | None, deadline: float
) -> None:
    """Raises when a part that is not well has ended, or has had its time."""
    if launched is None:
        has_ended, log_start, how = _is_absent(installation, part), 0, ""
    else:
        has_ended, log_start = launched.process.poll() is not None, launched.log_start
        from excimer.io.processes import describe_exit

        code = launched.process.returncode
        how = "" if code is None else f" ({describe_exit(code)})"
    if not has_ended and time.monotonic() <= deadline:
        return
    problems = [] if has_ended else _own_words(installation, part)
    reason = "; ".join(problems) or last_error(log_path(installation, part.name), log_start)
    said = f"{reason}; see `excimer logs {part.name}`"
    if has_ended and launched is not None and launched.process.returncode in (0, -signal.SIGTERM):
        raise ProcessFailedError(f"{part.name} was stopped while it started, perhaps by another command")
    if has_ended:
        raise ProcessFailedError(f"{part.name} did not start{how}: {said}")
    raise HealthTimeoutError(f"{part.name} runs but does not become ready: {said}")


def _own_words(installation: Installation, part: Part) -> list[str]:
    """What a part that runs says is wrong with it: more to the point than the last line of its log."""
    process = find_process(installation, part.name, part.lock_dir)
    return [] if process is None else probe_health(part.http_address, process.pid).warnings


@dataclass(frozen=True, slots=True)
class Running:
    """What is to be stopped: a part's name, where its instance lock is, how long it may take."""

    part: str
    lock_dir: Path
    limit_s: float


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
    running = [(each, record) for each, record in found if record is not None]
    for _, record in running:
        _signal(record, signal.SIGKILL if immediate else signal.SIGTERM)
    for each, record in running:
        if not _wait_gone(record, begun + each.limit_s):
            _signal(record, signal.SIGKILL)
            if not _wait_gone(record, time.monotonic() + KILL_LIMIT_S):
                raise ProcessFailedError(f"{each.part} (process {record.pid}) cannot be stopped")
        stopped(f"{each.part} stopped", time.monotonic() - begun)
    for each in parts:
        _record_path(installation, each.part).unlink(missing_ok=True)
    return [each.part for each, _ in running]


def _signal(record: ProcessRecord, number: signal.Signals) -> None:
    if record.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)


def _wait_gone(record: ProcessRecord, deadline: float) -> bool:
    halted_until = time.monotonic() + HALTED_LIMIT_S
    while record.is_alive():
        now = time.monotonic()
        if now > deadline or (now > halted_until and is_halted(record.pid)):
            return False
        time.sleep(POLL_S)
    return True


def is_halted(pid: int) -> bool:
    """Whether somebody has stopped the process (SIGSTOP)."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


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
        {"settings": body.settings, "restart_pending": body.restart_pending},
    )


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Keeps Ctrl-C from falling between the start of a process and its record."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if caught:
        raise KeyboardInterrupt


def _record_path(installation: Installation, part: str) -> Path:
    return installation.run_dir / f"{part}.pid"


def _write_record(path: Path, pid: int) -> None:
    ticks = _start_ticks(pid)
    if ticks is not None:
        record = ProcessRecord(pid, ticks, _boot_id())
        write_private(path, msgspec.json.encode(record))


def _read_record(path: Path) -> ProcessRecord | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ProcessRecord)
    except (OSError, msgspec.DecodeError):
        return None  # none, or damaged: the instance lock knows too


def _find_by_lock(lock_dir: Path, settings: Path) -> ProcessRecord | None:
    try:
        with open(lock_dir / LOCK_FILE_NAME) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = int(file.read())
            else:
                return None
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    ticks = _start_ticks(pid)
    if ticks is None or os.fsencode(settings) not in arguments:
        return None
    return ProcessRecord(pid, ticks, _boot_id())


def _start_ticks(pid: int) -> int | None:
    """When the process started, in ticks since boot; None if there is no such process or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[STAT_START_TIME])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
