"""The installation's supervisor as the command line sees it: started when it is needed, asked, stopped.

Services outlive a supervisor that was killed, and can be stopped without one; the next start makes another,
which watches them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

import excimer
from excimer.base.errors import RetryableError
from excimer.cli.errors import ProcessFailedError
from excimer.cli.installation import Installation
from excimer.io.processes import describe_exit
from excimer.service.log_files import open_log, rotate
from excimer.service.log_lines import last_error
from excimer.service.process_names import PADDING
from excimer.service.process_records import (
    ProcessRecord,
    find_process,
    is_halted,
    read_record,
    record_path,
    settings_path,
    write_record,
)
from excimer.service.settings import save_settings
from excimer.supervisor.protocol import (
    Answer,
    Failed,
    ForgetPart,
    Parts,
    ReadParts,
    Request,
    WatchedPart,
    ask,
)
from excimer.supervisor.settings import SupervisorSettings

SUPERVISOR: Final = "supervisor"
LISTEN_LIMIT_S: Final = 60.0
ANSWER_LIMIT_S: Final = 60.0
"""The first answer waits for the imports of all services."""
LOOK_LIMIT_S: Final = 2.0
POLL_S: Final = 0.02


class SupervisorSilentError(RetryableError):
    """The supervisor runs and does not answer."""


def supervisor_lock_dir(run_dir: Path) -> Path:
    return run_dir / SUPERVISOR


def find_supervisor(installation: Installation) -> ProcessRecord | None:
    return find_process(installation.run_dir, SUPERVISOR, supervisor_lock_dir(installation.run_dir))


def supervisor_problem(installation: Installation) -> str | None:
    """Why nothing that dies would come back, and what to do; None: it would, or everything was stopped."""
    supervisor = find_supervisor(installation)
    if supervisor is not None:
        if not is_halted(supervisor.pid):
            return None
        pid = supervisor.pid
        return f"the supervisor (process {pid}) is halted and starts nothing: kill -CONT {pid}"
    if read_record(record_path(installation.run_dir, SUPERVISOR)) is None:
        return None  # who stops it removes its record
    return "the supervisor does not run: a service that dies stays down; excimer start starts it again"


def ask_supervisor(installation: Installation, request: Request) -> Answer:
    """Asks it, after starting it if it does not run; to be called in `exclusive`.

    Raises `ProcessFailedError` with its reason for what cannot be done, `SupervisorSilentError`.
    """
    launched = None if find_supervisor(installation) is not None else _launch_supervisor(installation)
    deadline = time.monotonic() + LISTEN_LIMIT_S
    while True:
        try:
            answer = ask(installation.run_dir, request, ANSWER_LIMIT_S)
            break
        except (FileNotFoundError, ConnectionRefusedError):  # it begins, or has just been killed
            _check_begins(installation, launched, deadline)
            time.sleep(POLL_S)
        except (OSError, msgspec.DecodeError) as error:
            if launched is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    launched.wait(LOOK_LIMIT_S)
                    _check_begins(installation, launched, deadline)
            raise SupervisorSilentError(
                f"the supervisor does not answer ({error}); see `excimer logs supervisor`, and try again"
            ) from error
    if launched is not None:
        launched.returncode = launched.poll() or 0  # it outlives us on purpose: no warning about that
    if isinstance(answer, Failed):
        raise ProcessFailedError(answer.reason)
    return answer


def _check_begins(
    installation: Installation, launched: "subprocess.Popen[bytes] | None", deadline: float
) -> None:
    """Raises `ProcessFailedError` for a supervisor that does not come to listen."""
    code = None if launched is None else launched.poll()
    gone = launched is None and find_supervisor(installation) is None
    if code is None and not gone and time.monotonic() < deadline:
        return
    how = "" if code is None else f" ({describe_exit(code)})"
    reason = last_error(log_path(installation, SUPERVISOR))
    raise ProcessFailedError(f"the supervisor did not start{how}: {reason}; see `excimer logs supervisor`")


def part_states(installation: Installation) -> Mapping[str, WatchedPart]:
    """How the parts are that it watches; none if it does not run, or is halted."""
    if find_supervisor(installation) is None:
        return {}
    with contextlib.suppress(OSError, msgspec.DecodeError):
        answer = ask(installation.run_dir, ReadParts(), LOOK_LIMIT_S)
        if isinstance(answer, Parts):
            return answer.parts
    return {}


def forget_part(installation: Installation, part: str) -> None:
    """What is going to be stopped is not to come back. Raises `SupervisorSilentError`."""
    supervisor = find_supervisor(installation)
    if supervisor is None:
        return
    try:
        ask(installation.run_dir, ForgetPart(part=part), ANSWER_LIMIT_S)
    except (OSError, msgspec.DecodeError) as error:
        if supervisor.is_alive():
            raise SupervisorSilentError(
                f"the supervisor, which would start {part} again, does not answer: excimer stop stops all"
            ) from error


def log_path(installation: Installation, part: str) -> Path:
    return installation.logs_dir / f"{part}.log"


def program_path_environment() -> dict[str, str]:
    """Ours, with the Excimer that runs here findable from the root directory too."""
    source = str(Path(excimer.__file__).parent.parent)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, *map(os.path.abspath, others)])}


def _launch_supervisor(installation: Installation) -> "subprocess.Popen[bytes]":
    run_dir = installation.run_dir
    settings, log = settings_path(run_dir, SUPERVISOR), log_path(installation, SUPERVISOR)
    save_settings(
        settings,
        SupervisorSettings(run_dir=run_dir, log_path=log),
        "Written by excimer at each start; changes are lost.",
    )
    rotate(log)
    with os.fdopen(open_log(log), "ab") as output, interrupts_later():
        process = subprocess.Popen(
            [sys.executable, "-m", "excimer.supervisor", str(settings), PADDING],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=program_path_environment(),
            cwd="/",
            start_new_session=True,
        )
        write_record(run_dir, SUPERVISOR, process.pid)
    return process


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Keeps Ctrl-C from falling between the start of a process and its record."""
    caught: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if caught:
        raise KeyboardInterrupt
