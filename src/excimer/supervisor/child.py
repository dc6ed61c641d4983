"""A fork of the supervisor becomes a service: session, signals, standard streams, environment, name."""

import contextlib
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from excimer.service.forked_process import leave_parent
from excimer.service.process_main import EXIT_CRASHED
from excimer.service.process_records import settings_path
from excimer.supervisor.protocol import StartPart
from excimer.supervisor.settings import SupervisorSettings

Environment: TypeAlias = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Launched:
    """What a fork is to run when it has left the supervisor's rooms."""

    part: str
    module: str
    arguments: list[str]


def launch_of(start: StartPart, settings: SupervisorSettings) -> Launched:
    return Launched(start.part, start.module, [str(settings_path(settings.run_dir, start.part))])


def become(launched: Launched, environment: Environment, log: int) -> None:
    """The first steps of a fork, within `forking`. Takes over `log`.

    Ends the process if one of them fails: as the supervisor's twin it must not go on.
    """
    try:
        _take_place(launched, environment, log)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(log, f"excimer {launched.part}: {error}\n".encode())
        os._exit(EXIT_CRASHED)


def _take_place(launched: Launched, environment: Environment, log: int) -> None:
    arguments = ["-m", launched.module, *launched.arguments]
    leave_parent(launched.part, arguments, output=log)
    _set_environment(dict(environment))


def _set_environment(wanted: dict[bytes, bytes]) -> None:
    """Most of it is as in the supervisor, and is not written again (`preload` says why)."""
    for name in [name for name in os.environb if name not in wanted]:
        del os.environb[name]
    for name, value in wanted.items():
        if os.environb.get(name) != value:
            os.environb[name] = value


def run_launched(launched: Launched) -> int:
    """Runs the service as ``python -m MODULE`` would; its exit code, unless it leaves by SystemExit.

    One that is preloaded has a ``main``: finding and loading the module again would cost it a MiB.
    """
    sys.argv[:] = [launched.module, *launched.arguments]
    loaded = sys.modules.get(f"{launched.module}.__main__")
    if loaded is not None:
        code: int = loaded.main()
        return code
    runpy.run_module(launched.module, run_name="__main__", alter_sys=True)
    return 0
