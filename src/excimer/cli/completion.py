"""Names for the shell's completion: tenants, branches, endpoints, parts, as the controller knows them now.

Whatever goes wrong, there is nothing to complete: a shell that waits for Tab must get neither an error nor
a long wait.
"""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import typer

from excimer.base.errors import ExcimerError
from excimer.cli.controller_client import ControllerClient
from excimer.cli.endpoint_choice import choose_name
from excimer.cli.installation import Installation, load_installation, logged_parts
from excimer.cli.session import find_directory

ANSWER_LIMIT_S: Final = 1.0

Completion = Callable[[typer.Context, str], list[str]]


def _completing(names: Callable[[ControllerClient, typer.Context], Iterable[str]]) -> Completion:
    def complete(context: typer.Context, incomplete: str) -> list[str]:
        with contextlib.suppress(ExcimerError, OSError, KeyError, TypeError):
            client = ControllerClient(_installation(context), limit_s=ANSWER_LIMIT_S)
            return sorted(name for name in names(client, context) if name.startswith(incomplete))
        return []

    return complete


def _installation(context: typer.Context) -> Installation:
    directory: Path | None = context.find_root().params.get("directory")
    return load_installation(directory or find_directory())


def _tenants(client: ControllerClient, _: typer.Context) -> list[str]:
    return [row["name"] for row in client.get("tenants")["tenants"]]


def _branches(client: ControllerClient, context: typer.Context) -> list[str]:
    tenant = context.params.get("tenant") or client.get("default_tenant")["name"]
    return [row["name"] for row in client.get("tenants", tenant, "branches")["branches"]]


def _endpoints(client: ControllerClient, _: typer.Context) -> list[str]:
    return [row["name"] for row in client.get("endpoints")["endpoints"]]


complete_tenant = _completing(_tenants)
complete_branch = _completing(_branches)
complete_endpoint = _completing(_endpoints)


def complete_part(context: typer.Context, incomplete: str) -> list[str]:
    """Services, and endpoints by their own names: those that have a log."""
    with contextlib.suppress(ExcimerError, OSError):
        names = (part.removeprefix("endpoint-") for part in logged_parts(_installation(context)))
        return sorted(name for name in names if name.startswith(incomplete))
    return []


def complete_setting(context: typer.Context, incomplete: str) -> list[str]:
    """Of the endpoint on the line those of its settings that could be unset."""

    def names(client: ControllerClient, line: typer.Context) -> Any:
        return client.get("endpoints", choose_name(client, line.params.get("name")), "settings")["settings"]

    return _completing(names)(context, incomplete)
