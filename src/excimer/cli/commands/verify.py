"""`excimer verify [ENDPOINT]`: an endpoint's pages beside what the pageserver serves at the same LSN."""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from excimer.base.keys import Fork
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.cli.branch_options import OptionalEndpointArgument
from excimer.cli.commands.endpoint_replica import running_primary
from excimer.cli.commands.export import access_of, renewal_of
from excimer.cli.commands.psql import running_endpoint
from excimer.cli.controller_client import ControllerClient
from excimer.cli.credentials import local_access
from excimer.cli.errors import EXIT_FAILED
from excimer.cli.installation import Installation, load_installation
from excimer.cli.progress import Progress
from excimer.cli.session import session_of

if TYPE_CHECKING:
    from excimer.verify.model import Finding, Verified

app = typer.Typer()

RATE_DEFAULT: Final = 200.0
SHOWN_MAX: Final = 100


@app.command()
def verify(
    context: typer.Context,
    endpoint: OptionalEndpointArgument = None,
    rate: Annotated[
        float,
        typer.Option(
            "--rate", metavar="MIB", help="Read at most so much in a second; 0: all that goes.", min=0
        ),
    ] = RATE_DEFAULT,
) -> None:
    """Compare every page that a running endpoint has on its disk with what the pageserver serves at the same
    LSN, while it works. Begins with a checkpoint. Exit code 1: they differ.
    """
    session = session_of(context)
    installation = load_installation(session.directory)
    found = running_endpoint(session, installation, endpoint)
    progress = Progress(session)
    begun = time.monotonic()
    try:
        result = _verify(installation, found, rate, progress)
    finally:
        progress.end()
    value = _as_json(found["name"], result)
    if session.as_json:
        session.answer(value, lambda _: None)
    else:
        for line in _lines(found["name"], result, time.monotonic() - begun):
            print(line)
    if result.differences:
        raise typer.Exit(EXIT_FAILED)


def _verify(
    installation: Installation, endpoint: dict[str, Any], rate: float, progress: Progress
) -> "Verified":
    from excimer.cli.verified_server import LocalVerifiedServer
    from excimer.compute.arena import Arena
    from excimer.compute.places import locate_places
    from excimer.verify.job import Rate, Subject, run_verification
    from excimer.verify.local_files import LocalFiles

    lsn = endpoint["lsn"]
    client = ControllerClient(installation)
    is_replica = endpoint["mode"] == "replica"
    primary = running_primary(installation, client, endpoint["timeline_id"]) if is_replica else None
    server = LocalVerifiedServer(
        local_access(installation, endpoint["name"]),
        None if lsn is None else parse_lsn(lsn),
        is_replica=is_replica,
        primary=None if primary is None else local_access(installation, primary),
    )
    body = {"branch": endpoint["timeline_id"]} | ({} if lsn is None else {"at_lsn": lsn})
    ticket = client.post("tenants", endpoint["tenant_id"], "branch_access", body=body)
    arena = Arena.open(locate_places(installation.endpoint_dir(endpoint["name"])).arena)
    try:
        files = LocalFiles(arena.data_dir, arena)
        subject = Subject(access_of(ticket), files, server, server.hints_are_logged)
        work = run_verification(subject, Rate(rate * (1 << 20)), progress.report, renewal_of(client, ticket))
        return asyncio.run(work)
    finally:
        arena.close()


def _as_json(endpoint: str, result: "Verified") -> dict[str, Any]:
    counts = result.counts
    return {
        "endpoint": endpoint,
        "lsn": format_lsn(result.lsn),
        "pg_version": result.pg_version,
        "relations": result.relations,
        "files": counts.files,
        "pages": counts.pages,
        "small_files": counts.small_files,
        "absent_pages": counts.absent_pages,
        "unwritten_pages": counts.unwritten_pages,
        "free_space_pages": counts.free_space_pages,
        "unlogged_files": counts.unlogged_files,
        "relations_in_creation": result.in_creation,
        "looks": result.looks,
        "is_cut_short": result.is_cut_short,
        "differences": [_difference_as_json(found) for found in result.differences],
    }


def _difference_as_json(found: "Finding") -> dict[str, Any]:
    told = found.disagreement
    return {
        "path": found.path,
        "name": found.name,
        "fork": None if found.fork is None else Fork(found.fork).name.lower(),
        "block": found.block,
        "reason": told.reason,
        "offset": told.offset,
        "here": told.here.hex(),
        "pageserver": told.served.hex(),
        "here_lsn": None if found.here_lsn is None else format_lsn(found.here_lsn),
        "pageserver_lsn": None if found.served_lsn is None else format_lsn(found.served_lsn),
        "asked_lsn": format_lsn(found.lsn),
    }


def _lines(endpoint: str, result: "Verified", elapsed_s: float) -> list[str]:
    counts, count = result.counts, len(result.differences)
    said = "no difference" if count == 0 else f"{count} difference{'' if count == 1 else 's'}"
    lines = [_difference_line(found) for found in result.differences[:SHOWN_MAX]]
    if count > SHOWN_MAX:
        lines.append(f"… {count - SHOWN_MAX} more; --json has them all")
    if result.is_cut_short:
        lines.append("so many that it stopped looking: there are more")
    lines.append(
        f"endpoint {endpoint} up to {format_lsn(result.lsn)}: {result.relations:,} relations, "
        f"{counts.pages:,} pages compared in {elapsed_s:.1f} s: {said}"
    )
    left = [
        (counts.absent_pages, "pages that are only at the pageserver"),
        (counts.unwritten_pages, "empty pages that WAL does not know yet"),
        (counts.free_space_pages, "pages of free space maps"),
        (counts.unlogged_files, "files of unlogged relations"),
        (result.in_creation, "relations whose transaction has not committed"),
    ]
    told = ", ".join(f"{number:,} {what}" for number, what in left if number)
    return [*lines, *([f"not compared: {told}"] if told else [])]


def _difference_line(found: "Finding") -> str:
    told = found.disagreement
    fork = "" if found.fork is None else f" {Fork(found.fork).name.lower()}"
    place = found.path if found.name is None else f"{found.name} ({found.path})"
    block = "" if found.block is None else f"{fork} block {found.block}"
    line = f"{place}{block}: {told.reason}"
    if told.here:
        line += f"; here {told.here.hex()}, pageserver {told.served.hex()}"
    lsns = [("here", found.here_lsn), ("pageserver", found.served_lsn), ("asked at", found.lsn)]
    known = ", ".join(f"{whose} {format_lsn(lsn)}" for whose, lsn in lsns if lsn is not None)
    return f"{line}; LSN {known}"
