"""What the commands on endpoints say and change about suspends: delays, and when an endpoint was last used.

Not here: the commands themselves (`endpoint`), and when an endpoint is idle (`excimer.compute.idle_policy`).
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from excimer.cli.commands.endpoint_limits import shown_size
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import UsageError
from excimer.cli.installation import HOST, Installation, endpoint_part_name
from excimer.cli.local_processes import find_process, probe_health

NEVER: Final = "never"
TAKE_OVER_LIMIT_S: Final = 3.0
POLL_S: Final = 0.02
_UNITS_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DELAY: Final = re.compile(r"([0-9]{1,9})([smhd]?)\Z")

DELAY: Final = "DELAY"
DELAY_HELP: Final = "300 (seconds), 5m, 2h or never"
SuspendAfterOption = Annotated[
    str | None,
    typer.Option(
        "--suspend-after",
        metavar=DELAY,
        help=f"Suspend it when nobody used it for so long: {DELAY_HELP}; default: 5m.",
        show_default=False,
    ),
]
AfterOption = Annotated[
    str | None,
    typer.Option(
        "--after",
        metavar=DELAY,
        help=f"Not now, but whenever nobody used it for so long: {DELAY_HELP}.",
        show_default=False,
    ),
]


def parse_delay(text: str) -> int:
    """Seconds; 0 for never. Raises `UsageError`. Whether it is too long is the controller's to say."""
    if text == NEVER:
        return 0
    found = _DELAY.match(text)
    if found is None:
        raise UsageError(f"{text!r} is not a delay: write {DELAY_HELP}")
    return int(found[1]) * _UNITS_S[found[2]]


def shown_delay(delay_s: int) -> str:
    """As `parse_delay` reads it, in the largest unit that is exact."""
    if delay_s == 0:
        return NEVER
    for unit, size_s in sorted(_UNITS_S.items(), key=lambda each: -each[1]):
        if unit and delay_s % size_s == 0:
            return f"{delay_s // size_s}{unit}"
    raise AssertionError("a second divides everything")


def shown_use(last_active_at: str | None, now: float) -> str:
    """``12 s ago``; empty for an endpoint that has never run."""
    if last_active_at is None:
        return ""
    seconds = max(0, round(now - datetime.fromisoformat(last_active_at).timestamp()))
    for size_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{seconds // size_s} {unit} ago"
    return f"{seconds} s ago"


def shown_endpoint(row: Mapping[str, Any]) -> str:
    """An endpoint in a line of `status`; empty for a service."""
    if "branch" not in row:
        return ""
    used = shown_use(row["last_active_at"], time.time())
    size = shown_size(row)
    return (
        f"branch {row['branch']}, port {row['postgres_port']}"
        + (f", used {used}" if used else "")
        + (f", {size}" if size else "")
    )


def last_active_at(facts: Mapping[str, str]) -> dict[str, str]:
    """What a compute that runs knows better than the controller; nothing if it does not say."""
    said = facts.get("last_active_at", "")
    return {"last_active_at": datetime.fromtimestamp(int(said), UTC).isoformat()} if said else {}


def patch_suspension(client: ControllerClient, name: str, **changes: Any) -> dict[str, Any]:
    """The controller's answer to what has become of an endpoint, or is to become."""
    answer: dict[str, Any] = client.patch("endpoints", name, "suspension", body=changes)
    return answer


def change_delay(
    installation: Installation, client: ControllerClient, endpoint: Mapping[str, Any], delay_s: int
) -> dict[str, Any]:
    """Keeps it, and has a compute that runs take it over. Answers the endpoint's row, and ``in_force``."""
    name = str(endpoint["name"])
    answer = patch_suspension(client, name, suspend_delay_s=delay_s)
    process = find_process(installation, endpoint_part_name(name), installation.endpoint_dir(name))
    in_force = True
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGHUP)
        in_force = _wait_for_delay(f"{HOST}:{endpoint['http_port']}", process.pid, delay_s)
    return {**endpoint, "suspend_delay_s": answer["suspend_delay_s"], "in_force": in_force}


def _wait_for_delay(http_address: str, pid: int, delay_s: int) -> bool:
    """Whether the compute says that it has it; one that ends meanwhile has it from its next start on."""
    deadline = time.monotonic() + TAKE_OVER_LIMIT_S
    while time.monotonic() < deadline:
        probed = probe_health(http_address, pid)
        if not probed.status or probed.facts.get("suspend_delay_s") == str(delay_s):
            return True
        time.sleep(POLL_S)
    return False
