"""Runs the command line and turns errors into one line and an exit code."""

import errno
import json
import os
import sys
from typing import Any, Final

import typer

from excimer.base.errors import ExcimerError
from excimer.cli.app import app
from excimer.cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, exit_code_of
from excimer.cli.session import common_options_first

REFUSED_BY_SYSTEM: Final = frozenset(
    {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
)
"""A full or damaged disk, rights: no fault of ours, and a traceback helps nobody."""

_WrongUsage: type[Exception] = typer.BadParameter.__mro__[1]
"""Typer's UsageError, which only newer versions of it export."""


def run(arguments: list[str]) -> int:
    """The exit code of a command whose arguments these are; what it says is written."""
    arguments = common_options_first(arguments)
    if os.environ.get("NO_COLOR"):  # Typer's help leaves its bold letters otherwise
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    as_json = "--json" in arguments
    try:
        code = app(arguments, prog_name="excimer", standalone_mode=False)
    except _WrongUsage as error:
        if "NoArgs" in type(error).__name__:
            print(error)
        else:
            _complain(as_json, "UsageError", f"{_usage_problem(error)} {_hint(error)}")
        return EXIT_USAGE
    except ExcimerError as error:
        _complain(as_json, type(error).__name__, str(error))
        return exit_code_of(error)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        if error.errno not in REFUSED_BY_SYSTEM:
            raise
        about = "" if error.filename is None else f"{error.filename}: "
        _complain(as_json, type(error).__name__, f"{about}{error.strerror}")
        return EXIT_FAILED
    if code == EXIT_INTERRUPTED:  # Typer answers Ctrl-C with this code, too
        _complain(as_json, "Interrupted", "interrupted; what has started goes on running")
    return code if isinstance(code, int) else 0


def _complain(as_json: bool, kind: str, message: str) -> None:
    sentence = " ".join(message.split())
    print(
        json.dumps({"error": kind, "message": sentence}) if as_json else f"excimer: {sentence}",
        file=sys.stderr,
    )


def _usage_problem(error: Any) -> str:
    return str(error.format_message())


def _hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"(see {context.command_path} --help)" if context is not None else ""
