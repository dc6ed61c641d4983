"""`excimer init | start | stop | status`: the local installation as a whole."""

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer

from excimer.base.errors import NotFoundError, RetryableError
from excimer.cli.commands.endpoint_limits import size_in_force
from excimer.cli.commands.endpoint_suspend import last_active_at, shown_endpoint
from excimer.cli.completion import complete_part
from excimer.cli.controller_client import ControllerClient
from excimer.cli.endpoint_groups import remove_groups
from excimer.cli.errors import (
    EXIT_UNAVAILABLE,
    StateDirectoryError,
    StillRunningError,
    UsageError,
)
from excimer.cli.installation import (
    COMPUTE_NODE,
    CONFIG_NAME,
    OWN_ENTRIES,
    SAFEKEEPERS_MAX,
    TLS_NAME,
    Installation,
    complete_installation,
    create_installation,
    endpoint_part_name,
    load_installation,
    new_config,
    own_tls,
    renew_certificates,
)
from excimer.cli.local_processes import (
    STOP_LIMIT_S,
    Running,
    exclusive,
    find_process,
    hold_lock,
    launch_parts,
    running_endpoint,
    stop_parts,
    stop_supervisor,
    wait_for_parts,
)
from excimer.cli.part_state import ask_part
from excimer.cli.service_silence import at_once, early_word_of
from excimer.cli.session import Session, session_of
from excimer.cli.supervision import (
    SUPERVISOR,
    find_supervisor,
    forget_part,
    log_path,
    part_states,
    supervisor_lock_dir,
    supervisor_problem,
)
from excimer.compute.endpoint_remains import remove_remains
from excimer.compute.last_end import read_end
from excimer.io.private_files import make_private_dir
from excimer.service.log_lines import failure
from excimer.service.settings import TlsSettings
from excimer.service.tls import Tls
from excimer.supervisor.protocol import WatchedPart

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()

