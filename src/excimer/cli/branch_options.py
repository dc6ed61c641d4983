"""Options that several commands on branches share, and what they mean."""

import re
from datetime import UTC, datetime
from typing import Annotated, Final

import typer

from excimer.cli.completion import complete_branch, complete_endpoint, complete_tenant
from excimer.cli.errors import UsageError
from excimer.cli.moments import EXAMPLES, MomentError, parse_moment

POINT_HELP: Final = "LSN (0/16B3748) or time (2026-01-31T12:00:00Z, -5m, yesterday 14:00; zone: local)"

TenantOption = Annotated[
    str | None,
    typer.Option("--tenant", help="Tenant; default: the default one.", autocompletion=complete_tenant),
]
TenantArgument = Annotated[str, typer.Argument(help="Name or id.", autocompletion=complete_tenant)]
BranchArgument = Annotated[
    str, typer.Argument(help="Name or id of the branch.", autocompletion=complete_branch)
]
EndpointArgument = Annotated[
    str, typer.Argument(help="Name of the endpoint.", autocompletion=complete_endpoint)
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


def branch_point(at: str | None) -> dict[str, str]:
    """The request's field for an LSN or a time. Raises `UsageError`."""
    if at is None:
        return {}
    if _LSN.match(at):
        return {"at_lsn": at}
    try:
        moment = parse_moment(at, datetime.now(UTC).astimezone())
    except MomentError as error:
        raise UsageError(f"{at!r} is neither an LSN like 0/16B3748 nor a time like {EXAMPLES}") from error
    return {"at_timestamp": moment.isoformat()}
