"""Which endpoint a command means that names none: the only one.

Commands that delete something want its name all the same.
"""

from typing import Any

from excimer.base.errors import NotFoundError
from excimer.cli.controller_client import ControllerClient
from excimer.cli.errors import UsageError


def choose_endpoint(client: ControllerClient, name: str | None) -> dict[str, Any]:
    """The controller's row. Raises NotFoundError, and `UsageError` that lists several."""
    if name is not None:
        found: dict[str, Any] = client.get("endpoints", name)
        return found
    rows: list[dict[str, Any]] = client.get("endpoints")["endpoints"]
    if len(rows) == 1:
        return rows[0]
    if not rows:
        raise NotFoundError("there is no endpoint yet: excimer endpoint create NAME")
    raise UsageError(f"there are several endpoints, name one: {', '.join(row['name'] for row in rows)}")


def choose_name(client: ControllerClient, name: str | None) -> str:
    """As `choose_endpoint`, for commands that do not need its row: a name that is given is not looked up."""
    return name if name is not None else str(choose_endpoint(client, None)["name"])
