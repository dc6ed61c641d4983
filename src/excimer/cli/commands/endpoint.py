"""`excimer endpoint create | start | stop | suspend | restart | list | show | logs | delete`: computes.

Not here: how clients reach them (`endpoint_access`).
"""

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from excimer.base.errors import ConflictError, NotFoundError
from excimer.base.lsn import InvalidLsnError, parse_lsn
from excimer.cli.branch_options import (
    POINT,
    POINT_HELP,
    BranchOption,
    EndpointArgument,
    OptionalEndpointArgument,
    TenantOption,
    branch_point,
)
from excimer.cli.commands import endpoint_access
from excimer.cli.commands.endpoint_cache import CacheSizeOption, cache, parse_size, shown_size
from excimer.cli.commands.endpoint_config import config, parse_assignments
from excimer.cli.commands.endpoint_limits import (
    UNLIMITED,
    CpuOption,
    MemoryOption,
    limits,
    parse_limits,
    shown_limits,
    size_in_force,
)
from excimer.cli.commands.endpoint_limits import shown_size as shown_resources
from excimer.cli.commands.endpoint_replica import (
    ReplicaOption,
    mode_of,
    replica_progress,
    shown_mode,
)
from excimer.cli.commands.endpoint_suspend import (
    AfterOption,
    SuspendAfterOption,
    change_delay,
    last_active_at,
    parse_delay,
    shown_delay,
    shown_use,
)
from excimer.cli.commands.logs import FollowOption, LinesOption, show_log
from excimer.cli.controller_client import ControllerClient
from excimer.cli.credentials import find_credentials, public_url, url_of
from excimer.cli.endpoint_choice import choose_endpoint, choose_name
from excimer.cli.errors import NotRunningError, UsageError
from excimer.cli.installation import (
    HOST,
    Installation,
    endpoint_part_name,
    free_ports,
    load_installation,
)
from excimer.cli.local_processes import START_LIMIT_S, exclusive, find_process, refresh_machine
from excimer.cli.part_state import ask_part
from excimer.cli.service_silence import at_once, early_word_of
from excimer.cli.session import Session, session_of
from excimer.cli.supervision import log_path
from excimer.service.process_records import ProcessRecord

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True)
app.command()(config)
app.command()(cache)
app.command()(limits)

PORT_ATTEMPTS: Final = 5
STOP_ANSWER_LIMIT_S: Final = 3600.0
POSTGRES_LOG_NAME: Final = "postgres.log"
NOWHERE: Final[dict[str, Any]] = {"listen_host": HOST, "tls_certificate_path": None, "tls_key_path": None}
"""Where an endpoint listens unless it is told."""
NOT_RUNNING: Final[dict[str, Any]] = {
    "pid": None,
    "problems": [],
    "restart_pending": [],
    "start": None,
    "start_reason": None,
    **replica_progress({}),
    **size_in_force({}),
}

for _name, _command in endpoint_access.COMMANDS.items():
    app.command(_name)(_command)


