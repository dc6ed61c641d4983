"""`excimer up [--demo]`: from nothing to a postgresql:// URL; safe to repeat."""

import contextlib
import time
from typing import Annotated, Final

import typer

from excimer.base.errors import NotFoundError
from excimer.cli.commands.endpoint import create_endpoint, current_url, start_endpoint
from excimer.cli.commands.installation import (
    TrustLocalOption,
    make_installation,
    making,
    start_services,
)
from excimer.cli.commands.tenant import create_tenant
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import BusyError
from excimer.cli.installation import CONFIG_NAME, Installation, load_installation
from excimer.cli.session import Session, session_of

app = typer.Typer()

ENDPOINT: Final = "main"
TENANT: Final = "default"
DEFAULT_VERSION: Final = 18
SAFEKEEPERS: Final = 3
TENANT_LIMIT_S: Final = 120.0
POLL_S: Final = 0.2


@app.command()
def up(
    context: typer.Context,
    demo: Annotated[
        bool, typer.Option("--demo", help="Then load flights, branch, diverge, restart everything, compare.")
    ] = False,
    pg_version: Annotated[
        int | None,
        typer.Option(
            metavar="VERSION",
            help=f"PostgreSQL version of a new installation; default: {DEFAULT_VERSION}.",
            show_default=False,
        ),
    ] = None,
    safekeepers: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help=f"How many safekeepers a new installation has; default: {SAFEKEEPERS}.",
            show_default=False,
        ),
    ] = None,
    trust_local: TrustLocalOption = False,
) -> None:
    """Make an installation if there is none, start everything, print a postgresql:// URL."""
    session = session_of(context)
    url = bring_up(session, pg_version, safekeepers, trust_local=trust_local)
    if demo:
        from excimer.cli.demo import run_demo

        run_demo(session)
    elapsed_s = time.monotonic() - session.started
    session.done("ready", elapsed_s)
    session.say(url, {"url": url, "elapsed_s": round(elapsed_s, 3)})


def bring_up(
    session: Session, pg_version: int | None, safekeepers: int | None, *, trust_local: bool = False
) -> str:
    """The URL of the endpoint `main`, running. What an interrupted one has left half done is done now."""
    with making(session):
        if (session.directory / CONFIG_NAME).exists():
            installation = load_installation(session.directory)
            _say_what_does_nothing(session, installation, pg_version, safekeepers, trust_local=trust_local)
        else:
            with session.step(f"installation in {session.directory}"):
                installation = make_installation(
                    session,
                    pg_version or DEFAULT_VERSION,
                    safekeepers or SAFEKEEPERS,
                    force=False,
                    trust_local=trust_local,
                )
        start_services(session, installation)
        _ensure_tenant(session, installation)
        _ensure_endpoint(installation)
    endpoint, _ = start_endpoint(session, installation, ENDPOINT)
    return current_url(session, installation, endpoint)


def _say_what_does_nothing(
    session: Session,
    installation: Installation,
    pg_version: int | None,
    safekeepers: int | None,
    *,
    trust_local: bool = False,
) -> None:
    """Options that only a new installation has an ear for."""
    from excimer.controller.core import PG_VERSIONS

    config = installation.config
    if pg_version not in (None, config.pg_version):
        instead = (
            f"for another version: excimer tenant create NAME --pg-version {pg_version}"
            if pg_version in PG_VERSIONS
            else f"versions are {PG_VERSIONS[0]} to {PG_VERSIONS[-1]}"
        )
        session.note(
            f"--pg-version {pg_version} does nothing here: {session.directory} is of PostgreSQL "
            f"{config.pg_version}; {instead}"
        )
    if safekeepers not in (None, len(config.safekeepers)):
        session.note(
            f"--safekeepers {safekeepers} does nothing here: {session.directory} has "
            f"{len(config.safekeepers)}"
        )
    if trust_local and not config.trust_local:
        session.note(
            "--trust-local does nothing here: the installation asks for passwords "
            f"(trust_local in {session.directory / CONFIG_NAME})"
        )


def _ensure_tenant(session: Session, installation: Installation) -> None:
    """A default tenant, also where an earlier `up` was interrupted while one was made."""
    client = ControllerClient(installation)
    deadline = time.monotonic() + TENANT_LIMIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(NotFoundError):
            client.get("default_tenant")
            return
        found = [row for row in client.get("tenants")["tenants"] if row["name"] == TENANT]
        if not found:
            create_tenant(session, TENANT, pg_version=None, set_default=True)
        elif found[0]["state"] == "active":
            client.put("default_tenant", body={"tenant": TENANT})
        else:  # the controller goes on with it, whoever waits
            time.sleep(POLL_S)
    raise BusyError(f"the tenant {TENANT} is still being made: run `excimer up` again")


def _ensure_endpoint(installation: Installation) -> None:
    try:
        ControllerClient(installation).get("endpoints", ENDPOINT)
    except NotFoundError:
        # Never suspended: its URL is printed, and nothing wakes an endpoint yet when a client connects.
        body = {"name": ENDPOINT, "branch": "main", "suspend_delay_s": 0}
        create_endpoint(installation, body, None)
