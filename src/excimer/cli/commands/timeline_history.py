"""`excimer timeline restore | reset | activate | archive | unarchive | detach-ancestor | lsn-at | time-of`.

Not here: branches themselves (`timeline`).
"""

import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from excimer.cli.branch_options import (
    POINT,
    POINT_HELP,
    BranchArgument,
    KeepActiveOption,
    TenantOption,
    branch_point,
    is_lsn,
)
from excimer.cli.commands.endpoint import is_running, stop_endpoint
from excimer.cli.commands.tenant import tenant_name
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import StillRunningError, UsageError
from excimer.cli.installation import Installation, load_installation
from excimer.cli.local_processes import exclusive
from excimer.cli.moments import EXAMPLES, MomentError, parse_moment
from excimer.cli.session import Session, session_of

KeepOption = Annotated[
    str | None,
    typer.Option(
        "--preserve-under-name", metavar="BRANCH", help="Name for what the branch was.", show_default=False
    ),
]
StopOption = Annotated[
    bool, typer.Option("--stop-endpoints", help="Stop the branch's endpoints that run; else it is refused.")
]


def restore(
    context: typer.Context,
    branch_name: BranchArgument,
    to: Annotated[str, typer.Option("--to", metavar=POINT, help=POINT_HELP + " of the branch's history.")],
    preserve_under_name: KeepOption = None,
    stop_endpoints: StopOption = False,
    keep_active: KeepActiveOption = False,
    tenant: TenantOption = None,
) -> None:
    """Bring a branch back to an earlier state. What it was stays as a branch; endpoints stay on the name."""
    body = branch_point(to) | {"keep_active": keep_active}
    done = _replace(context, branch_name, tenant, "restore", body, preserve_under_name, stop_endpoints)
    session_of(context).say(
        f"branch {done['branch']['name']} is as it was at {done['branch']['ancestor_lsn']}; "
        f"what it was until now is branch {(done['old_branch'] or {}).get('name', '')}",
        done,
    )


def reset(
    context: typer.Context,
    branch_name: BranchArgument,
    preserve_under_name: KeepOption = None,
    stop_endpoints: StopOption = False,
    keep_active: KeepActiveOption = False,
    tenant: TenantOption = None,
) -> None:
    """Make a branch what its parent is now. What it was is deleted, unless you name it or others need it."""
    done = _replace(
        context,
        branch_name,
        tenant,
        "reset",
        {"keep_active": keep_active},
        preserve_under_name,
        stop_endpoints,
    )
    old = done["old_branch"]
    session_of(context).say(
        f"branch {done['branch']['name']} is as its parent at {done['branch']['ancestor_lsn']}; what it was "
        + (f"is branch {old['name']}" if old else "is gone"),
        done,
    )


def _replace(
    context: typer.Context,
    branch_name: str,
    tenant: str | None,
    action: str,
    body: dict[str, Any],
    kept_as: str | None,
    stop_endpoints: bool,
) -> dict[str, Any]:
    asked = {"timeline_id": secrets.token_hex(16), "preserve_under_name": kept_as} | body
    done: dict[str, Any] = _change(context, branch_name, tenant, action, asked, stop_endpoints=stop_endpoints)
    return done


def archive(
    context: typer.Context,
    branch_name: BranchArgument,
    stop_endpoints: StopOption = False,
    tenant: TenantOption = None,
) -> None:
    """Keep a branch in object storage only: no endpoint can start on it, and it costs next to nothing."""
    done = _change(context, branch_name, tenant, "archive", {}, stop_endpoints=stop_endpoints)
    session_of(context).say(f"branch {done['name']}: {done['state']}", done)


def activate(context: typer.Context, branch_name: BranchArgument, tenant: TenantOption = None) -> None:
    """Let a quiet branch act on the outside: extensions' background workers run from its next start on.

    Subscriptions that were disabled stay so: ALTER SUBSCRIPTION name ENABLE enables one.
    """
    done = _change(context, branch_name, tenant, "activate", {})
    session_of(context).say(f"branch {done['name']} is active from the next start of its endpoint on", done)


def unarchive(context: typer.Context, branch_name: BranchArgument, tenant: TenantOption = None) -> None:
    """Take an archived branch into service again."""
    done = _change(context, branch_name, tenant, "unarchive", {})
    session_of(context).say(f"branch {done['name']}: {done['state']}", done)


def detach_ancestor(context: typer.Context, branch_name: BranchArgument, tenant: TenantOption = None) -> None:
    """Make a branch independent of its parent; earlier branches of the parent become branches of this one."""
    done = _change(context, branch_name, tenant, "detach_ancestor", {})
    what = "has no parent" if done["state"] == "active" else "is being detached; it goes on in the background"
    session_of(context).say(f"branch {done['name']} {what}", done)


