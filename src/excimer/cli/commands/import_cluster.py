"""`excimer import DIR|URL --branch NAME`: an existing cluster becomes a branch of its own."""

import contextlib
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from excimer.base.errors import ConflictError, ExcimerError
from excimer.base.lsn import InvalidLsnError, Lsn, parse_lsn
from excimer.cli.branch_options import KeepActiveOption, TenantOption
from excimer.cli.commands.tenant import tenant_name
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import UsageError
from excimer.cli.import_source import ImportSource
from excimer.cli.installation import load_installation
from excimer.cli.session import Session, session_of

if TYPE_CHECKING:
    from excimer.cli.import_needs import ClusterNeeds

app = typer.Typer()

REPORT_INTERVAL_S: Final = 0.5
"""Between two refreshes of the progress line; where nobody watches, `QUIET_INTERVAL_S`."""
QUIET_INTERVAL_S: Final = 10.0
_URL: Final = re.compile(r"postgres(ql)?://")


@app.command("import")
def import_cluster(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR|URL",
            help="A stopped data directory, a base backup's directory, or postgres://… of a running server "
            "(a role with REPLICATION; passwords from ~/.pgpass or PGPASSWORD).",
        ),
    ],
    branch_name: Annotated[
        str, typer.Option("--branch", "-b", metavar="BRANCH", help="Name of the new branch.")
    ],
    tenant: TenantOption = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="LSN",
            help="Import WAL up to this LSN; default: all there is now.",
            show_default=False,
        ),
    ] = None,
    keep_active: KeepActiveOption = False,
    allow_lacking: Annotated[
        bool,
        typer.Option(
            "--allow-lacking", help="Also what the PostgreSQL build here lacks something for that it uses."
        ),
    ] = False,
) -> None:
    """Bring in an existing cluster, stopped or running, as a branch of its own.

    All of it arrives, or nothing. Not brought along: configuration, replication slots, statistics,
    contents of unlogged tables. Subscriptions come disabled, and schedulers do not run.
    """
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    place = ("tenants", tenant_name(client, tenant))
    _check_name_is_free(client, place, branch_name)
    with contextlib.closing(_open_source(session, source, to, allow_lacking=allow_lacking)) as opened:
        body = {"timeline_id": secrets.token_hex(16), "name": branch_name, "pg_version": opened.pg_version}
        body["keep_active"] = keep_active
        begun = client.post(*place, "imports", body=body)
        answer = _send(session, installation.admin_token(), begun, opened, client, place)
    branch = client.post(*place, "imports", begun["timeline_id"], "finish", body={})
    elapsed_s = round(time.monotonic() - session.started, 3)
    result = branch | {"readable_from": answer["oldest_lsn"], "elapsed_s": elapsed_s}
    session.say(
        f"branch {branch['name']} imported, PostgreSQL {branch['pg_version']}, "
        f"readable from {answer['oldest_lsn']} to {answer['last_record_lsn']}",
        result,
    )


def _check_name_is_free(client: ControllerClient, place: tuple[str, ...], name: str) -> None:
    """Before a backup is taken for nothing."""
    if any(row["name"] == name for row in client.get(*place, "branches")["branches"]):
        raise ConflictError(f"there is already a branch {name!r}")


def _open_source(session: Session, source: str, to: str | None, *, allow_lacking: bool) -> ImportSource:
    """Raises `SourceRefusedError` also for a cluster that would not work with the build that is here."""
    to_lsn = _parse_target(to)
    if _URL.match(source):
        from excimer.cli.import_server import ServerSource
        from excimer.cli.import_server_needs import server_needs

        needs = server_needs(source)
        return ServerSource(
            source, to_lsn, lambda version: _check_build(session, version, needs, allow_lacking=allow_lacking)
        )
    from excimer.cli.import_directory import DirectorySource
    from excimer.cli.import_directory_needs import directory_needs

    opened = DirectorySource(Path(source), to_lsn)
    needs = directory_needs(Path(source), opened.pg_version)
    _check_build(session, opened.pg_version, needs, allow_lacking=allow_lacking)
    return opened


def _check_build(session: Session, version: int, needs: "ClusterNeeds", *, allow_lacking: bool) -> None:
    from excimer.cli.import_needs import check_needs
    from excimer.postgres import find_build

    if not allow_lacking:
        for what in needs.unseen:
            session.note(f"not known whether the build here has all that is used by {what}")
        check_needs(find_build(version), needs)


def _parse_target(to: str | None) -> Lsn | None:
    try:
        return None if to is None else parse_lsn(to)
    except InvalidLsnError as error:
        raise UsageError(f"--to: {error}") from error


def _send(
    session: Session,
    token: str,
    begun: dict[str, Any],
    source: ImportSource,
    client: ControllerClient,
    place: tuple[str, ...],
) -> dict[str, Any]:
    from excimer.cli.import_upload import upload

    path = f"/v1/tenant/{begun['tenant_id']}/import/{begun['timeline_id']}"
    try:
        with _shown_progress(session, source) as progress:
            return upload(begun["pageserver_http_address"], path, token, source.frames(), progress.sent)
    except (ExcimerError, KeyboardInterrupt):
        with contextlib.suppress(ExcimerError):  # the controller forgets it by itself, too
            client.delete(*place, "imports", begun["timeline_id"])
        raise


class _Progress:
    """How much has been sent, how fast, and what is being done."""

    def __init__(self, session: Session, source: ImportSource) -> None:
        self._is_shown = not session.as_json
        self._is_watched = sys.stderr.isatty()
        self._source = source
        self._started = self._told = time.monotonic()
        self._sent_bytes = 0

    def sent(self, size_bytes: int) -> None:
        self._sent_bytes += size_bytes
        now = time.monotonic()
        if now - self._told >= (REPORT_INTERVAL_S if self._is_watched else QUIET_INTERVAL_S):
            self._told = now
            self._tell()

    def end(self) -> None:
        if self._is_shown and self._is_watched:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tell(self) -> None:
        if not self._is_shown:
            return
        mib = self._sent_bytes / (1 << 20)
        total = self._source.total_size_bytes / (1 << 20)
        speed = mib / max(time.monotonic() - self._started, 0.001)
        of_total = f" of about {total:,.0f}" if total > mib else ""
        line = f"{self._source.phase}: {mib:,.0f}{of_total} MiB, {speed:,.0f} MiB/s"
        if self._is_watched:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _shown_progress(session: Session, source: ImportSource) -> Iterator[_Progress]:
    progress = _Progress(session, source)
    try:
        yield progress
    finally:
        progress.end()
