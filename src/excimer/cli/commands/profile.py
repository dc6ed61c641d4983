"""`excimer profile PART`: where a running service spends its CPU time, as a flame graph."""

from pathlib import Path
from typing import Annotated, Final

import typer

from excimer.base.errors import NotFoundError
from excimer.cli.completion import complete_part
from excimer.cli.errors import NotRunningError
from excimer.cli.installation import Installation, endpoint_part_name, load_installation
from excimer.cli.local_processes import find_process
from excimer.cli.session import session_of

app = typer.Typer()

SECONDS_MAX: Final = 3600


@app.command()
def profile(
    context: typer.Context,
    part: Annotated[
        str,
        typer.Argument(
            metavar="PART",
            help="controller, pageserver, safekeeper-1, broker, or an endpoint's name (its manager).",
            show_default=False,
            autocompletion=complete_part,
        ),
    ],
    seconds: Annotated[
        int, typer.Option("--seconds", "-s", metavar="SECONDS", min=1, max=SECONDS_MAX, help="How long.")
    ] = 10,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="File to write; default: PART.svg.", show_default=False
        ),
    ] = None,
    idle: Annotated[bool, typer.Option("--idle", help="Show threads that wait, too.")] = False,
) -> None:
    """Sample a running service with py-spy, native frames included, and write a flame graph as SVG."""
    from excimer.cli.profiler import check_writable, find_profiler, record_profile

    session = session_of(context)
    pid = running_pid(load_installation(session.directory), part)
    place = out or Path(f"{part}.svg")
    check_writable(place)
    profiler = find_profiler()
    with session.step(f"{part}, process {pid}, for {seconds} s"):
        record_profile(profiler, pid, seconds, place, with_idle=idle)
    session.say(
        f"{place} is a flame graph of {part}", {"part": part, "pid": pid, "out": str(place.absolute())}
    )


def running_pid(installation: Installation, part: str) -> int:
    """Raises `NotFoundError` for a part that there is not, `NotRunningError` for one that does not run."""
    places = {each.name: each.lock_dir for each in installation.service_parts()}
    endpoints = installation.directory / "endpoints"
    if endpoints.is_dir():
        places |= {endpoint_part_name(path.name): path for path in endpoints.iterdir()}
    name = part if part in places else endpoint_part_name(part)
    if name not in places:
        raise NotFoundError(f"no part {part!r}; there are: {', '.join(sorted(places))}")
    process = find_process(installation, name, places[name])
    if process is None:
        raise NotRunningError(f"{part} does not run: excimer status shows what does")
    return process.pid
