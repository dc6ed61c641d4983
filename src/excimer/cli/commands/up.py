"""`excimer up [--demo]`: from nothing to a postgres:// URL; safe to repeat."""

import time
from typing import Annotated

import typer

from excimer.base.errors import NotFoundError
from excimer.cli.commands.endpoint import create_endpoint, start_endpoint, url_of
from excimer.cli.commands.installation import make_installation, start_services
from excimer.cli.commands.tenant import create_tenant
from excimer.cli.controller_client import ControllerClient
from excimer.cli.installation import CONFIG_NAME, Installation, load_installation
from excimer.cli.session import Session, session_of

app = typer.Typer()

ENDPOINT = "main"
TENANT = "default"


@app.command()
def up(
    context: typer.Context,
    demo: Annotated[
        bool, typer.Option("--demo", help="Then load flights, branch, diverge, restart everything, compare.")
    ] = False,
    pg_version: Annotated[int, typer.Option(help="For a new installation.")] = 18,
    safekeepers: Annotated[int, typer.Option(help="For a new installation.")] = 3,
) -> None:
    """Make an installation if there is none, start everything, print a postgres:// URL."""
    session = session_of(context)
    url = bring_up(session, pg_version, safekeepers)
    if demo:
        from excimer.cli.demo import run_demo

        run_demo(session)
    elapsed_s = time.monotonic() - session.started
    session.done("ready", elapsed_s)
    session.say(url, {"url": url, "elapsed_s": round(elapsed_s, 3)})


def bring_up(session: Session, pg_version: int, safekeepers: int) -> str:
    """The URL of the endpoint `main`, running."""
    if (session.directory / CONFIG_NAME).exists():
        installation = load_installation(session.directory)
    else:
        with session.step(f"installation in {session.directory}"):
            installation = make_installation(session, pg_version, safekeepers, force=False)
    start_services(session, installation)
    _ensure_tenant(session, installation)
    _ensure_endpoint(installation)
    endpoint, _ = start_endpoint(session, installation, ENDPOINT)
    return url_of(endpoint)


def _ensure_tenant(session: Session, installation: Installation) -> None:
    try:
        ControllerClient(installation).get("default_tenant")
    except NotFoundError:
        create_tenant(session, TENANT, pg_version=None, set_default=True)


def _ensure_endpoint(installation: Installation) -> None:
    try:
        ControllerClient(installation).get("endpoints", ENDPOINT)
    except NotFoundError:
        create_endpoint(installation, {"name": ENDPOINT, "branch": "main"}, None)
