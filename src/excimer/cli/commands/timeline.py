"""`excimer timeline create | branch | list | delete`: branches."""

import re
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excimer.cli.commands.tenant import tenant_name
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import UsageError
from excimer.cli.installation import load_installation
from excimer.cli.session import Session, session_of

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True)

TenantOption = Annotated[str | None, typer.Option("--tenant", help="Tenant; default: the default one.")]

_LSN = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}\Z")


@app.command()
def create(
    context: typer.Context,
    branch_name: Annotated[str, typer.Option("--branch-name", help="Name of the new branch.")],
    tenant: TenantOption = None,
    pg_version: Annotated[
        int | None, typer.Option(help="PostgreSQL version; default: that of `init`.", show_default=False)
    ] = None,
) -> None:
    """Make a branch without an ancestor: a fresh, empty cluster."""
    session = session_of(context)
    installation = load_installation(session.directory)
    body = {"name": branch_name, "pg_version": pg_version or installation.config.pg_version}
    made = create_branch(session, tenant, body)
    session.say(f"branch {made['name']} made, fresh, PostgreSQL {made['pg_version']}", made)


@app.command()
def branch(
    context: typer.Context,
    branch_name: Annotated[str, typer.Option("--branch-name", help="Name of the new branch.")],
    ancestor: Annotated[
        str, typer.Option("--ancestor", "--ancestor-branch-name", help="Branch to start from.")
    ] = "main",
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            "--ancestor-start-lsn",
            help="LSN (0/16B3748) or time (2026-01-31T12:00:00Z; without zone: local) of the ancestor; "
            "default: now.",
            show_default=False,
        ),
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Make a branch of another one, at any moment of its history."""
    session = session_of(context)
    made = create_branch(session, tenant, {"name": branch_name, "ancestor": ancestor} | branch_point(at))
    session.say(f"branch {made['name']} made from {ancestor} at {made['ancestor_lsn']}", made)


def create_branch(session: Session, tenant: str | None, body: dict[str, Any]) -> dict[str, Any]:
    client = ControllerClient(load_installation(session.directory))
    place = ("tenants", tenant_name(client, tenant), "branches")
    with session.step(f"branch {body['name']}"):
        made: dict[str, Any] = client.post(*place, body={"timeline_id": secrets.token_hex(16)} | body)
    return made


def branch_point(at: str | None) -> dict[str, str]:
    """The request's field for an LSN or a time. Raises `UsageError`."""
    if at is None:
        return {}
    if _LSN.match(at):
        return {"at_lsn": at}
    try:
        moment = datetime.fromisoformat(at)
    except ValueError as error:
        raise UsageError(
            f"--at {at!r} is neither an LSN like 0/16B3748 nor a time like 2026-01-31T12:00:00Z"
        ) from error
    return {"at_timestamp": moment.astimezone(UTC).isoformat()}


@app.command("list")
def list_branches(context: typer.Context, tenant: TenantOption = None) -> None:
    """List branches as a tree."""
    session = session_of(context)
    client = ControllerClient(load_installation(session.directory))
    name = tenant_name(client, tenant)
    answer = client.get("tenants", name, "branches")
    endpoints = client.get("endpoints")["endpoints"]
    session.answer(answer, lambda console: _show_tree(console, name, answer["branches"], endpoints))


def _show_tree(
    console: "Console", tenant: str, branches: list[dict[str, Any]], endpoints: list[dict[str, Any]]
) -> None:
    from rich.tree import Tree

    tree = Tree(f"tenant [bold]{tenant}[/bold]", guide_style="dim")
    nodes: dict[str | None, Tree] = {None: tree}
    waiting = list(branches)
    while waiting:
        placed = [row for row in waiting if row["ancestor_timeline_id"] in nodes]
        if not placed:  # an ancestor that is being deleted is not listed
            placed = waiting
        for row in placed:
            parent = nodes.get(row["ancestor_timeline_id"], tree)
            nodes[row["timeline_id"]] = parent.add(_branch_label(row, endpoints), highlight=False)
            waiting.remove(row)
    console.print(tree, highlight=False)


def _branch_label(row: dict[str, Any], endpoints: list[dict[str, Any]]) -> str:
    where = f" [dim]@{row['ancestor_lsn']}[/dim]" if row["ancestor_lsn"] else ""
    names = [endpoint["name"] for endpoint in endpoints if endpoint["timeline_id"] == row["timeline_id"]]
    used = f"  [cyan]{', '.join(names)}[/cyan]" if names else ""
    state = "" if row["state"] == "active" else f" [yellow]{row['state']}[/yellow]"
    identity = f"[dim]{row['timeline_id']} pg{row['pg_version']}[/dim]"
    return f"[bold]{row['name']}[/bold]{where} {identity}{state}{used}"


@app.command()
def delete(
    context: typer.Context,
    branch_name: Annotated[str, typer.Argument(help="Name or id.")],
    tenant: TenantOption = None,
) -> None:
    """Delete a branch that has neither branches of its own nor endpoints."""
    session = session_of(context)
    client = ControllerClient(load_installation(session.directory))
    place = ("tenants", tenant_name(client, tenant), "branches", branch_name)
    with session.step(f"deleting branch {branch_name}"):
        answer = client.delete(*place)
    session.say(f"branch {branch_name}: {answer['state']}", answer)
