"""What all commands share: where the installation is, and how answers are written.

Options that every command understands (`--json`, `--dir`) may stand anywhere on the command line:
`common_options_first` moves them before the command, where they are declared.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_DIRECTORY: Final = ".excimer"
DIRECTORY_VARIABLE: Final = "EXCIMER_DIR"

PIPE_WIDTH: Final = 250
"""Columns when nobody looks: a table in a pipe or file is not cut to a terminal's width."""

FLAGS: Final = ("--json",)
VALUED: Final = ("--dir",)


def common_options_first(arguments: Sequence[str]) -> list[str]:
    """``start --json`` -> ``--json start``. What follows ``--`` belongs to another program and stays."""
    common: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            rest += [argument, *waiting]
        elif argument in FLAGS or argument.startswith(tuple(f"{name}=" for name in VALUED)):
            common.append(argument)
        elif argument in VALUED:
            common += [argument, *[value for value in [next(waiting, None)] if value is not None]]
        else:
            rest.append(argument)
    return common + rest


@dataclass
class Session:
    """One run of the command line."""

    directory: Path
    as_json: bool = False
    started: float = field(default_factory=time.monotonic)

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
        return Console(stderr=stderr, soft_wrap=True, width=None if stream.isatty() else PIPE_WIDTH)

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
        green, dim, plain = ("\x1b[32m", "\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "", "")
        print(f"{green}✓{plain} {what:<44} {dim}{elapsed_s:6.2f} s{plain}", flush=True)


def session_of(context: typer.Context) -> Session:
    session = context.find_root().obj
    assert isinstance(session, Session)
    return session
