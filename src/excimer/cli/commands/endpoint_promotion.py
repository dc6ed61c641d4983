"""`excimer endpoint promote`: a replica becomes its branch's primary.

It starts as any primary does, at the end of what a majority of safekeepers has, by an election that fences a
former primary which could not be stopped. PostgreSQL's own promotion would begin a new timeline id instead.
"""

import time

import typer

from excimer.cli.branch_options import EndpointArgument
from excimer.cli.commands.endpoint import app as endpoint_app
from excimer.cli.commands.endpoint import current_url, start_endpoint, stop_endpoint
from excimer.cli.commands.endpoint_replica import running_primary
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import UsageError
from excimer.cli.installation import load_installation
from excimer.cli.session import session_of

app = endpoint_app


@app.command()
def promote(context: typer.Context, name: EndpointArgument) -> None:
    """Make a replica the primary of its branch. The one that runs is stopped, and stays as an endpoint.

    No commit is lost. Sessions of both end.
    """
    session = session_of(context)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    endpoint = client.get("endpoints", name)
    if endpoint["mode"] != "replica":
        raise UsageError(f"endpoint {name} is no replica, but {endpoint['mode']}: nothing is promoted")
    begun = time.monotonic()
    former = running_primary(installation, client, endpoint["timeline_id"])
    for each in filter(None, (former, name)):
        stop_endpoint(session, installation, each, immediate=False)
    client.post("endpoints", name, "promote", body=None)
    started, _ = start_endpoint(session, installation, name)
    url = current_url(session, installation, started)
    value = started | {"url": url, "former": former, "elapsed_s": round(time.monotonic() - begun, 3)}
    stopped = f"; endpoint {former} is stopped" if former else ""
    session.say(f"endpoint {name} is the primary of branch {endpoint['branch']} now{stopped}\n{url}", value)
