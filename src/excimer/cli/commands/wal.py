"""`excimer wal receive BRANCH OUT`: a branch's committed WAL as files, while the command runs."""

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn, format_lsn
from excimer.cli.branch_options import BranchArgument, TenantOption
from excimer.cli.commands.tenant import tenant_name
from excimer.cli.controller_client import ControllerClient
from excimer.cli.installation import load_installation
from excimer.cli.session import Session, session_of

if TYPE_CHECKING:
    from excimer.export.wal_receiving import WalReceiving
    from excimer.wire.wal_access import WalAccess

app = typer.Typer(no_args_is_help=True)


class ReceivingFailedError(RefusedError):
    """WAL cannot be written where it was wanted."""


@app.callback()
def wal() -> None:
    """WAL of a branch."""


@app.command()
def receive(
    context: typer.Context,
    branch: BranchArgument,
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Where segments go: a new or empty directory, or one of this branch, to go on there.",
            show_default=False,
        ),
    ],
    once: Annotated[
        bool, typer.Option("--once", help="End when all is here that is committed now; else go on for ever.")
    ] = False,
    tenant: TenantOption = None,
) -> None:
    """Receive a branch's committed WAL from its safekeepers, over all stops and starts of its endpoint.

    Together with a base backup that was begun after this command, plain PostgreSQL recovers any later moment
    from it: restore_command = 'cp OUT/%f %p'.
    """
    session = session_of(context)
    client = ControllerClient(load_installation(session.directory))
    parts = "tenants", tenant_name(client, tenant), "branch_wal"
    ticket = client.post(*parts, body={"branch": branch})
    receiving = _receiving(session, client, ticket, directory)
    try:
        end_lsn = asyncio.run(_until_stopped(receiving, once=once))
    except OSError as error:
        raise ReceivingFailedError(
            f"{error.filename or directory} cannot be written: {error.strerror or error}"
        ) from error
    where = {"branch": ticket["branch"], "directory": str(directory.absolute())}
    if end_lsn is None:
        session.note("stopped; the same command goes on where this one was")
    else:
        lsn = format_lsn(end_lsn)
        session.say(f"{directory} has the WAL of branch {ticket['branch']} up to {lsn}", where | {"lsn": lsn})


def _receiving(
    session: Session, client: ControllerClient, ticket: dict[str, Any], directory: Path
) -> "WalReceiving":
    from excimer.export.ownership import export_owner
    from excimer.export.wal_directory import WalDirectory
    from excimer.export.wal_receiving import WalReceiving

    tenant_id, timeline_id = ticket["tenant_id"], ticket["timeline_id"]
    given = [ticket]

    async def ask_access() -> "WalAccess":
        """What came with the ticket, then by the branch's id: its name may change."""
        import msgspec

        from excimer.wire.wal_access import WalAccess

        if given:
            answer = given.pop()
        else:
            parts = "tenants", tenant_id, "branch_wal"
            answer = await asyncio.to_thread(client.post, *parts, body={"branch": timeline_id})
        return msgspec.convert(answer["access"], WalAccess)

    def open_directory(segment_size: int) -> WalDirectory:
        return WalDirectory(directory, tenant_id, timeline_id, segment_size, export_owner())

    return WalReceiving(tenant_id, timeline_id, ask_access, open_directory, session.note)


async def _until_stopped(receiving: "WalReceiving", *, once: bool) -> Lsn | None:
    """None: by SIGTERM or SIGINT, with all that had come on disk."""
    task = asyncio.ensure_future(receiving.run(once=once))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return None
