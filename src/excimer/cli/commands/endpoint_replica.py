"""What is particular to replicas: who their primary is, how far behind it they are.

Not here: making and starting them, which is as for all endpoints (`endpoint`).
"""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import UsageError
from excimer.cli.installation import Installation, endpoint_part_name
from excimer.cli.local_processes import find_process

ReplicaOption = Annotated[
    bool, typer.Option("--replica", help="Read-only, following the branch's primary.", show_default=False)
]


def mode_of(*, is_static: bool, is_replica: bool) -> str:
    """Of a new endpoint. Raises `UsageError`."""
    if is_static and is_replica:
        raise UsageError("--replica follows the head, --at shows one moment: choose one")
    return "static" if is_static else "replica" if is_replica else "primary"


def running_primary(installation: Installation, client: ControllerClient, timeline_id: str) -> str | None:
    """The name of the endpoint that writes a timeline, if one runs here."""
    for row in client.get("endpoints")["endpoints"]:
        name = str(row["name"])
        is_primary = row["timeline_id"] == timeline_id and row["mode"] == "primary"
        if is_primary and find_process(
            installation, endpoint_part_name(name), installation.endpoint_dir(name)
        ):
            return name
    return None


def replica_progress(facts: Mapping[str, str]) -> dict[str, Any]:
    """What a compute says of it: ``replayed_lsn`` and ``lag_bytes``, None for what is no replica."""
    lag = facts.get("lag_bytes", "")
    return {"replayed_lsn": facts.get("replayed_lsn") or None, "lag_bytes": int(lag) if lag else None}


def shown_mode(row: Mapping[str, Any]) -> str:
    """``static at 0/1A2B3C8``, ``replica, 16 kB behind``."""
    if row["lsn"]:
        return f"{row['mode']} at {row['lsn']}"
    lag_bytes = row.get("lag_bytes")
    return str(row["mode"]) if lag_bytes is None else f"{row['mode']}, {shown_bytes(lag_bytes)} behind"


def shown_bytes(size: int) -> str:
    """As PostgreSQL's pg_size_pretty, roughly."""
    for unit in ("B", "kB", "MB"):
        if size < 10 * 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GB"