@app.command()
def create(
    context: typer.Context,
    name: EndpointArgument,
    branch_name: BranchOption = "main",
    pg_version: Annotated[
        int | None,
        typer.Option(
            metavar="VERSION", help="Must be the branch's; a check, not a choice.", show_default=False
        ),
    ] = None,
    lsn: Annotated[str | None, typer.Option(hidden=True, help="Former name of --at, for LSNs only.")] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar=POINT,
            help=f"Read-only, showing the branch then: {POINT_HELP}.",
            show_default=False,
        ),
    ] = None,
    replica: ReplicaOption = False,
    pg_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="PostgreSQL's port; default: a free one.", show_default=False),
    ] = None,
    tenant: TenantOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A PostgreSQL setting; repeatable.", show_default=False
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="ADDR[:PORT]", help="Default: 127.0.0.1 and a free port.", show_default=False),
    ] = None,
    tls_cert: endpoint_access.CertificateOption = None,
    tls_key: endpoint_access.KeyOption = None,
    suspend_after: SuspendAfterOption = None,
    cache_size: CacheSizeOption = None,
    cpu: CpuOption = None,
    memory: MemoryOption = None,
) -> None:
    """Make an endpoint on a branch. It does not run yet."""
    session = session_of(context)
    access = endpoint_access.listen_changes(listen, tls_cert, tls_key)
    if pg_port is not None and "postgres_port" in access:
        raise UsageError("--pg-port and the port of --listen exclude each other")
    point = _point(at, lsn)
    body = {
        "name": name,
        "tenant": tenant or "",
        "branch": branch_name,
        "mode": mode_of(is_static=bool(point), is_replica=replica),
        "lsn": point.get("at_lsn"),
        "at_timestamp": point.get("at_timestamp"),
        "pg_version": pg_version,
        "postgres_settings": parse_assignments(settings or [], "--set"),
        "suspend_delay_s": None if suspend_after is None else parse_delay(suspend_after),
        "cache_size_mib": 0 if cache_size is None else parse_size(cache_size),
        "limits": parse_limits(cpu, memory),
    }
    pg_port = access.pop("postgres_port", pg_port)
    client = ControllerClient(installation := load_installation(session.directory))
    if access:
        _check_wish(installation, access, pg_port, branch_of(client, tenant, branch_name))
    endpoint = create_endpoint(installation, body | access, pg_port)
    url = url_of(installation, endpoint, find_credentials(installation, client, endpoint))
    session.say(f"{_shown_new(endpoint)}\n{url}", endpoint | {"url": url})


def _point(at: str | None, lsn: str | None) -> dict[str, Any]:
    """Of a static endpoint, as the controller has it; empty for others. Raises `UsageError`."""
    if lsn is None:
        return branch_point(at)
    check_lsn(lsn)
    if at is not None:
        raise UsageError("--lsn and --at exclude each other")
    return {"at_lsn": lsn}


def _shown_new(endpoint: Mapping[str, Any]) -> str:
    name, delay_s = endpoint["name"], endpoint["suspend_delay_s"]
    until = f"; it is suspended when nobody used it for {shown_delay(delay_s)}" if delay_s else ""
    return f"endpoint {name} made on branch {endpoint['branch']}{until}; next: excimer endpoint start {name}"


def _check_wish(
    installation: Installation, access: dict[str, Any], pg_port: int | None, branch: dict[str, Any]
) -> None:
    """Where a new endpoint on `branch` would listen. Raises as `check_listen_here`."""
    wish = NOWHERE | access | {"postgres_port": pg_port or 1, "pg_version": branch["pg_version"]}
    endpoint_access.check_listen_here(installation, wish)


def branch_of(client: ControllerClient, tenant: str | None, branch_name: str) -> dict[str, Any]:
    """Of a tenant, or (None) of the default one."""
    name = tenant or client.get("default_tenant")["tenant_id"]
    branch: dict[str, Any] = client.get("tenants", name, "branches", branch_name)
    return branch


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
def start(context: typer.Context, name: OptionalEndpointArgument = None) -> None:
    """Start an endpoint and wait until PostgreSQL answers."""
    session = session_of(context)
    begun = time.monotonic()
    installation = load_installation(session.directory)
    name = choose_name(ControllerClient(installation), name)
    endpoint, is_new = start_endpoint(session, installation, name)
    elapsed_s = time.monotonic() - begun
    url = current_url(session, installation, endpoint)
    session.say(
        url if is_new else f"endpoint {name} runs already: {url}",
        endpoint | {"url": url, "started": is_new, "elapsed_s": round(elapsed_s, 3)},
    )


def current_url(session: Session, installation: Installation, endpoint: dict[str, Any]) -> str:
    """With the bootstrap superuser's password, or a note why not."""
    credentials = find_credentials(installation, ControllerClient(installation), endpoint)
    if credentials.problem is not None:
        session.note(credentials.problem)
    return url_of(installation, endpoint, credentials)


