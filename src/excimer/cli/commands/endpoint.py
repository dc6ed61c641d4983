"""`excimer endpoint create | start | stop | list | delete`: computes on branches."""

import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from excimer.base.errors import ConflictError
from excimer.base.lsn import InvalidLsnError, parse_lsn
from excimer.cli.commands.endpoint_config import config, parse_assignments
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import StillRunningError, UsageError
from excimer.cli.installation import (
    HOST,
    Installation,
    endpoint_part_name,
    free_ports,
    load_installation,
)
from excimer.cli.local_processes import (
    ENDPOINT_STOP_LIMIT_S,
    ProcessRecord,
    Running,
    exclusive,
    find_process,
    launch_parts,
    probe,
    stop_parts,
    wait_for_parts,
)
from excimer.cli.session import Session, session_of
from excimer.io.private_files import make_private_dir
from excimer.service.health import HTTP_OK

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True)
app.command()(config)

SUPERUSER: Final = "postgres"
DATABASE: Final = "postgres"
PORT_ATTEMPTS: Final = 5

NameArgument = Annotated[str, typer.Argument(help="Name of the endpoint.")]


def url_of(endpoint: dict[str, Any]) -> str:
    return f"postgres://{SUPERUSER}@{HOST}:{endpoint['postgres_port']}/{DATABASE}"


@app.command()
def create(
    context: typer.Context,
    name: NameArgument,
    branch_name: Annotated[str, typer.Option("--branch-name", help="Branch it serves.")] = "main",
    pg_version: Annotated[
        int | None, typer.Option(help="Must be the branch's; a check, not a choice.", show_default=False)
    ] = None,
    lsn: Annotated[
        str | None, typer.Option(help="Read-only, showing the branch at this LSN.", show_default=False)
    ] = None,
    pg_port: Annotated[
        int | None, typer.Option(help="PostgreSQL's port; default: a free one.", show_default=False)
    ] = None,
    tenant: Annotated[str, typer.Option(help="Tenant; default: the default one.", show_default=False)] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A PostgreSQL setting; repeatable.", show_default=False
        ),
    ] = None,
) -> None:
    """Make an endpoint on a branch. It does not run yet."""
    session = session_of(context)
    if lsn is not None:
        check_lsn(lsn)
    body = {
        "name": name,
        "tenant": tenant,
        "branch": branch_name,
        "mode": "primary" if lsn is None else "static",
        "lsn": lsn,
        "pg_version": pg_version,
        "postgres_settings": parse_assignments(settings or [], "--set"),
    }
    endpoint = create_endpoint(load_installation(session.directory), body, pg_port)
    session.say(
        f"endpoint {name} made on branch {endpoint['branch']}; next: excimer endpoint start {name}",
        endpoint | {"url": url_of(endpoint)},
    )


def check_lsn(text: str) -> None:
    """Raises `UsageError`."""
    try:
        parse_lsn(text)
    except InvalidLsnError as error:
        raise UsageError(f"--lsn {error}") from error


def create_endpoint(installation: Installation, body: dict[str, Any], pg_port: int | None) -> dict[str, Any]:
    """Finds ports and registers the endpoint; another command may take the same ports, so more than once."""
    client = ControllerClient(installation)
    for attempt in range(PORT_ATTEMPTS):
        known = client.get("endpoints")["endpoints"]
        taken = frozenset(port for row in known for port in (row["postgres_port"], row["http_port"]))
        ports = free_ports(2, taken)
        chosen = {"postgres_port": pg_port or ports[0], "http_port": ports[1]}
        try:
            made: dict[str, Any] = client.post("endpoints", body=body | chosen)
        except ConflictError as error:
            is_ours = "port belongs" not in str(error) or pg_port in taken
            if is_ours or attempt == PORT_ATTEMPTS - 1:
                raise
        else:
            return made
    raise AssertionError("the loop above returns or raises")


@app.command()
def start(context: typer.Context, name: NameArgument) -> None:
    """Start an endpoint and wait until PostgreSQL answers."""
    session = session_of(context)
    begun = time.monotonic()
    endpoint, is_new = start_endpoint(session, load_installation(session.directory), name)
    elapsed_s = time.monotonic() - begun
    url = url_of(endpoint)
    session.say(
        url if is_new else f"endpoint {name} runs already: {url}",
        endpoint | {"url": url, "started": is_new, "elapsed_s": round(elapsed_s, 3)},
    )


def start_endpoint(session: Session, installation: Installation, name: str) -> tuple[dict[str, Any], bool]:
    """The endpoint, and whether it was started now. Refuses a second primary on a branch."""
    client = ControllerClient(installation)
    with exclusive(installation, session.note):
        spec = client.get("endpoints", name, "spec")
        endpoint: dict[str, Any] = spec["endpoint"]
        if endpoint["mode"] == "primary":
            _refuse_second_primary(installation, client, endpoint)
        part = installation.endpoint_part(spec)
        make_private_dir(part.lock_dir, passable=True)
        launched = launch_parts(installation, [part])
    wait_for_parts(installation, [part], launched, session.done)
    return endpoint, bool(launched)


