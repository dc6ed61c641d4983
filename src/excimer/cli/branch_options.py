"""Options that several commands on branches share, and what they mean."""

import re
from datetime import UTC, datetime
from typing import Annotated

import typer

from excimer.cli.errors import UsageError

TenantOption = Annotated[str | None, typer.Option("--tenant", help="Tenant; default: the default one.")]

_LSN = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}\Z")


def branch_point(at: str | None) -> dict[str, str]:
    """The request's field for an LSN or a time. Raises `UsageError`."""
    if at is None:
        return {}
    if _LSN.match(at):
        return {"at_lsn": at}
    try:
        moment = datetime.fromisoformat(at).astimezone(UTC)
    except (ValueError, OverflowError) as error:  # the latter: in UTC the year is 0 or 10000
        raise UsageError(
            f"{at!r} is neither an LSN like 0/16B3748 nor a time like 2026-01-31T12:00:00Z"
        ) from error
    return {"at_timestamp": moment.isoformat()}
