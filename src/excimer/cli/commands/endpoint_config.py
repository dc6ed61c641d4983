"""`excimer endpoint config [ENDPOINT] list | set | unset`: an endpoint's own PostgreSQL settings.

The controller keeps the list and has it checked; a running compute is told to take it over.
"""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from excimer.cli.branch_options import OptionalEndpointArgument
from excimer.cli.completion import complete_setting
from excimer.cli.controller_client import ControllerClient
from excimer.cli.endpoint_choice import choose_name
from excimer.cli.errors import UsageError
from excimer.cli.installation import HOST, Installation, endpoint_part_name, load_installation
from excimer.cli.local_processes import find_process, probe_health
from excimer.cli.session import session_of

if TYPE_CHECKING:
    from rich.console import Console

TAKE_OVER_LIMIT_S: Final = 3.0
POLL_S: Final = 0.02
ALL: Final = "*"


class Action(StrEnum):
    LIST = "list"
    SET = "set"
    UNSET = "unset"


ACTIONS: Final = frozenset(Action)


def config(
    context: typer.Context,
    name: OptionalEndpointArgument = None,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[list | set NAME=VALUE... | unset NAME...]",
            help="What to do with its settings: set work_mem=64MB, unset work_mem; default: list.",
            show_default=False,
            autocompletion=complete_setting,
        ),
    ] = None,
    unset_all: Annotated[bool, typer.Option("--all", help="Unset all of them.")] = False,
) -> None:
    """Show or change an endpoint's PostgreSQL settings: the same list that ALTER SYSTEM changes.

    They are checked by the endpoint's PostgreSQL before they are stored, and kept over restarts. A running
    endpoint has them in force at once, but for those that PostgreSQL reads only when it starts.
    """
    session = session_of(context)
    name, action, arguments = parse_words(name, words or [])
    body = change_of(action, arguments, unset_all=unset_all)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    name = choose_name(client, name)
    place = ("endpoints", name, "settings")
    if body is None:
        answer = client.get(*place) | {"running": False, "restart_pending": []}
        running = _ask_compute(installation, client.get("endpoints", name))
        if running is not None:
            answer |= {"running": True, "restart_pending": _pending(running)}
        session.answer(answer, lambda console: _show(console, name, answer))
        return
    answer = client.patch(*place, body=body)
    answer |= _put_in_force(installation, client.get("endpoints", name), answer)
    session.say(sentence_of(name, answer), answer)


def parse_words(name: str | None, words: Sequence[str]) -> tuple[str | None, Action, list[str]]:
    """The endpoint's name if there is one, the action, and what belongs to it. Raises `UsageError`.

    A first word that is an action is one, unless another follows it: then it is an endpoint's name.
    """
    if name is not None and name in ACTIONS and not (words and words[0] in ACTIONS):
        words = [name, *words]
        name = None
    if not words:
        return name, Action.LIST, []
    if words[0] not in ACTIONS:
        raise UsageError(f"{words[0]!r} is neither list, nor set, nor unset")
    return name, Action(words[0]), list(words[1:])


def change_of(action: Action, arguments: Sequence[str], *, unset_all: bool) -> dict[str, Any] | None:
    """The request's body, or None where nothing is changed. Raises `UsageError`."""
    if unset_all and action is not Action.UNSET:
        raise UsageError("--all belongs to unset")
    if action is Action.SET:
        if not arguments:
            raise UsageError("name what to set: excimer endpoint config ENDPOINT set work_mem=64MB")
        return {"set": parse_assignments(arguments, "set")}
    if action is Action.UNSET:
        if unset_all == bool(arguments):
            raise UsageError("name what to unset, or --all: excimer endpoint config ENDPOINT unset work_mem")
        wrong = next((text for text in arguments if "=" in text), None)
        if wrong is not None:
            raise UsageError(f"unset takes names, not {wrong!r}")
        return {"unset": [ALL] if unset_all else list(arguments)}
    if arguments:
        raise UsageError("list takes nothing more: excimer endpoint config ENDPOINT list")
    return None


def parse_assignments(texts: Sequence[str], what: str) -> dict[str, str]:
    """``NAME=VALUE`` each; of two of one name the last counts. Raises `UsageError`."""
    settings: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise UsageError(f"{what} {text!r}: write NAME=VALUE, like work_mem=64MB")
        settings[name.strip()] = value
    return settings


def _ask_compute(installation: Installation, endpoint: dict[str, Any]) -> dict[str, Any] | None:
    """What a running compute says of itself; None when there is none that answers."""
    process = find_process(
        installation, endpoint_part_name(endpoint["name"]), installation.endpoint_dir(endpoint["name"])
    )
    if process is None:
        return None
    probed = probe_health(f"{HOST}:{endpoint['http_port']}", process.pid)
    return {"pid": process.pid, "facts": probed.facts} if probed.status else None


def _pending(running: dict[str, Any]) -> list[str]:
    return [name for name in running["facts"].get("restart_pending", "").split(",") if name]


def _put_in_force(
    installation: Installation, endpoint: dict[str, Any], answer: dict[str, Any]
) -> dict[str, Any]:
    """Tells the compute, if one runs, and waits until it has taken the list over."""
    from excimer.compute.settings_keeper import digest_of

    running = _ask_compute(installation, endpoint)
    if running is None:
        return {"running": False, "in_force": False, "restart_pending": []}
    wanted = digest_of(answer["settings"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(running["pid"], signal.SIGHUP)
    deadline = time.monotonic() + TAKE_OVER_LIMIT_S
    while running is not None and running["facts"].get("settings") != wanted:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
        running = _ask_compute(installation, endpoint)
    is_taken = running is not None and running["facts"].get("settings") == wanted
    return {
        "running": running is not None,
        "in_force": is_taken,
        "restart_pending": _pending(running) if running is not None else [],
    }


def sentence_of(name: str, answer: dict[str, Any]) -> str:
    changed = ", ".join(answer["changed"])
    if not changed:
        return f"endpoint {name}: nothing changes"
    if not answer["running"]:
        return f"endpoint {name}: {changed} kept; in force at its next start"
    if not answer["in_force"]:
        return f"endpoint {name}: {changed} kept, but its manager has not taken it over: excimer logs {name}"
    late = [each for each in answer["changed"] if each in answer["restart_pending"]]
    unset = [each for each in answer["changed"] if each not in answer["settings"] and each not in late]
    foreign = [each for each in answer["changed"] if "." in each and each not in unset]
    early = [each for each in answer["changed"] if each not in (*late, *unset, *foreign)]
    parts = [f"{', '.join(early)} in force"] if early else []
    if unset:
        parts.append(f"{', '.join(unset)} unset")
    if foreign:
        parts.append(f"{', '.join(foreign)} kept for its extension, which checks it by itself")
    if late:
        parts.append(f"{', '.join(late)} after restart: excimer endpoint restart {name}")
    return f"endpoint {name}: {'; '.join(parts)}"


def _show(console: "Console", name: str, answer: dict[str, Any]) -> None:
    from rich.text import Text

    from excimer.cli.tables import plain_table, show_table

    if not answer["settings"] and not answer["restart_pending"]:
        console.print(f"endpoint {name} has no settings of its own", highlight=False)
        return
    table = plain_table("setting", "value", "")
    for each in sorted({*answer["settings"], *answer["restart_pending"]}):
        value = answer["settings"].get(each)
        shown = Text("(default)", style="dim") if value is None else Text(value)
        table.add_row(Text(each), shown, "after restart" if each in answer["restart_pending"] else "")
    show_table(console, table)