def start_endpoint(
    session: Session,
    installation: Installation,
    name: str,
    *,
    is_restart: bool = False,
    is_immediate: bool = False,
) -> tuple[dict[str, Any], bool]:
    """The endpoint, and whether it was started now. The controller refuses a second primary on a branch.

    `is_restart`: what runs is stopped first, with no other command in between.
    """
    client = ControllerClient(installation)
    process = installation.endpoint_process(client.get("endpoints", name))
    with exclusive(installation, session.note):
        refresh_machine(installation)
    begun = time.monotonic()
    body = {"limit_s": START_LIMIT_S, "restart": is_restart, "immediate": is_immediate}
    if is_restart:
        client = ControllerClient(installation, limit_s=STOP_ANSWER_LIMIT_S)
    with early_word_of(session, installation, [process]):
        answer = client.post("endpoints", name, "start", body=body)
    if answer["started"]:
        session.done(process.name, time.monotonic() - begun)
    return answer["endpoint"], answer["started"]


def is_running(installation: Installation, name: str) -> bool:
    return _process_of(installation, name) is not None


def _process_of(installation: Installation, name: str) -> ProcessRecord | None:
    return find_process(installation, endpoint_part_name(name), installation.endpoint_dir(name))


@app.command()
def stop(
    context: typer.Context,
    name: OptionalEndpointArgument = None,
    destroy: Annotated[
        bool, typer.Option("--destroy", help="Also delete the endpoint, by its name; the branch stays.")
    ] = False,
    immediate: Annotated[bool, typer.Option("--immediate", help="Kill at once; no commit is lost.")] = False,
) -> None:
    """Stop an endpoint. Its local files are only a cache, with which the next start is faster.

    A static endpoint no longer keeps the moment that it shows: when that leaves what is retained, it cannot
    be started again. `excimer stop` keeps it.
    """
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    if destroy and name is None:
        raise UsageError("Missing argument 'ENDPOINT': what is deleted is named")
    endpoint = choose_endpoint(client, name)
    name = str(endpoint["name"])
    was_running = stop_endpoint(session, installation, name, immediate=immediate)
    if destroy:
        delete_endpoint(client, name)
    elif endpoint["mode"] != "primary":
        client.post("endpoints", name, "release", body=None)
    was_there = was_running or endpoint["state"] == "suspended"
    session.say(
        f"endpoint {name} " + ("deleted" if destroy else "stopped" if was_there else "did not run"),
        {"name": name, "stopped": was_running, "deleted": destroy},
    )


@app.command()
def suspend(context: typer.Context, name: OptionalEndpointArgument = None, after: AfterOption = None) -> None:
    """Suspend an endpoint now, as a fast stop; or say when it suspends itself. `endpoint start` wakes it.

    What runs in it is rolled back, and its clients are disconnected. A suspended endpoint has no process.
    """
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    endpoint = choose_endpoint(client, name)
    name = str(endpoint["name"])
    if after is not None:
        answer = change_delay(installation, client, endpoint, parse_delay(after))
        delay_s = answer["suspend_delay_s"]
        said = f"after {shown_delay(delay_s)} without use" if delay_s else "never by itself"
        when = "" if answer["in_force"] else f"; its manager has not taken that over: excimer logs {name}"
        session.say(f"endpoint {name} is suspended {said}{when}", answer)
        return
    if endpoint["mode"] == "static":
        raise UsageError(f"endpoint {name} is static, and keeps its moment only while it runs: stop it")
    is_suspended = state_of(installation, endpoint)["state"] == "suspended"
    answer = _stop(session, installation, name, suspend=True)
    was_running = answer["stopped"]
    if not was_running and not is_suspended:
        raise NotRunningError(f"endpoint {name} does not run: there is nothing to suspend")
    session.say(
        f"endpoint {name} suspended" if was_running else f"endpoint {name} is suspended already",
        answer["endpoint"] | {"suspended": was_running},
    )


def stop_endpoint(session: Session, installation: Installation, name: str, *, immediate: bool) -> bool:
    """Whether it ran."""
    return bool(_stop(session, installation, name, immediate=immediate)["stopped"])


def _stop(session: Session, installation: Installation, name: str, **wanted: bool) -> dict[str, Any]:
    """It takes as long as PostgreSQL's last checkpoint."""
    begun = time.monotonic()
    answer: dict[str, Any] = ControllerClient(installation, limit_s=STOP_ANSWER_LIMIT_S).post(
        "endpoints", name, "stop", body=wanted
    )
    if answer["stopped"]:
        session.done(f"{endpoint_part_name(name)} stopped", time.monotonic() - begun)
    return answer