def _refuse_second_primary(
    installation: Installation, client: ControllerClient, endpoint: dict[str, Any]
) -> None:
    for other in client.get("endpoints")["endpoints"]:
        is_rival = other["timeline_id"] == endpoint["timeline_id"] and other["mode"] == "primary"
        if is_rival and other["name"] != endpoint["name"] and is_running(installation, other["name"]):
            raise StillRunningError(
                f"branch {endpoint['branch']} has a running primary, endpoint {other['name']}: "
                f"stop that first, or branch and start an endpoint there"
            )


def is_running(installation: Installation, name: str) -> bool:
    return _process_of(installation, name) is not None


def _process_of(installation: Installation, name: str) -> ProcessRecord | None:
    return find_process(installation, endpoint_part_name(name), installation.endpoint_dir(name))


@app.command()
def stop(
    context: typer.Context,
    name: NameArgument,
    destroy: Annotated[
        bool, typer.Option("--destroy", help="Also delete the endpoint; the branch stays.")
    ] = False,
    immediate: Annotated[bool, typer.Option("--immediate", help="Kill at once; no commit is lost.")] = False,
) -> None:
    """Stop an endpoint. Its local files are only a cache and are deleted.

    A static endpoint no longer keeps the moment that it shows: when that leaves what is retained, it cannot
    be started again. `excimer stop` keeps it.
    """
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    endpoint = client.get("endpoints", name)
    was_running = stop_endpoint(session, installation, name, immediate=immediate)
    if destroy:
        delete_endpoint(installation, client, name)
    elif endpoint["mode"] == "static":
        client.post("endpoints", name, "release", body=None)
    session.say(
        f"endpoint {name} " + ("deleted" if destroy else "stopped" if was_running else "did not run"),
        {"name": name, "stopped": was_running, "deleted": destroy},
    )


def stop_endpoint(session: Session, installation: Installation, name: str, *, immediate: bool) -> bool:
    """Whether it ran."""
    part = Running(endpoint_part_name(name), installation.endpoint_dir(name), ENDPOINT_STOP_LIMIT_S)
    with exclusive(installation, session.note):
        return bool(stop_parts(installation, [part], session.done, immediate=immediate))


def delete_endpoint(installation: Installation, client: ControllerClient, name: str) -> None:
    import shutil

    client.delete("endpoints", name)
    part = endpoint_part_name(name)
    shutil.rmtree(installation.endpoint_dir(name), ignore_errors=True)
    (installation.run_dir / f"{part}.toml").unlink(missing_ok=True)


@app.command("list")
def list_endpoints(context: typer.Context) -> None:
    """List endpoints with their states and URLs."""
    session = session_of(context)
    installation = load_installation(session.directory)
    endpoints = ControllerClient(installation).get("endpoints")["endpoints"]
    rows = []
    for row in endpoints:
        state = state_of(installation, row)
        reason = end_of(installation, row) if state == "ended" else None
        rows.append(row | {"state": state, "reason": reason, "url": url_of(row)})
    session.answer({"endpoints": rows}, lambda console: _show_endpoints(console, rows))


def state_of(installation: Installation, endpoint: dict[str, Any]) -> str:
    process = _process_of(installation, endpoint["name"])
    if process is None:
        return "stopped" if end_of(installation, endpoint) is None else "ended"
    return "running" if probe(f"{HOST}:{endpoint['http_port']}", process.pid) == HTTP_OK else "starting"


def end_of(installation: Installation, endpoint: dict[str, Any]) -> str | None:
    """Why an endpoint that does not run ended by itself."""
    from excimer.compute.last_end import read_end

    return read_end(installation.endpoint_dir(endpoint["name"]))


def _show_endpoints(console: "Console", rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not rows:
        console.print("no endpoints yet: excimer endpoint create NAME")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("endpoint", "branch", "state", "mode", "pg", "url"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        color = {"running": "green", "stopped": "dim", "ended": "red"}.get(row["state"], "yellow")
        mode = row["mode"] + (f" @{row['lsn']}" if row["lsn"] else "")
        table.add_row(
            row["name"],
            row["branch"],
            f"[{color}]{row['state']}[/{color}]",
            mode,
            str(row["pg_version"]),
            row["url"],
        )
    console.print(table)
    for row in rows:
        if row["reason"] is not None:
            console.print(f"endpoint {row['name']} ended: {row['reason']}", markup=False)


@app.command()
def delete(context: typer.Context, name: NameArgument) -> None:
    """Delete an endpoint that does not run; the branch stays."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    client.get("endpoints", name)
    if is_running(installation, name):
        raise StillRunningError(
            f"endpoint {name} runs: stop it first, or `excimer endpoint stop {name} --destroy`"
        )
    delete_endpoint(installation, client, name)
    session.say(f"endpoint {name} deleted", {"name": name, "deleted": True})
