"""`excimer timeline create | branch | list | delete | gc | compact`: branches.

Not here: what is done to their history (`timeline_history`).
"""

import secrets
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excimer.cli.branch_options import (
    POINT,
    POINT_HELP,
    BranchArgument,
    KeepActiveOption,
    NewBranchAlias,
    NewBranchArgument,
    TenantOption,
    VersionOption,
    branch_point,
    new_branch_name,
)
from excimer.cli.commands import timeline_history
from excimer.cli.commands.tenant import size_text, tenant_name
from excimer.cli.completion import complete_branch
from excimer.cli.controller_client import ControllerClient
from excimer.cli.installation import load_installation
from excimer.cli.service_silence import ask_service
from excimer.cli.session import PIPE_WIDTH, Session, session_of

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True)

PAGESERVER = "pageserver"


for _name, _command in timeline_history.COMMANDS.items():
    app.command(_name)(_command)


@app.command()
def create(
    context: typer.Context,
    name: NewBranchArgument = None,
    former_name: NewBranchAlias = None,
    tenant: TenantOption = None,
    pg_version: VersionOption = None,
) -> None:
    """Make a branch without an ancestor: a fresh, empty cluster."""
    session = session_of(context)
    branch_name = new_branch_name(name, former_name)
    installation = load_installation(session.directory)
    body = {"name": branch_name, "pg_version": pg_version or installation.config.pg_version}
    made = create_branch(session, tenant, body)
    session.say(f"branch {made['name']} made, fresh, PostgreSQL {made['pg_version']}", made)


@app.command()
def branch(
    context: typer.Context,
    name: NewBranchArgument = None,
    former_name: NewBranchAlias = None,
    ancestor: Annotated[
        str,
        typer.Option(
            "--ancestor",
            metavar="BRANCH",
            help="Name or id of the branch to start from.",
            autocompletion=complete_branch,
        ),
    ] = "main",
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar=POINT,
            help=POINT_HELP + " of the ancestor; default: now.",
            show_default=False,
        ),
    ] = None,
    keep_active: KeepActiveOption = False,
    tenant: TenantOption = None,
) -> None:
    """Make a branch of another one, at any moment of its history.

    It does not act on the outside by itself: its subscriptions are disabled, schedulers do not run.
    """
    session = session_of(context)
    branch_name = new_branch_name(name, former_name)
    body = {"name": branch_name, "ancestor": ancestor, "keep_active": keep_active}
    made = create_branch(session, tenant, body | branch_point(at))
    session.say(f"branch {made['name']} made from {ancestor} at {made['ancestor_lsn']}", made)


def create_branch(session: Session, tenant: str | None, body: dict[str, Any]) -> dict[str, Any]:
    client = ControllerClient(load_installation(session.directory))
    place = ("tenants", tenant_name(client, tenant), "branches")
    with session.step(f"branch {body['name']}"):
        made: dict[str, Any] = client.post(*place, body={"timeline_id": secrets.token_hex(16)} | body)
    return made


@app.command("list")
def list_branches(context: typer.Context, tenant: TenantOption = None) -> None:
    """List branches as a tree."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    name = tenant_name(client, tenant)
    answer = client.get("tenants", name, "branches")
    endpoints = client.get("endpoints")["endpoints"]
    found = ask_service(installation, PAGESERVER, lambda: client.get("tenants", name, "sizes"))
    known_sizes = found.answer or {"branches": [], "damaged": []}
    sizes = {row["timeline_id"]: row for row in known_sizes["branches"]}
    damage = {row["timeline_id"]: row["reason"] for row in known_sizes["damaged"]}
    for row in answer["branches"]:
        row["damage"] = damage.get(row["timeline_id"])
        known = sizes.get(row["timeline_id"], {})
        for kind in ("logical", "resident", "remote"):
            row[f"{kind}_size_bytes"] = known.get(f"{kind}_size_bytes")
    answer["problem"] = found.problem
    session.answer(answer, lambda console: _show_tree(console, name, answer["branches"], endpoints))
    if found.problem is not None:
        session.note(f"{found.problem}: sizes (?) and damage are not known")


def _show_tree(
    console: "Console", tenant: str, branches: list[dict[str, Any]], endpoints: list[dict[str, Any]]
) -> None:
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"tenant [bold]{escape(tenant)}[/bold]", guide_style="dim")
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
    console.width = PIPE_WIDTH  # the terminal wraps what is longer
    console.print(tree, highlight=False)
    for row in branches:
        if row["damage"]:
            console.print(
                f"branch {row['name']} is damaged: {row['damage']}",
                style="red",
                highlight=False,
                soft_wrap=True,
            )


def _branch_label(row: dict[str, Any], endpoints: list[dict[str, Any]]) -> str:
    from rich.markup import escape

    where = f" [dim]@{row['ancestor_lsn']}[/dim]" if row["ancestor_lsn"] else ""
    names = [endpoint["name"] for endpoint in endpoints if endpoint["timeline_id"] == row["timeline_id"]]
    used = f"  [cyan]{', '.join(names)}[/cyan]" if names else ""
    state = "" if row["state"] == "active" else f" [yellow]{row['state']}[/yellow]"
    state += " [red]damaged[/red]" if row["damage"] else ""
    identity = f"[dim]{row['timeline_id']} pg{row['pg_version']}[/dim]"
    size = row["logical_size_bytes"]
    shown = " ?" if size is None else f" {size_text(size)}"
    if row["state"] == "archived":
        shown = ""
    return f"[bold]{escape(row['name'])}[/bold]{where} {identity}{shown}{state}{used}"


@app.command()
def delete(
    context: typer.Context,
    branch_name: BranchArgument,
    tenant: TenantOption = None,
) -> None:
    """Delete a branch that has neither branches of its own nor endpoints."""
    session = session_of(context)
    client = ControllerClient(load_installation(session.directory))
    place = ("tenants", tenant_name(client, tenant), "branches", branch_name)
    with session.step(f"deleting branch {branch_name}"):
        answer = client.delete(*place)
    session.say(f"branch {branch_name}: {answer['state']}", answer)


@app.command()
def gc(
    context: typer.Context,
    branch_name: BranchArgument = "main",
    tenant: TenantOption = None,
) -> None:
    """Remove history that no window, branch or lease retains, now. It also happens by itself."""
    session = session_of(context)
    answer = _work_on(session, tenant, branch_name, "gc")
    session.say(
        f"branch {answer['branch']}: history is kept from {answer['cutoff_lsn']} on, and at "
        f"{answer['held_points']} older points; {answer['layers_removed']} layers went "
        f"({answer['removed_bytes']} bytes)",
        answer,
    )


@app.command()
def compact(
    context: typer.Context,
    branch_name: BranchArgument = "main",
    tenant: TenantOption = None,
) -> None:
    """Merge layers and make images as far as they are due, now. It also happens by itself."""
    session = session_of(context)
    answer = _work_on(session, tenant, branch_name, "compact")
    session.say(f"branch {answer['branch']}: {answer['steps']} steps", answer)


def _work_on(session: Session, tenant: str | None, branch: str, what: str) -> dict[str, Any]:
    client = ControllerClient(load_installation(session.directory))
    place = ("tenants", tenant_name(client, tenant), what)
    with session.step(f"{what} of {branch}"):
        answer: dict[str, Any] = client.post(*place, body={"branch": branch})
    return answer