def delete_endpoint(client: ControllerClient, name: str) -> None:
    """What another command deletes at the same time is deleted, too."""
    with contextlib.suppress(NotFoundError):
        client.delete("endpoints", name)


@app.command("list")
def list_endpoints(context: typer.Context) -> None:
    """List endpoints with their states and URLs."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    tenants = tenant_names(client)
    listed = client.get("endpoints")["endpoints"]
    states = at_once(lambda row: state_of(installation, row), listed)
    rows = [
        row
        | state
        | {"url": public_url(installation, row), "tenant": tenants.get(row["tenant_id"], row["tenant_id"])}
        for row, state in zip(listed, states, strict=True)
    ]
    session.answer({"endpoints": rows}, lambda console: _show_endpoints(console, rows))


def state_of(installation: Installation, endpoint: dict[str, Any]) -> dict[str, Any]:
    """``state``: as `part_state`, stopped, suspended, ended (by itself, for `reason`); and its `problems`.

    ``start``: warm or cold, and for what ``start_reason`` without the directory that was there.
    """
    process = _process_of(installation, endpoint["name"])
    if process is None:
        reason = end_of(installation, endpoint)
        asleep = "suspended" if endpoint["state"] == "suspended" else "stopped"
        return NOT_RUNNING | {"state": asleep if reason is None else "ended", "reason": reason}
    state, words, facts = ask_part(installation, process, f"{HOST}:{endpoint['http_port']}")
    return {
        "state": "starting" if state == "unwell" else state,
        "pid": process.pid,
        "reason": None,
        "problems": words,
        "restart_pending": [name for name in facts.get("restart_pending", "").split(",") if name],
        **last_active_at(facts),
        **replica_progress(facts),
        **size_in_force(facts),
        "start": facts.get("start") or None,
        "start_reason": facts.get("start_reason") or None,
    }


def end_of(installation: Installation, endpoint: dict[str, Any]) -> str | None:
    """Why an endpoint that does not run ended by itself."""
    from excimer.compute.last_end import read_end

    return read_end(installation.endpoint_dir(endpoint["name"]))


def _show_endpoints(console: "Console", rows: list[dict[str, Any]]) -> None:
    from excimer.cli.tables import plain_table, show_table

    if not rows:
        console.print("no endpoints yet: excimer endpoint create NAME")
        return
    now = time.time()
    table = plain_table(
        "endpoint", "tenant", "branch", "state", "used", "suspends", "cache", "size", "mode", "pg", "url"
    )
    for row in rows:
        color = {"running": "green", "stopped": "dim", "suspended": "dim", "ended": "red"}.get(
            row["state"], "yellow"
        )
        table.add_row(
            row["name"],
            row["tenant"],
            row["branch"],
            f"[{color}]{row['state']}[/{color}]",
            shown_use(row["last_active_at"], now),
            shown_delay(row["suspend_delay_s"]),
            shown_size(row["cache_size_mib"]),
            shown_resources(row),
            shown_mode(row),
            str(row["pg_version"]),
            row["url"],
        )
    show_table(console, table)
    for row in rows:
        if row["reason"] is not None:
            console.print(f"endpoint {row['name']} ended: {row['reason']}", markup=False)


def tenant_names(client: ControllerClient) -> dict[str, str]:
    """By id."""
    return {row["tenant_id"]: row["name"] for row in client.get("tenants")["tenants"]}


@app.command()
def show(context: typer.Context, name: OptionalEndpointArgument = None) -> None:
    """Show all of an endpoint: where it is, how it is, its settings."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    endpoint = choose_endpoint(client, name)
    value = (
        endpoint
        | state_of(installation, endpoint)
        | {
            "tenant": tenant_names(client).get(endpoint["tenant_id"], endpoint["tenant_id"]),
            "url": public_url(installation, endpoint),
            "postgres_log": str(installation.endpoint_dir(endpoint["name"]) / POSTGRES_LOG_NAME),
        }
    )
    session.answer(value, lambda console: _show_endpoint(console, value))