def lsn_at(
    context: typer.Context,
    branch_name: BranchArgument,
    time: Annotated[
        str, typer.Argument(metavar="TIME", help="2026-01-31T12:00:00Z, -5m, yesterday 14:00; zone: local.")
    ],
    tenant: TenantOption = None,
) -> None:
    """Show the LSN of a branch at a moment: the newest before any later commit."""
    try:
        moment = parse_moment(time, datetime.now(UTC).astimezone())
    except MomentError as error:
        raise UsageError(f"{time!r} is not a time like {EXAMPLES}") from error
    query = {"branch": branch_name, "timestamp": moment.isoformat()}
    found = _ask(context, tenant, "lsn_at_timestamp", query)
    session_of(context).say(found["lsn"], found)


def time_of(
    context: typer.Context,
    branch_name: BranchArgument,
    lsn: Annotated[str, typer.Argument(metavar="LSN", help="Like 0/16B3748.")],
    tenant: TenantOption = None,
) -> None:
    """Show when the last commit at or before an LSN of a branch happened."""
    if not is_lsn(lsn):
        raise UsageError(f"{lsn!r} is not an LSN like 0/16B3748")
    found = _ask(context, tenant, "timestamp_of_lsn", {"branch": branch_name, "lsn": lsn})
    session_of(context).say(found["timestamp"], found)


def _ask(context: typer.Context, tenant: str | None, question: str, query: dict[str, str]) -> dict[str, Any]:
    client = ControllerClient(load_installation(session_of(context).directory))
    answer: dict[str, Any] = client.get("tenants", tenant_name(client, tenant), question, query=query)
    return answer


def _change(
    context: typer.Context,
    branch_name: str,
    tenant: str | None,
    action: str,
    body: dict[str, Any],
    *,
    stop_endpoints: bool | None = None,
) -> dict[str, Any]:
    """`stop_endpoints` None: endpoints may run. No endpoint of this installation can start meanwhile."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    place = ("tenants", tenant_name(client, tenant), "branches", branch_name)
    stopped: list[str] = []
    is_archived = False
    try:
        if stop_endpoints:
            for name in _running(installation, client, place):
                stop_endpoint(session, installation, name, immediate=False)
                stopped.append(name)
        with exclusive(installation, session.note):
            if stop_endpoints is not None:
                _refuse_running(session, _running(installation, client, place), branch_name)
            with session.step(f"{action.replace('_', '-')} {branch_name}"):
                done: dict[str, Any] = client.post(*place, action, body=body)
        is_archived = action == "archive"
    finally:
        if stopped:
            session.note(stopped_sentence(stopped, is_archived=is_archived))
    return done if stop_endpoints is None else done | {"stopped_endpoints": stopped}


def stopped_sentence(names: Sequence[str], *, is_archived: bool = False) -> str:
    """That endpoints were stopped for a change, whether it came about or not, and how they run again."""
    which, verbs = (f"endpoint {names[0]}", "was stopped and stays so")
    if len(names) > 1:
        which, verbs = f"endpoints {', '.join(names)}", "were stopped and stay so"
    starts = ", ".join(f"excimer endpoint start {name}" for name in names)
    return f"{which} {verbs}: {'unarchive the branch, then ' if is_archived else ''}{starts}"


def _running(installation: Installation, client: ControllerClient, place: tuple[str, ...]) -> list[str]:
    timeline_id = client.get(*place)["timeline_id"]
    endpoints = client.get("endpoints")["endpoints"]
    names = [each["name"] for each in endpoints if each["timeline_id"] == timeline_id]
    return [name for name in names if is_running(installation, name)]


def _refuse_running(session: Session, running: list[str], branch_name: str) -> None:
    if running:
        raise StillRunningError(running_sentence(running, branch_name))


def running_sentence(running: Sequence[str], branch_name: str) -> str:
    """What is in the way of a change to a branch, and all that is to be stopped."""
    verb = "runs" if len(running) == 1 else "run"
    stops = ", ".join(f"excimer endpoint stop {name}" for name in running)
    return f"{', '.join(running)} {verb} on branch {branch_name}: {stops}, or pass --stop-endpoints"


COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "restore": restore,
    "reset": reset,
    "activate": activate,
    "archive": archive,
    "unarchive": unarchive,
    "detach-ancestor": detach_ancestor,
    "lsn-at": lsn_at,
    "time-of": time_of,
}
