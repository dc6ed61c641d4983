"""What all commands share: where the installation is, and how answers are written.

Options that every command understands (`--json`, `--dir`) may stand anywhere on the command line:
`common_options_first` moves them before the command, where they are declared.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import typer

from excimer.cli.moments import is_dashed

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_DIRECTORY: Final = ".excimer"
DIRECTORY_VARIABLE: Final = "EXCIMER_DIR"

PIPE_WIDTH: Final = 250
"""Columns when nobody looks: a table in a pipe or file is not cut to a terminal's width."""

CONFIG_NAME: Final = "config.toml"
"""The file that makes a directory an installation."""

FLAGS: Final = ("--json",)
VALUED: Final = ("--dir",)
FOREIGN: Final = ["pg", "exec"]
FORMER: Final = {
    "--branch-name": "--branch",
    "--ancestor-branch-name": "--ancestor",
    "--ancestor-start-lsn": "--at",
}
"""Names that options had, and that are still understood."""


def common_options_first(arguments: Sequence[str]) -> list[str]:
    """``start --json`` -> ``--json start``. What follows ``--`` or ``pg exec`` belongs to another program and
    stays. A moment that looks like options is told apart from them: ``-5m`` -> ``now-5m``. Former names of
    options get their present ones.
    """
    common: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--" or rest[:2] == FOREIGN:
            rest += [argument, *waiting]
        elif is_dashed(argument):
            rest.append(f"now{argument}")
        elif argument in FLAGS or argument.startswith(tuple(f"{name}=" for name in VALUED)):
            common.append(argument)
        elif argument in VALUED:
            common += [argument, *[value for value in [next(waiting, None)] if value is not None]]
        else:
            name, equals, value = argument.partition("=")
            rest.append(FORMER.get(name, name) + equals + value)
    return common + rest


def find_directory() -> Path:
    """The installation that is meant when none is named: ``$EXCIMER_DIR``; else ``.excimer`` here or in the
    nearest directory above that has one and is ours; else, to be made, ``.excimer`` here.
    """
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named:
        return Path(named).absolute()
    here = Path.cwd()
    for place in (here, *here.parents):
        found = place / DEFAULT_DIRECTORY
        with suppress(OSError):
            # Somebody else's, in /tmp say, would run with that person's choice of everything.
            if (found / CONFIG_NAME).stat().st_uid == os.geteuid():
                return found
    return here / DEFAULT_DIRECTORY


def is_styled(stream: TextIO) -> bool:
    """Whether colours, bold and the like belong on a stream: on a terminal, unless ``NO_COLOR`` is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


_current: ContextVar["Session | None"] = ContextVar("session", default=None)


def current_session() -> "Session | None":
    """Of the command that runs; None before there is one, and for a shell's completion."""
    return _current.get()


@dataclass
class Session:
    """One run of the command line."""

    directory: Path
    as_json: bool = False
    started: float = field(default_factory=time.monotonic)

    def make_current(self) -> None:
        """What waits somewhere below speaks to this session's user."""
        _current.set(self)

    def answer(self, value: Any, show: "Callable[[Console], None]") -> None:
        """Writes the command's result: `value` as JSON, or `show` for people."""
        if self.as_json:
            import json

            print(json.dumps(value, indent=2))
        else:
            show(self.console())

    def say(self, sentence: str, value: dict[str, Any]) -> None:
        """A result that is one sentence for people. Not by rich: importing it takes longer."""
        if self.as_json:
            self.answer(value, lambda _: None)
        else:
            print(sentence)

    def console(self, *, stderr: bool = False) -> "Console":
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        return Console(
            stderr=stderr,
            soft_wrap=True,
            width=None if stream.isatty() else PIPE_WIDTH,
            color_system="auto" if is_styled(stream) else None,
        )

    def note(self, sentence: str) -> None:
        """A remark beside the result, on standard error; silent with --json."""
        if not self.as_json:
            print(sentence, file=sys.stderr, flush=True)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Shows a step of long work while it runs, then its time; silent with --json."""
        started = time.monotonic()
        if self.as_json or not sys.stdout.isatty():
            yield
        else:
            with self.console().status(f"{what} …"):
                yield
        self.done(what, time.monotonic() - started)

    def done(self, what: str, elapsed_s: float) -> None:
        """A step that was timed elsewhere."""
        if self.as_json:
            return
        green, dim, plain = ("\x1b[32m", "\x1b[2m", "\x1b[0m") if is_styled(sys.stdout) else ("", "", "")
        print(f"{green}✓{plain} {what:<44} {dim}{elapsed_s:6.2f} s{plain}", flush=True)


def session_of(context: typer.Context) -> Session:
    session = context.find_root().obj
    assert isinstance(session, Session)
    return session