def _suspends(endpoint: dict[str, Any]) -> str:
    """When it suspends itself, and how often it was suspended."""
    delay_s, count = endpoint["suspend_delay_s"], endpoint["suspends"]
    after = f"after {shown_delay(delay_s)} without use" if delay_s else "never by itself"
    return after + (f"; {count} so far, the last one {endpoint['suspend_reason']}" if count else "")


def _show_endpoint(console: "Console", value: dict[str, Any]) -> None:
    from rich.text import Text

    from excimer.cli.tables import plain_table, show_table

    pending = value["restart_pending"]
    rows = [
        ("endpoint", value["name"]),
        ("state", ": ".join([value["state"], *filter(None, [value["reason"]]), *value["problems"]])),
        ("url", value["url"]),
        ("tenant", value["tenant"]),
        ("branch", value["branch"]),
        ("mode", shown_mode(value)),
        ("PostgreSQL", str(value["pg_version"])),
        ("process", str(value["pid"] or "")),
        ("started", ": ".join(filter(None, [value["start"], value["start_reason"]]))),
        ("made", value["created_at"][:19].replace("T", " ") + " UTC"),
        ("last used", shown_use(value["last_active_at"], time.time())),
        ("suspends", _suspends(value)),
        ("cache size", shown_size(value["cache_size_mib"])),
        ("limits", shown_limits(value["limits"]) or UNLIMITED),
        ("size now", shown_resources(value) if value["pid"] else ""),
        ("log", value["postgres_log"]),
        *(
            (
                each,
                value["postgres_settings"].get(each, "(default)") + (" (after restart)" * (each in pending)),
            )
            for each in sorted({*value["postgres_settings"], *pending})
        ),
    ]
    table = plain_table("", "")
    table.show_header = False
    for heading, said in rows:
        table.add_row(Text(heading), Text(said))
    show_table(console, table)


@app.command()
def restart(
    context: typer.Context,
    name: OptionalEndpointArgument = None,
    immediate: Annotated[bool, typer.Option("--immediate", help="Kill at once; no commit is lost.")] = False,
) -> None:
    """Stop an endpoint if it runs, and start it: settings that wait for a new start are then in force."""
    session = session_of(context)
    installation = load_installation(session.directory)
    begun = time.monotonic()
    chosen = choose_name(ControllerClient(installation), name)
    was_running = is_running(installation, chosen)
    endpoint, _ = start_endpoint(session, installation, chosen, is_restart=True, is_immediate=immediate)
    url = current_url(session, installation, endpoint)
    elapsed_s = round(time.monotonic() - begun, 3)
    session.say(url, endpoint | {"url": url, "was_running": was_running, "elapsed_s": elapsed_s})


@app.command("logs")
def show_logs(
    context: typer.Context,
    name: OptionalEndpointArgument = None,
    postgres: Annotated[
        bool, typer.Option("--postgres", help="PostgreSQL's own log instead of its manager's.")
    ] = False,
    follow: FollowOption = False,
    lines: LinesOption = 100,
) -> None:
    """Show the last lines of an endpoint's log: its manager's, or PostgreSQL's own."""
    session = session_of(context)
    installation = load_installation(session.directory)
    name = choose_name(ControllerClient(installation), name)
    if not installation.endpoint_dir(name).exists():
        ControllerClient(installation).get("endpoints", name)
        raise NotRunningError(f"endpoint {name} has not run yet: excimer endpoint start {name}")
    path = log_path(installation, endpoint_part_name(name))
    if postgres:
        path = installation.endpoint_dir(name) / POSTGRES_LOG_NAME
    if not path.exists():
        raise NotRunningError(f"endpoint {name} has written no such log yet: excimer endpoint start {name}")
    show_log(session, path, lines, follow=follow)


@app.command()
def delete(context: typer.Context, name: EndpointArgument) -> None:
    """Delete an endpoint that does not run; the branch stays."""
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    client.delete("endpoints", name)
    session.say(f"endpoint {name} deleted", {"name": name, "deleted": True})
