"""`excimer psql [ENDPOINT] [-- arguments]`: the psql of the endpoint's PostgreSQL build.

It connects by the endpoint's Unix socket, as the bootstrap superuser unless ``-U`` names another role, whose
password is then asked for.
"""

import os
from typing import Annotated, Any

import typer

from excimer.cli.branch_options import OptionalEndpointArgument
from excimer.cli.commands.endpoint import is_running, start_endpoint, state_of
from excimer.cli.controller_client import ControllerClient
from excimer.cli.credentials import DATABASE, local_access
from excimer.cli.endpoint_choice import choose_endpoint
from excimer.cli.errors import NotRunningError
from excimer.cli.installation import Installation, load_installation
from excimer.cli.session import Session, session_of

app = typer.Typer()


@app.command(context_settings={"ignore_unknown_options": True})
def psql(
    context: typer.Context,
    endpoint: OptionalEndpointArgument = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="For psql, after --.", show_default=False)
    ] = None,
) -> None:
    """Open psql on an endpoint: excimer psql main -- -U app -d db -c 'select 1'."""
    from excimer.cli.psql_runner import psql_environment
    from excimer.postgres import find_build

    rest = list(arguments or [])
    if endpoint is not None and endpoint.startswith("-"):
        rest.insert(0, endpoint)
        endpoint = None
    session = session_of(context)
    installation = load_installation(session.directory)
    found = running_endpoint(session, installation, endpoint)
    build = find_build(found["pg_version"])
    program = str(build.program("psql"))
    access = local_access(installation, found["name"])
    os.execve(program, [program, *rest], psql_environment(access, build.environment(), DATABASE))


def running_endpoint(session: Session, installation: Installation, name: str | None) -> dict[str, Any]:
    """The endpoint meant, see `choose_endpoint`; one that is suspended is woken. Raises `NotRunningError`."""
    found = choose_endpoint(ControllerClient(installation), name)
    if is_running(installation, found["name"]):
        return found
    if state_of(installation, found)["state"] == "suspended":
        session.note(f"waking endpoint {found['name']} …")
        speechless = Session(session.directory, as_json=True)  # standard output is the command's own
        return start_endpoint(speechless, installation, found["name"])[0]
    raise NotRunningError(f"endpoint {found['name']} does not run: excimer endpoint start {found['name']}")
