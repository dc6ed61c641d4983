"""`excimer logs PART`: what a part has written."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from excimer.base.errors import NotFoundError
from excimer.cli.completion import complete_part
from excimer.cli.errors import NotRunningError
from excimer.cli.installation import endpoint_part_name, load_installation
from excimer.cli.log_lines import as_json_line, pretty, tail
from excimer.cli.session import Session, session_of
from excimer.service.log_files import numbered

app = typer.Typer()

POLL_S = 0.2

FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")]
LinesOption = Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")]


@app.command()
def logs(
    context: typer.Context,
    part: Annotated[
        str,
        typer.Argument(
            help="broker, controller, pageserver, safekeeper-1, or an endpoint's name.",
            autocompletion=complete_part,
        ),
    ],
    follow: FollowOption = False,
    lines: LinesOption = 100,
) -> None:
    """Show the last lines of a part's log; with --json one object a line, as in the file."""
    session = session_of(context)
    show_log(session, _find_log(load_installation(session.directory).logs_dir, part), lines, follow=follow)


def show_log(session: Session, path: Path, lines: int, *, follow: bool) -> None:
    """The last lines of a log, and those that come. Raises OSError."""
    shown = as_json_line if session.as_json else pretty
    size = path.stat().st_size
    for line in tail(path, lines):
        print(shown(line), flush=True)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(path, size, shown)


def _find_log(logs_dir: Path, part: str) -> Path:
    for name in (part, endpoint_part_name(part)):
        path = logs_dir / f"{name}.log"
        if "/" not in name and path.exists():
            return path
    known = sorted(path.stem for path in logs_dir.glob("*.log")) if logs_dir.is_dir() else []
    if not known:
        raise NotRunningError("there are no logs yet: excimer start")
    import difflib

    near = difflib.get_close_matches(part, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    raise NotFoundError(f"no part {part!r}; {hint}")


def _follow(path: Path, position: int, shown: Callable[[str], str]) -> None:
    """Until Ctrl-C. A file that was replaced is read from its beginning."""
    rest = ""
    while True:
        size = path.stat().st_size if path.exists() else position
        if size < position:
            for line in _rest_of_rotated(path, position, rest):
                print(shown(line), flush=True)
            position, rest = 0, ""
        if size > position:
            with open(path, errors="replace") as file:
                file.seek(position)
                text = rest + file.read()
                position = file.tell()
            *whole, rest = text.split("\n")
            for line in whole:
                print(shown(line), flush=True)
        time.sleep(POLL_S)


def _rest_of_rotated(path: Path, position: int, rest: str) -> list[str]:
    """What was in the file behind `position` when it was cut; nothing if it was longer than what is kept."""
    try:
        with open(numbered(path, 1), errors="replace") as file:
            if file.seek(0, 2) < position:
                return []
            file.seek(position)
            return (rest + file.read()).splitlines()
    except OSError:
        return []
