"""Log files of services for people: their JSON lines shortened, and the one that says what went wrong."""

import json
from pathlib import Path
from typing import Any, Final

TAIL_SIZE_BYTES: Final = 64 * 1024
HIDDEN_FIELDS: Final = ("time", "level", "service", "event", "traceback")


def tail(path: Path, count: int, start: int = 0) -> list[str]:
    """The last `count` lines from byte `start` on; none if there is no such file."""
    try:
        with open(path, "rb") as file:
            size = max(0, file.seek(0, 2) - start)
            wanted = TAIL_SIZE_BYTES
            while True:
                file.seek(start + max(0, size - wanted))
                lines = file.read().decode("utf-8", "replace").splitlines()
                if len(lines) > count or wanted >= size:
                    return lines[-count:] if count else []
                wanted *= 4
    except OSError:
        return []


def last_error(path: Path, start: int = 0) -> str:
    """The last error (else the last line) in a log from byte `start` on, as one sentence."""
    lines = tail(path, 200, start)
    for line in reversed(lines):
        fields = parse(line)
        if fields is not None and fields.get("level") == "error":
            return _sentence(fields)
        if fields is None and line.startswith("excimer "):
            return line.partition(": ")[2] or line
    spoken = [line for line in lines if line.strip()]
    if not spoken:
        return "its log is empty"
    fields = parse(spoken[-1])
    return _sentence(fields) if fields else spoken[-1].strip()


def _sentence(fields: dict[str, Any]) -> str:
    event = (str(fields.get("event", "")).splitlines() or [""])[0]
    return f"{event}: {fields['reason']}" if fields.get("reason") else event


def parse(line: str) -> dict[str, Any] | None:
    """The fields of a JSON line of ours, None for another line (a traceback, a library's print)."""
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "event" in value else None


def as_json_line(line: str) -> str:
    """A line of ours as it is; another one as the event of an object."""
    return line if parse(line) is not None else json.dumps({"event": line})


def failure(path: Path) -> str | None:
    """Why the part of a log is over, if an error was its last word; None after a clean stop."""
    spoken = [line for line in tail(path, 20) if line.strip()]
    fields = parse(spoken[-1]) if spoken else None
    if fields is None or fields.get("level") != "error":
        return None
    return _sentence(fields)


def pretty(line: str) -> str:
    """``12:00:00 info    timeline opened timeline_id=…``; other lines as they are."""
    fields = parse(line)
    if fields is None:
        return line
    clock = str(fields.get("time", ""))[11:19]
    rest = "".join(f" {key}={value}" for key, value in fields.items() if key not in HIDDEN_FIELDS)
    text = f"{clock} {fields.get('level', ''):<7} {fields['event']}{rest}"
    return text + ("\n" + str(fields["traceback"]).rstrip() if "traceback" in fields else "")