BROKER: Final = "broker"
ENDPOINT_COLUMNS: Final = ("branch", "postgres_port", "suspend_delay_s", "last_active_at", "limits")
STATUS_LIMIT_S: Final = 2.0
"""How long `status` waits for the controller's list, which comes from memory."""
_UNNAMEABLE: Final = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, and bytes that are no UTF-8 as Python has them in paths."""
MAKING_LOCK: Final = "making.lock"
MAKING_LIMIT_S: Final = 300.0
"""The first tenant takes an initdb, on a slow machine."""

FIRST_ENTRIES: Final = frozenset({"run", "logs", "keys", "endpoints", TLS_NAME})
"""What is made before the configuration, which makes a directory an installation."""

TRUST_LOCAL_NOTICE: Final = (
    "trust-local: every user of this machine can connect as any role, superusers included, without a password"
)
TrustLocalOption = Annotated[
    bool,
    typer.Option(
        "--trust-local", help="Let every user of this machine connect as any role, without a password."
    ),
]


@app.command()
def init(
    context: typer.Context,
    pg_version: Annotated[
        int, typer.Option(metavar="VERSION", help="PostgreSQL version of new tenants.")
    ] = 18,
    safekeepers: Annotated[
        int, typer.Option(metavar="COUNT", help="How many safekeepers: 1 is light, 3 survive a loss.")
    ] = 3,
    force: Annotated[
        bool, typer.Option("--force", help="Delete an installation that is there, with all its data.")
    ] = False,
    broker_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A NATS server to use, nats://USER:PASSWORD@HOST:PORT; default: our own.",
            show_default=False,
        ),
    ] = None,
    object_store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="For the data: s3://BUCKET/PREFIX, gs://…, az://…, file:///DIR; default: a local directory.",
            show_default=False,
        ),
    ] = None,
    object_store_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Of that store, as endpoint=URL; repeatable. Default: the environment, AWS_… and the like.",
            show_default=False,
        ),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Services speak TLS, with certificates that are made here.")
    ] = False,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TLS with this certificate, PEM, for 127.0.0.1.", show_default=False
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The key of --tls-cert.", show_default=False)
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The CA of --tls-cert.", show_default=False)
    ] = None,
    trust_local: TrustLocalOption = False,
) -> None:
    """Make a new local installation."""
    session = session_of(context)
    chosen = ChosenObjectStore(object_store, _parse_options(object_store_option or []))
    with making(session):
        installation = make_installation(
            session,
            pg_version,
            safekeepers,
            force=force,
            broker_url=broker_url,
            object_store=chosen,
            tls=_choose_tls(session.directory, tls, (tls_cert, tls_key, tls_ca)),
            trust_local=trust_local,
        )
    session.say(
        f"made an installation in {installation.directory}; next: excimer start",
        {"directory": str(installation.directory), "pg_version": pg_version, "safekeepers": safekeepers},
    )


class ChosenObjectStore(NamedTuple):
    url: str | None = None
    """None: a directory of the installation."""
    options: Mapping[str, str] = MappingProxyType({})


OWN_OBJECT_STORE: Final = ChosenObjectStore()


def make_installation(
    session: Session,
    pg_version: int,
    safekeepers: int,
    *,
    force: bool,
    broker_url: str | None = None,
    object_store: ChosenObjectStore = OWN_OBJECT_STORE,
    tls: TlsSettings | None = None,
    trust_local: bool = False,
) -> Installation:
    """Raises RefusedError for wrong options and for an object store that cannot be used."""
    from excimer.postgres import find_build

    if not 1 <= safekeepers <= SAFEKEEPERS_MAX or safekeepers % 2 == 0:
        raise UsageError(f"--safekeepers must be odd and at most {SAFEKEEPERS_MAX}: a majority decides")
    find_build(pg_version)
    _check_object_store(object_store)
    directory = session.directory
    if directory.is_dir() and any(directory.iterdir()) and not _is_unfinished(directory):
        if not force:
            raise StateDirectoryError(
                f"{directory} is not empty: name another with --dir, or delete an installation that is there "
                "with excimer init --force"
            )
        _remove_installation(directory)
    elif directory.exists() and not directory.is_dir():
        raise StateDirectoryError(f"{directory} is not a directory")
    config = new_config(
        pg_version,
        safekeepers,
        broker_url,
        object_store.url,
        dict(object_store.options),
        tls=tls,
        trust_local=trust_local,
    )
    return create_installation(directory, config)


@contextlib.contextmanager
def making(session: Session) -> Iterator[None]:
    """One command at a time makes an installation or makes one ready. If none comes of it nothing is left,
    and an empty directory that was there stays as it was.
    """
    run_dir = session.directory / "run"
    _refuse_foreign(session.directory)
    before = session.directory.stat() if session.directory.exists() else None
    make_private_dir(session.directory, passable=True)
    make_private_dir(run_dir)
    try:
        with hold_lock(run_dir / MAKING_LOCK, session.note, MAKING_LIMIT_S):
            yield
    finally:
        if not (session.directory / CONFIG_NAME).exists():
            with contextlib.suppress(OSError):  # only what is empty but for our lock
                (run_dir / MAKING_LOCK).unlink()
                run_dir.rmdir()
                _leave(session.directory, before)


def _leave(directory: Path, before: os.stat_result | None) -> None:
    """As it was found: None if it was not there. Raises OSError."""
    if before is None:
        directory.rmdir()
    elif not any(directory.iterdir()):
        os.chown(directory, -1, before.st_gid)
        directory.chmod(stat.S_IMODE(before.st_mode))


def _refuse_foreign(directory: Path) -> None:
    """Before its rights are changed or anything is put into it. Raises `StateDirectoryError`."""
    if _UNNAMEABLE.search(str(directory)):
        raise StateDirectoryError(
            f"{str(directory)!r} cannot hold an installation: the files that name it are UTF-8, a path a line"
        )
    if directory.exists() and not directory.is_dir():
        raise StateDirectoryError(f"{directory} is not a directory")
    entries = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    is_ours = CONFIG_NAME in entries or all(_is_own_entry(name) for name in entries)
    if not is_ours:
        raise StateDirectoryError(
            f"{directory} is not empty, and is no installation of Excimer: name another with --dir"
        )


def _is_own_entry(name: str) -> bool:
    return name in OWN_ENTRIES or name.startswith(f".{CONFIG_NAME}.")


def _is_unfinished(directory: Path) -> bool:
    """Whether somebody began to make an installation here and was interrupted: nothing has run in it yet."""
    entries = {entry.name for entry in directory.iterdir() if not entry.name.startswith(f".{CONFIG_NAME}.")}
    begun = [*(directory / "run").glob("*"), *(directory / "endpoints").glob("*")]
    return entries <= FIRST_ENTRIES and all(path.suffix == ".lock" for path in begun)


def _choose_tls(
    directory: Path, is_own: bool, given: tuple[Path | None, Path | None, Path | None]
) -> TlsSettings | None:
    """Raises `UsageError`, `TlsFilesError` for given files that are of no use."""
    certificate, key, ca = given
    if certificate is None and key is None and ca is None:
        return own_tls(directory.absolute() / TLS_NAME) if is_own else None
    if certificate is None or key is None or ca is None:
        raise UsageError("--tls-cert, --tls-key and --tls-ca belong together")
    settings = TlsSettings(certificate=certificate.absolute(), key=key.absolute(), ca=ca.absolute())
    Tls(settings)
    return settings


def _parse_options(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if any(not key or not equals for key, equals, _ in pairs):
        raise UsageError("--object-store-option is written KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _check_object_store(chosen: ChosenObjectStore) -> None:
    """Tries it out now rather than at the first start. Raises RefusedError, `ObjectStoreError`."""
    if chosen.url is None:
        if chosen.options:
            raise UsageError("--object-store-option needs --object-store")
        return
    from excimer.io.object_store_probe import check_object_store
    from excimer.io.obstore_object_store import CallLimits, ObstoreObjectStore

    limits = CallLimits(connect_s=3, request_s=8, call_s=8)  # somebody waits for the answer
    check_object_store(ObstoreObjectStore(chosen.url, chosen.options, limits), chosen.url)


def _remove_installation(directory: Path) -> None:
    """Removes what is ours; refuses while anything runs, and when something is not ours."""
    foreign = sorted(entry.name for entry in directory.iterdir() if entry.name not in OWN_ENTRIES)
    if foreign:
        raise StateDirectoryError(
            f"{directory} holds {foreign[0]!r}, which is not Excimer's: remove it yourself"
        )
    for record in sorted((directory / "run").glob("*.pid")):
        lock_dir = _lock_dir_of(directory, record.stem)
        if find_process(_unconfigured(directory), record.stem, lock_dir) is not None:
            raise StillRunningError(f"{record.stem} runs in {directory}: run `excimer stop` first")
    for name in OWN_ENTRIES:
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _unconfigured(directory: Path) -> Installation:
    """An installation whose configuration may be damaged; only its directories are used."""
    return Installation(directory, new_config(0, 1))


def _lock_dir_of(directory: Path, part: str) -> Path:
    if part == SUPERVISOR:
        return supervisor_lock_dir(directory / "run")
    if part == COMPUTE_NODE:
        return directory / COMPUTE_NODE
    kind, _, name = part.partition("-")
    return directory / {"safekeeper": "safekeepers", "endpoint": "endpoints"}.get(kind, kind) / name


@app.command()
def start(context: typer.Context) -> None:
    """Start the services that do not run: broker, safekeepers, pageserver, controller, compute node."""
    session = session_of(context)
    installation = load_installation(session.directory)
    started = start_services(session, installation)
    session.say(
        f"{len(started)} started in {time.monotonic() - session.started:.2f} s"
        if started
        else "everything runs",
        {"started": started},
    )
    endpoints = _endpoint_rows(installation)
    if endpoints and all(row["pid"] is None for row in endpoints):
        session.note("no endpoint runs: `excimer endpoint start NAME`, or `excimer up` for main")


def start_services(session: Session, installation: Installation) -> list[str]:
    """Names of those that did not run."""
    with exclusive(installation, session.note):
        renew_certificates(installation)
        installation = complete_installation(load_installation(installation.directory))
        parts = installation.service_parts()
        launched = launch_parts(installation, parts)
    with early_word_of(session, installation, parts):
        wait_for_parts(installation, parts, launched, session.done)
    return list(launched)


@app.command()
def stop(
    context: typer.Context,
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PART",
            help="Only these services, as `status` names them.",
            show_default=False,
            autocompletion=complete_part,
        ),
    ] = None,
    immediate: Annotated[
        bool, typer.Option("--immediate", help="Kill at once, as a power failure would; no commit is lost.")
    ] = False,
) -> None:
    """Stop endpoints, then services; or only the services named. Data stays."""
    session = session_of(context)
    installation = load_installation(session.directory)
    if parts:
        stopped = stop_services(session, installation, parts, immediate=immediate)
    else:
        stopped = stop_everything(session, installation, immediate=immediate)
    session.say(f"{len(stopped)} stopped" if stopped else "nothing ran", {"stopped": stopped})


def stop_services(
    session: Session, installation: Installation, names: list[str], *, immediate: bool
) -> list[str]:
    """Names of those that ran. They stay stopped until the next start. Raises `NotFoundError`."""
    known = {part.name: part for part in installation.service_parts()}
    for name in names:
        if name not in known:
            raise NotFoundError(
                f"no service {name!r}; there are: {', '.join(known)}; for an endpoint: excimer endpoint stop"
            )
    running = [Running(name, known[name].lock_dir, STOP_LIMIT_S) for name in dict.fromkeys(names)]
    with exclusive(installation, session.note):
        for each in running:
            forget_part(installation, each.part)
        return stop_parts(installation, running, session.done, immediate=immediate)


def stop_everything(session: Session, installation: Installation, *, immediate: bool) -> list[str]:
    """Names of the parts that ran."""
    stopped: list[str] = []
    with exclusive(installation, session.note):
        stop_supervisor(installation, immediate=immediate)
        for stage in _stop_stages(installation):
            stopped += stop_parts(installation, stage, session.done, immediate=immediate)
            for each in stage:
                if each.lock_dir.parent == installation.directory / "endpoints":
                    remove_remains(each.lock_dir)
        remove_groups(installation)
    return stopped


def _stop_stages(installation: Installation) -> list[list[Running]]:
    """Who starts endpoints; those as the directory knows them, for services may be down; the broker last."""
    endpoints_dir = installation.directory / "endpoints"
    endpoints = sorted(endpoints_dir.iterdir()) if endpoints_dir.is_dir() else []
    services = [Running(part.name, part.lock_dir, STOP_LIMIT_S) for part in installation.service_parts()]
    return [
        [running for running in services if running.part == COMPUTE_NODE],
        [running_endpoint(installation, path.name) for path in endpoints],
        [running for running in services if running.part not in (COMPUTE_NODE, BROKER)],
        [running for running in services if running.part == BROKER],
    ]


@app.command()
def status(context: typer.Context) -> None:
    """Show which parts run. The exit code is 4 unless all services are well."""
    session = session_of(context)
    installation = load_installation(session.directory)
    rows, endpoint_rows = at_once(lambda ask: ask(installation), [_service_rows, _endpoint_rows])
    services_well = all(row["state"] == "running" for row in rows)
    rows += endpoint_rows
    tls = _tls_status(installation)
    trusts = installation.config.trust_local
    supervisor, problem = find_supervisor(installation), supervisor_problem(installation)
    value = {
        "directory": str(installation.directory),
        "well": services_well,
        "supervisor": {"pid": None if supervisor is None else supervisor.pid, "problem": problem},
        "trust_local": trusts,
        "parts": rows,
        "tls": tls,
    }
    session.answer(
        value,
        lambda console: _show_status(console, rows, tls, trusts_local=trusts, problem=problem),
    )
    if not services_well:
        raise typer.Exit(EXIT_UNAVAILABLE)


def _restarts(states: Mapping[str, WatchedPart], part: str) -> dict[str, Any]:
    """How often the supervisor has started a part again, and how its last process ended."""
    state = states.get(part, WatchedPart(pid=None))
    return {"restarts": state.restarts, "last_end": state.last_end, "is_awaited": state.is_awaited}


def _tls_status(installation: Installation) -> dict[str, str] | None:
    """None: services speak plainly, on loopback addresses only."""
    tls = installation.config.tls
    if tls is None:
        return None
    from excimer.cli.certificates import end_of_certificate

    end = end_of_certificate(tls.certificate)
    expires = "unreadable" if end is None else end.isoformat(timespec="seconds")
    return {"certificate": str(tls.certificate), "expires": expires, "ca": str(tls.ca)}


def _status_row(
    installation: Installation, part: str, lock_dir: Path, http_address: str, *, is_suspended: bool = False
) -> dict[str, Any]:
    process = find_process(installation, part, lock_dir)
    state = "suspended" if is_suspended else "stopped"
    warnings: list[str] = []
    facts: dict[str, str] = {}
    if process is None:
        reason = read_end(lock_dir) or failure(log_path(installation, part))
        if reason is not None:
            state, warnings = "ended", [reason]
    else:
        state, warnings, facts = ask_part(installation, process, http_address)
    return {
        **last_active_at(facts),
        **size_in_force(facts),
        "part": part,
        "state": state,
        "pid": process.pid if process else None,
        "http": http_address,
        "warnings": warnings,
    }


def _service_rows(installation: Installation) -> list[dict[str, Any]]:
    states = part_states(installation)
    return at_once(
        lambda part: (
            _status_row(installation, part.name, part.lock_dir, part.http_address)
            | _restarts(states, part.name)
        ),
        installation.service_parts(),
    )


def _endpoint_rows(installation: Installation) -> list[dict[str, Any]]:
    try:
        client = ControllerClient(installation, limit_s=STATUS_LIMIT_S)
        endpoints = client.get("endpoints")["endpoints"]
    except RetryableError:
        return _unknown_endpoint_rows(installation)
    return at_once(
        lambda endpoint: (
            {name: endpoint[name] for name in ENDPOINT_COLUMNS}
            | _status_row(
                installation,
                endpoint_part_name(endpoint["name"]),
                installation.endpoint_dir(endpoint["name"]),
                f"127.0.0.1:{endpoint['http_port']}",
                is_suspended=endpoint["state"] == "suspended",
            )
        ),
        endpoints,
    )


def _unknown_endpoint_rows(installation: Installation) -> list[dict[str, Any]]:
    """Endpoints that run without a controller, which alone knows where to ask how they are."""
    directory = installation.directory / "endpoints"
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    found = [
        (endpoint_part_name(name), find_process(installation, endpoint_part_name(name), directory / name))
        for name in names
    ]
    return [
        {"part": part, "state": "unknown", "pid": process.pid, "http": "", "warnings": []}
        for part, process in found
        if process is not None
    ]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _show_status(
    console: "Console",
    rows: list[dict[str, Any]],
    tls: dict[str, str] | None,
    *,
    trusts_local: bool = False,
    problem: str | None = None,
) -> None:
    from excimer.cli.tables import plain_table, show_table

    table = plain_table("part", "state", "pid", "http", "")
    colors = {"running": "green", "stopped": "dim", "suspended": "dim"}
    for row in rows:
        color = colors.get(row["state"], "yellow")
        extra = shown_endpoint(row)
        if row.get("restarts"):
            extra = f"restarted {_times(row['restarts'])}, the last one {row['last_end']}"
        table.add_row(
            row["part"], f"[{color}]{row['state']}[/{color}]", str(row["pid"] or ""), row["http"], extra
        )
    show_table(console, table)
    if tls is not None:
        line = f"TLS between services: {tls['certificate']}, until {tls['expires']}"
        console.print(line, highlight=False, soft_wrap=True)
    for row in rows:
        for warning in row["warnings"]:
            console.print(f"{row['part']}: {warning}", style="red", highlight=False, soft_wrap=True)
    if problem is not None:
        console.print(problem, style="red", highlight=False, soft_wrap=True)
    if trusts_local:
        console.print(TRUST_LOCAL_NOTICE, style="yellow", highlight=False, soft_wrap=True)
