"""`excimer endpoint limits [ENDPOINT] [--cpu MIN..MAX] [--memory MIN..MAX]`: what an endpoint may use.

CPU is in cores, memory in PostgreSQL's units. One value in place of a range is both of its ends.
"""

import re
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
CPU_HELP: Final = "cores: 0.25..2, 1 (always as many) or unlimited"
MEMORY_HELP: Final = "512MB..4GB, 1GB (always as much) or unlimited"
_RANGE: Final = ".."
_CORES: Final = re.compile(r"([0-9]{1,4})(?:\.([0-9]{1,3}))?\Z")
_MEMORY: Final = re.compile(r"([0-9]{1,9})\s*(MB|GB|TB)\Z", re.IGNORECASE)
_UNITS_MIB: Final = {"MB": 1, "GB": 1 << 10, "TB": 1 << 20}

CpuOption = Annotated[
    str | None,
    typer.Option(
        "--cpu", metavar="MIN..MAX", help=f"{CPU_HELP[0].upper()}{CPU_HELP[1:]}.", show_default=False
    ),
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", metavar="MIN..MAX", help=f"{MEMORY_HELP}.", show_default=False)
]


def parse_limits(cpu: str | None, memory: str | None) -> dict[str, int]:
    """As the controller's routes have them, without what is None. Raises `UsageError`.

    Whether they may be so is the controller's to say.
    """
    found: dict[str, int] = {}
    if cpu is not None:
        found["cpu_min_milli"], found["cpu_max_milli"] = _parse_range(cpu, _millis, CPU_HELP)
    if memory is not None:
        found["memory_min_mib"], found["memory_max_mib"] = _parse_range(memory, _mebibytes, MEMORY_HELP)
    return found


def _parse_range(text: str, parse: Any, help_text: str) -> tuple[int, int]:
    if text.lower() == UNLIMITED:
        return 0, 0
    low, separator, high = text.partition(_RANGE)
    ends = [parse(end.strip()) for end in ([low, high] if separator else [low])]
    if None in ends or 0 in ends:
        raise UsageError(f"{text!r} is not a range: write {help_text}")
    return ends[0], ends[-1]


def _millis(text: str) -> int | None:
    found = _CORES.match(text)
    return None if found is None else int(found[1]) * 1000 + int((found[2] or "").ljust(3, "0"))


def _mebibytes(text: str) -> int | None:
    found = _MEMORY.match(text)
    return None if found is None else int(found[1]) * _UNITS_MIB[found[2].upper()]


def shown_cores(milli: int) -> str:
    """As `parse_limits` reads it."""
    return f"{milli / 1000:g}" if milli else UNLIMITED


def shown_memory(mib: int) -> str:
    """As `parse_limits` reads it, in the largest unit that is exact."""
    if not mib:
        return UNLIMITED
    unit = max((size, name) for name, size in _UNITS_MIB.items() if mib % size == 0)[1]
    return f"{mib // _UNITS_MIB[unit]}{unit}"


def shown_limits(limits: Mapping[str, int]) -> str:
    """Of both, as a person writes them; empty where there are none."""
    return ", ".join(
        f"{name} {_shown_range(show(limits[low]), show(limits[high]))}"
        for name, show, low, high in (
            ("cpu", shown_cores, "cpu_min_milli", "cpu_max_milli"),
            ("memory", shown_memory, "memory_min_mib", "memory_max_mib"),
        )
        if limits[high]
    )


def _shown_range(low: str, high: str) -> str:
    return low if low == high else f"{low}{_RANGE}{high}"


def size_in_force(facts: Mapping[str, str]) -> dict[str, int | None]:
    """What a compute that runs says that the kernel keeps to; 0: no limit, None: it does not say."""
    return {
        "cpu_milli": int(facts["cpu_milli"]) if facts.get("cpu_milli") else None,
        "memory_mib": int(facts["memory_mib"]) if facts.get("memory_mib") else None,
    }


def shown_size(row: Mapping[str, Any]) -> str:
    """What an endpoint may use now; what it was to have and does not is marked. Empty without limits."""
    limits, runs = row["limits"], row.get("pid") is not None
    said = []
    for name, show, now, high in (
        (" CPU", shown_cores, row.get("cpu_milli"), limits["cpu_max_milli"]),
        ("", shown_memory, row.get("memory_mib"), limits["memory_max_mib"]),
    ):
        if high and not runs:
            said.append(f"≤ {show(high)}{name}")
        elif high:
            said.append(f"{show(now)}{name}" if now else f"{show(high)}{name} (not enforced)")
    return ", ".join(said)


def limits(
    context: typer.Context,
    name: OptionalEndpointArgument = None,
    cpu: CpuOption = None,
    memory: MemoryOption = None,
) -> None:
    """Show or change how much CPU and memory an endpoint may have, live.

    shared_buffers is chosen from the minimum of memory, at the endpoint's next start.
    """
    session = session_of(context)
    changes = parse_limits(cpu, memory)
    installation = load_installation(session.directory)
    client = ControllerClient(installation)
    endpoint = choose_endpoint(client, name)
    name = str(endpoint["name"])
    if not changes:
        row = endpoint | _state(installation, endpoint)
        said = shown_limits(endpoint["limits"]) or UNLIMITED
        now = shown_size(row) if row["pid"] else ""
        value = {
            "name": name,
            "limits": endpoint["limits"],
            **{key: row[key] for key in ("cpu_milli", "memory_mib")},
        }
        session.say(f"endpoint {name}: {said}" + (f"; now {now}" if now else ""), value)
        return
    answer = client.patch("endpoints", name, "limits", body=changes)
    said = shown_limits(answer["limits"]) or UNLIMITED
    when = "" if answer["in_force"] else " from its next start on"
    unkept = f"; {answer['unkept']}" if answer["unkept"] else ""
    session.say(f"endpoint {name} has {said}{when}{unkept}", {"name": name, **answer})


def _state(installation: Installation, endpoint: Mapping[str, Any]) -> dict[str, Any]:
    name = str(endpoint["name"])
    process = find_process(installation, endpoint_part_name(name), installation.endpoint_dir(name))
    if process is None:
        return {"pid": None, **size_in_force({})}
    probed = probe_health(f"{HOST}:{endpoint['http_port']}", process.pid)
    return {"pid": process.pid, **size_in_force(probed.facts)}
