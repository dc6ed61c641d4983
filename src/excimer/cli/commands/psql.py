"""`excimer psql [ENDPOINT] [-- arguments]`: the psql of the endpoint's PostgreSQL build.

It connects by the endpoint's Unix socket, as the bootstrap superuser unless ``-U`` names another role, whose
password is then asked for.
"""

import os
from typing import Annotated, Any

import typer

from excimer.cli.commands.endpoint import is_running
from excimer.cli.controller_client import ControllerClient
from excimer.cli.credentials import DATABASE, local_access
from excimer.cli.errors import NotRunningError, UsageError
from excimer.cli.installation import Installation, load_installation
from excimer.cli.session import session_of

app = typer.Typer()


@app.command(context_settings={"ignore_unknown_options": True})
def psql(
    context: typer.Context,
    endpoint: Annotated[
        str | None, typer.Argument(help="Default: the only one that runs, or `main`.", show_default=False)
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="For psql, after --.", show_default=False)
    ] = None,
) -> None:
    """Open psql on an endpoint: excimer psql main -- -U app -d db -c 'select 1'."""
    from excimer.cli.psql_runner import psql_environment
    from excimer.postgres import find_build

    rest = list(arguments or [])
    if endpoint is not None and endpoint.startswith("-"):
        rest.insert(0, endpoint)
        endpoint = None
    installation = load_installation(session_of(context).directory)
    found = choose_endpoint(installation, endpoint)
    build = find_build(found["pg_version"])
    program = str(build.program("psql"))
    access = local_access(installation, found["name"])
    os.execve(program, [program, *rest], psql_environment(access, build.environment(), DATABASE))


def choose_endpoint(installation: Installation, name: str | None) -> dict[str, Any]:
    """The endpoint meant. Raises errors that say which there are, or that it does not run."""
    client = ControllerClient(installation)
    if name is None:
        rows = client.get("endpoints")["endpoints"]
        running = [row for row in rows if is_running(installation, row["name"])]
        chosen = running if len(running) == 1 else [row for row in running if row["name"] == "main"]
        if not chosen:
            names = ", ".join(row["name"] for row in running)
            raise (
                UsageError(f"several endpoints run, name one: {names}")
                if names
                else NotRunningError("no endpoint runs: excimer endpoint start NAME")
            )
        found: dict[str, Any] = chosen[0]
        return found
    found = client.get("endpoints", name)
    if not is_running(installation, name):
        raise NotRunningError(f"endpoint {name} does not run: excimer endpoint start {name}")
    return found
