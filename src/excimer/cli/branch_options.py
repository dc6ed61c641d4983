"""Options that several commands on branches share, and what they mean."""

import re
from datetime import UTC, datetime
from typing import Annotated, Final

import typer

from excimer.cli.completion import complete_branch, complete_endpoint, complete_tenant
from excimer.cli.errors import UsageError
from excimer.cli.moments import EXAMPLES, MomentError, parse_moment

POINT_HELP: Final = "LSN (0/16B3748) or time (2026-01-31T12:00:00Z, -5m, yesterday 14:00; zone: local)"

POINT: Final = "LSN|TIME"

TenantOption = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        metavar="TENANT",
        help="Name or id of the tenant; default: the default one.",
        autocompletion=complete_tenant,
    ),
]
TenantArgument = Annotated[
    str, typer.Argument(metavar="TENANT", help="Name or id of the tenant.", autocompletion=complete_tenant)
]
OptionalTenantArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="TENANT",
        help="Name or id of the tenant; default: the default one.",
        show_default=False,
        autocompletion=complete_tenant,
    ),
]
BranchArgument = Annotated[
    str, typer.Argument(metavar="BRANCH", help="Name or id of the branch.", autocompletion=complete_branch)
]
BranchOption = Annotated[
    str,
    typer.Option(
        "--branch", "-b", metavar="BRANCH", help="Name or id of the branch.", autocompletion=complete_branch
    ),
]
NewBranchArgument = Annotated[
    str | None, typer.Argument(metavar="BRANCH", help="Name of the new branch.", show_default=False)
]
NewBranchAlias = Annotated[str | None, typer.Option("--branch", "-b", hidden=True)]
"""How the name of a new branch was given formerly."""

EndpointArgument = Annotated[
    str,
    typer.Argument(metavar="ENDPOINT", help="Name of the endpoint.", autocompletion=complete_endpoint),
]
OptionalEndpointArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ENDPOINT",
        help="Name of the endpoint; default: the only one.",
        show_default=False,
        autocompletion=complete_endpoint,
    ),
]
VersionOption = Annotated[
    int | None,
    typer.Option(
        "--pg-version",
        metavar="VERSION",
        help="PostgreSQL version; default: that of `init`.",
        show_default=False,
    ),
]
KeepActiveOption = Annotated[
    bool,
    typer.Option(
        "--keep-active",
        help="Subscriptions stay enabled, and extensions' background workers (pg_cron) run. Both of two "
        "servers at work on one subscription lose rows: see that only one is.",
    ),
]

_LSN = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}\Z")


def new_branch_name(argument: str | None, option: str | None) -> str:
    """Raises `UsageError` unless it is given exactly once."""
    if (argument is None) == (option is None):
        raise UsageError("Missing argument 'BRANCH'." if argument is None else "name the new branch once")
    return argument if argument is not None else str(option)


def is_lsn(text: str) -> bool:
    return _LSN.match(text) is not None


def branch_point(at: str | None) -> dict[str, str]:
    """The request's field for an LSN or a time. Raises `UsageError`."""
    if at is None:
        return {}
    if is_lsn(at):
        return {"at_lsn": at}
    try:
        moment = parse_moment(at, datetime.now(UTC).astimezone())
    except MomentError as error:
        raise UsageError(f"{at!r} is neither an LSN like 0/16B3748 nor a time like {EXAMPLES}") from error
    return {"at_timestamp": moment.isoformat()}
