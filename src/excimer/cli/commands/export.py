"""`excimer export BRANCH [--at …] OUT`: a branch as a plain data directory or a tar."""

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from excimer.base.errors import RefusedError
from excimer.base.lsn import format_lsn, parse_lsn
from excimer.cli.branch_options import POINT, POINT_HELP, BranchArgument, TenantOption, branch_point
from excimer.cli.commands.tenant import tenant_name
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import UsageError
from excimer.cli.installation import load_installation
from excimer.cli.progress import Progress
from excimer.cli.session import Session, session_of

if TYPE_CHECKING:
    from excimer.export.job import Exported
    from excimer.export.ownership import Owner
    from excimer.export.page_stream import BranchAccess
    from excimer.export.reading_token import Renew
    from excimer.export.sink import ExportSink

app = typer.Typer()

STANDARD_OUTPUT: Final = "-"
FOREIGN_SUFFIXES: Final = frozenset({".zip", ".gz", ".zst", ".xz", ".txz", ".bz2", ".tbz2", ".lz4", ".7z"})


class ExportFailedError(RefusedError):
    """The export cannot be written."""


@app.command()
def export(
    context: typer.Context,
    branch: BranchArgument,
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="A directory to make; or a file to make, by its name: .tar, .tar.gz, .tgz, .tar.zst; "
            "or -, a tar to standard output.",
            show_default=False,
        ),
    ],
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar=POINT,
            help=POINT_HELP + "; default: now.",
            show_default=False,
        ),
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Write a branch as a data directory that plain PostgreSQL starts, without Excimer."""
    from excimer.export.ownership import export_owner

    session = session_of(context)
    owner = export_owner()
    sink = sink_for(out, owner)
    client = ControllerClient(load_installation(session.directory))
    body = {"branch": branch} | branch_point(at)
    ticket = client.post("tenants", tenant_name(client, tenant), "branch_access", body=body)
    begun = time.monotonic()
    try:
        exported = asyncio.run(_export(client, ticket, sink, Progress(session)))
    except OSError as error:
        raise ExportFailedError(
            f"{error.filename or out} cannot be written: {error.strerror or error}; "
            "nothing is left of the export"
        ) from error
    except KeyboardInterrupt:
        session.note("what was written of the export is removed again")
        raise
    _tell(session, ticket, out, owner, exported, time.monotonic() - begun)


def sink_for(out: str, owner: "Owner") -> "ExportSink":
    """Where `out` says. Raises `UsageError`, and what sinks do."""
    from excimer.export.directory_sink import DirectorySink
    from excimer.export.tar_sink import TarSink, tar_compression

    if not out:
        raise UsageError("OUT is empty: name a directory or a file")
    now_s = int(time.time())
    if out == STANDARD_OUTPUT:
        if sys.stdout.isatty():
            raise UsageError("a tar is not for the terminal: send standard output to a file or a program")
        return TarSink(owner, now_s, stream=sys.stdout.buffer)
    if tar_compression(out) is not None:
        return TarSink(owner, now_s, place=Path(out))
    if Path(out).suffix in FOREIGN_SUFFIXES:
        raise UsageError(f"{out}: only .tar, .tar.gz, .tgz and .tar.zst are written, or a directory")
    return DirectorySink(Path(out), owner)


def access_of(ticket: dict[str, Any]) -> "BranchAccess":
    """What the controller has answered to a reader of a branch."""
    from excimer.export.page_stream import BranchAccess
    from excimer.export.reading_token import NewToken, ReadingToken

    return BranchAccess(
        ticket["tenant_id"],
        ticket["timeline_id"],
        ticket["page_service_address"],
        ticket["pageserver_http_address"],
        ReadingToken(NewToken(ticket["token"], ticket["valid_for_s"])),
    )


def renewal_of(client: ControllerClient, ticket: dict[str, Any]) -> "Renew":
    """Asks for the same point of the same branch again, which may have another name by now."""
    from excimer.export.reading_token import NewToken

    body = {"branch": ticket["timeline_id"], "at_lsn": ticket["lsn"]}

    async def renew() -> NewToken:
        parts = "tenants", ticket["tenant_id"], "branch_access"
        newer = await asyncio.to_thread(client.post, *parts, body=body)
        return NewToken(newer["token"], newer["valid_for_s"])

    return renew


async def _export(
    client: ControllerClient, ticket: dict[str, Any], sink: "ExportSink", progress: "Progress"
) -> "Exported":
    from excimer.export.job import run_export

    lsn, renew = parse_lsn(ticket["lsn"]), renewal_of(client, ticket)
    try:
        return await run_export(access_of(ticket), lsn, sink, progress.report, renew)
    finally:
        progress.end()


def _tell(
    session: Session, ticket: dict[str, Any], out: str, owner: "Owner", exported: "Exported", elapsed_s: float
) -> None:
    """To standard output, unless the tar is there."""
    lsn = format_lsn(exported.lsn)
    what = (
        f"branch {ticket['branch']} at {lsn}: {exported.file_count} files, "
        f"{exported.size_bytes >> 20} MiB of pages, {elapsed_s:.1f} s"
    )
    if out == STANDARD_OUTPUT:
        session.note(what)
        return
    value = {
        "branch": ticket["branch"],
        "lsn": lsn,
        "pg_version": exported.pg_version,
        "out": str(Path(out).absolute()),
        "owner": owner.name,
        "file_count": exported.file_count,
        "size_bytes": exported.size_bytes,
    }
    start = ""
    if Path(out).is_dir():
        start = f"\nstart it as {owner.name} with PostgreSQL {exported.pg_version}: pg_ctl -D {out} start"
    session.say(f"{out} is {what}{start}", value)
