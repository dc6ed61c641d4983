"""`excimer` commands without the start of an interpreter, which takes ten times as long as most of them.

Each is a process of its own with its own arguments, environment, directory and output, as always; but it is
forked from one that has imported the command line, by multiprocessing's fork server. What a start of the
interpreter has besides is tested where it is started: `integration/test_cli_stack`, `unit/cli`.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Final

from excimer.cli.__main__ import main
from excimer.cli.app import COMMANDS

IMPORTED: Final = (
    *sorted({f"excimer.cli.commands.{module}" for module, _ in COMMANDS.values()}),
    *("excimer.cli.command_line", "excimer.cli.certificates", "excimer.cli.tables"),
    *(f"excimer.{part}.settings" for part in ("broker", "compute", "controller", "pageserver", "safekeeper")),
    *("excimer.compute.server_certificate", "excimer.controller.tokens", "excimer.postgres"),
    *("encodings.idna", "http.client", "importlib.metadata", "pydantic.plugin._loader"),
    *("rich.console", "rich.table", "rich.tree", "typer._adapters"),
)
"""What commands import, however late. A name that is not there costs time and nothing else."""

_context: Final = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__, *IMPORTED])
_status: Final = threading.Lock()
"""Who starts a process also reads the statuses of those that have ended, and each can be read once."""


def run_forked(arguments: Sequence[str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """Runs `excimer` with these arguments. Raises `subprocess.TimeoutExpired` after killing it."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        places = tuple(f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (output, errors))
        process = _context.Process(target=_run, args=(arguments, dict(os.environ), os.getcwd(), places))
        with _status:
            process.start()
        has_ended = bool(wait([process.sentinel], timeout_s))
        if not has_ended:
            process.kill()
        with _status:
            process.join()
        if not has_ended:
            raise subprocess.TimeoutExpired(["excimer", *arguments], timeout_s)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
        assert process.exitcode is not None
        return subprocess.CompletedProcess(["excimer", *arguments], process.exitcode, *texts)


def _run(
    arguments: Sequence[str], environment: dict[str, str], directory: str, places: Sequence[str]
) -> None:
    """In the fork."""
    for standard, place in zip((1, 2), places, strict=True):
        descriptor = os.open(place, os.O_WRONLY)
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["excimer", *arguments]
    main()
