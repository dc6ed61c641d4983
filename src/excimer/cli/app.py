"""The root of the command line: which commands there are, and the options of all of them.

A command's module is imported only when the command runs (or its own help is asked for): the
table below is all that `excimer --help` needs.
"""

import difflib
import importlib
import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

import excimer
from excimer.cli.session import DEFAULT_DIRECTORY, DIRECTORY_VARIABLE, Session, find_directory

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "up": ("up", "Make an installation if there is none, start everything, print a postgresql:// URL."),
    "init": ("installation", "Make a new local installation."),
    "start": ("installation", "Start the services that do not run."),
    "stop": ("installation", "Stop endpoints and services."),
    "status": ("installation", "Show which parts run."),
    "tenant": ("tenant", "Tenants (projects): create, list, size, delete, set-default, config."),
    "timeline": (
        "timeline",
        "Branches: create, branch, list, restore, reset, archive, detach-ancestor, delete…",
    ),
    "branch": ("timeline", "The same as timeline."),
    "import": ("import_cluster", "Bring in an existing cluster: a data directory, or a running server."),
    "endpoint": (
        "endpoint_promotion",
        "Endpoints: create, start, stop, suspend, promote, list, url, config, cache, limits, logs, delete…",
    ),
    "role": ("role", "Roles that log in: create, password, list, drop."),
    "export": ("export", "Write a branch as a data directory or tar for plain PostgreSQL."),
    "wal": ("wal", "WAL of a branch: receive it into a directory, for PostgreSQL's point-in-time recovery."),
    "psql": ("psql", "Open psql on an endpoint."),
    "pg": ("pg", "PostgreSQL builds: list, install, add."),
    "layers": ("layers", "Draw the layers of a branch."),
    "page": ("page", "Explain how a page is made, layer by layer."),
    "verify": ("verify", "Compare an endpoint's pages with what the pageserver serves."),
    "profile": ("profile", "Write a flame graph of a running part."),
    "logs": ("logs", "Show the log of a part."),
    "doctor": ("doctor", "Check this machine and the installation."),
}
"""Name -> module of `excimer.cli.commands` (group of the same name, or holder of the command), help."""


NEAR: Final = 0.7
"""How alike a wrong command and one that is suggested are: `tenantt` and `tenant`, not `bogus` and `logs`."""

GROUPS: Final = ("tenant", "timeline", "branch", "endpoint", "role", "wal", "pg")
"""Those that are groups of commands; the others are one command of their module."""


class LazyGroup(TyperGroup):
    """Loads a command's module when the command is used; help lists the table."""

    _is_listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            module_name, help_text = COMMANDS[cmd_name]
            if self._is_listing:
                return TyperCommand(cmd_name, help=help_text)
            self.commands[cmd_name] = _load(cmd_name, module_name, help_text)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=NEAR)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._is_listing = True
        super().format_help(ctx, formatter)


def _load(name: str, module_name: str, help_text: str) -> Any:
    group = typer.main.get_group(importlib.import_module(f"excimer.cli.commands.{module_name}").app)
    command: Any = group if name in GROUPS else group.commands[name]
    command.name = name
    command.help = help_text if name == "branch" else command.help or help_text
    return command


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        as_json = context.params.get("as_json")
        print(json.dumps({"version": excimer.__version__}) if as_json else f"excimer {excimer.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serverless Postgres on stock PostgreSQL: storage apart from compute, branches in milliseconds.",
    epilog="--dir and --json may stand anywhere on the line. "
    "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 not found, 4 not available now.",
)


@app.callback()
def root(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help=f"State directory; default: ${DIRECTORY_VARIABLE}, else {DEFAULT_DIRECTORY} here or above.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", is_eager=True, help="Write results as JSON.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    session = Session(directory.absolute() if directory else find_directory(), as_json)
    session.make_current()
    context.obj = session
