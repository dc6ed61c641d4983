"""`excimer endpoint cache [ENDPOINT] [SIZE]`: how much of the local disk an endpoint's cache may take.

The controller keeps it; a running compute is told to take it over.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer

from excimer.cli.branch_options import OptionalEndpointArgument
from excimer.cli.controller_client import ControllerClient
from excimer.cli.endpoint_choice import choose_endpoint
from excimer.cli.errors import UsageError
from excimer.cli.installation import HOST, Installation, endpoint_part_name, load_installation
from excimer.cli.local_processes import find_process, probe_health
from excimer.cli.session import session_of

UNLIMITED: Final = "unlimited"
SIZE_HELP: Final = "256MB, 10GB, 1TB or unlimited"
TAKE_OVER_LIMIT_S: Final = 3.0
POLL_S: Final = 0.02
_UNITS_MIB: Final = {"MB": 1, "GB": 1 << 10, "TB": 1 << 20}
_SIZE: Final = re.compile(r"([0-9]{1,9})\s*(MB|GB|TB)\Z", re.IGNORECASE)

CacheSizeOption = Annotated[
    str | None,
    typer.Option(
        "--cache-size",
        metavar="SIZE",
        help=f"What its tables and indexes may take on the local disk: {SIZE_HELP}; default: {UNLIMITED}.",
        show_default=False,
    ),
]


def parse_size(text: str) -> int:
    """MiB; 0 for unlimited. Raises `UsageError`. Whether it may be so is the controller's to say."""
    if text.lower() == UNLIMITED:
        return 0
    found = _SIZE.match(text)
    if found is None:
        raise UsageError(f"{text!r} is not a cache size: write {SIZE_HELP}")
    return int(found[1]) * _UNITS_MIB[found[2].upper()]


def shown_size(size_mib: int) -> str:
    """As `parse_size` reads it, in the largest unit that is exact."""
    if size_mib == 0:
        return UNLIMITED
    for unit, unit_mib in sorted(_UNITS_MIB.items(), key=lambda each: -each[1]):
        if size_mib % unit_mib == 0:
            return f"{size_mib // unit_mib}{unit}"
    raise AssertionError("a mebibyte divides everything")


def cache(
    context: typer.Context,
    name: OptionalEndpointArgument = None,
    size: Annotated[
        str | None, typer.Argument(metavar="SIZE", help=f"{SIZE_HELP}.", show_default=False)
    ] = None,
) -> None:
    """Show or change how much of the local disk an endpoint's tables and indexes may take.

    What is read seldom is evicted then, and fetched again from the pageserver when it is read. A running
    endpoint that was started with a size has another one at once; any other has it from its next start on.
    """
    session = session_of(context)
    if name is not None and size is None and (_SIZE.match(name) or name.lower() == UNLIMITED):
        name, size = None, name
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    endpoint = choose_endpoint(client, name)
    name, size_mib = str(endpoint["name"]), int(endpoint["cache_size_mib"])
    if size is None:
        value = {"name": name, "cache_size_mib": size_mib}
        session.say(f"endpoint {name}: cache size {shown_size(size_mib)}", value)
        return
    size_mib = parse_size(size)
    client.patch("endpoints", name, "cache_size", body={"cache_size_mib": size_mib})
    in_force = _put_in_force(installation, endpoint, size_mib)
    when = "" if in_force else " from its next start on"
    value = {"name": name, "cache_size_mib": size_mib, "in_force": in_force}
    session.say(f"endpoint {name} has a cache of {shown_size(size_mib)}{when}", value)


def _put_in_force(installation: Installation, endpoint: Mapping[str, Any], size_mib: int) -> bool:
    """Has a compute that runs take it over; whether it says that it has, or will when it starts."""
    name = str(endpoint["name"])
    process = find_process(installation, endpoint_part_name(name), installation.endpoint_dir(name))
    if process is None:
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGHUP)
    deadline = time.monotonic() + TAKE_OVER_LIMIT_S
    while time.monotonic() < deadline:
        probed = probe_health(f"{HOST}:{endpoint['http_port']}", process.pid)
        if not probed.status or probed.facts.get("cache_size_mib") == str(size_mib):
            return True
        time.sleep(POLL_S)
    return False
