"""`excimer logs PART`: what a part has written."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from excimer.base.errors import NotFoundError
from excimer.cli.completion import complete_part
from excimer.cli.errors import NotRunningError, UsageError
from excimer.cli.installation import Installation, endpoint_part_name, load_installation, logged_parts
from excimer.cli.session import Session, session_of
from excimer.cli.supervision import log_path
from excimer.service.log_files import numbered
from excimer.service.log_lines import as_json_line, pretty, tail

app = typer.Typer()

POLL_S = 0.2

FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")]
LinesOption = Annotated[
    int, typer.Option("--lines", "-n", metavar="COUNT", min=0, help="How many of the last lines.")
]


@app.command()
def logs(
    context: typer.Context,
    part: Annotated[
        str | None,
        typer.Argument(
            metavar="PART",
            help="broker, controller, pageserver, safekeeper-1, or an endpoint's name.",
            show_default=False,
            autocompletion=complete_part,
        ),
    ] = None,
    follow: FollowOption = False,
    lines: LinesOption = 100,
    deleted: Annotated[
        bool, typer.Option("--deleted", help="Look among endpoints that were deleted, too.")
    ] = False,
) -> None:
    """Show the last lines of a part's log; with --json one object a line, as in the file."""
    session = session_of(context)
    installation = load_installation(session.directory)
    show_log(session, find_log(installation, part, with_deleted=deleted), lines, follow=follow)


def show_log(session: Session, path: Path, lines: int, *, follow: bool) -> None:
    """The last lines of a log, and those that come. Raises OSError."""
    shown = as_json_line if session.as_json else pretty
    size = path.stat().st_size
    for line in tail(path, lines):
        print(shown(line), flush=True)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(path, size, shown)


def find_log(installation: Installation, part: str | None, *, with_deleted: bool = False) -> Path:
    """Raises `UsageError`, NotFoundError that list what there is; `NotRunningError` where nothing is."""
    known = logged_parts(installation, with_deleted=with_deleted)
    if not known:
        raise NotRunningError("there are no logs yet: excimer start")
    if part is None:
        raise UsageError(f"name a part; there are: {', '.join(known)}")
    for name in (part, endpoint_part_name(part)):
        if name in known:
            return log_path(installation, name)
        if name in logged_parts(installation, with_deleted=True):
            raise NotFoundError(f"endpoint {part} was deleted: excimer logs {part} --deleted shows its log")
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
