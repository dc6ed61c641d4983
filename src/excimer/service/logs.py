"""Log lines: one JSON object per line on standard error, or a short line for people.

::

    {"time":"2026-01-31T12:00:00.123Z","level":"info","service":"safekeeper-1","event":"timeline opened",
     "timeline_id":"…","commit_lsn":"0/16B3748"}

A logger is made once per module (`log = get_logger(__name__)`) and called with an event and
fields: ``log.info("timeline opened", commit_lsn=lsn)``. Integer fields whose name ends in `_lsn`
are written as PostgreSQL writes LSNs. Fields of the surrounding request or timeline come from
`log_context`, which follows tasks and threads as context variables do.

Our own forty lines rather than structlog: importing that costs 60 ms (it loads rich), which a
compute manager would pay within its user's wake-up. The call style is the same.

Not here: where lines go; whoever starts a process redirects its standard error.
"""

import contextlib
import contextvars
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import msgspec

from excimer.base.lsn import format_lsn

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}

_context: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar("log_context")


class _Sink:
    """Where lines go. One per process; `configure_logging` sets its fields."""

    service = "excimer"
    level = LEVELS["warning"]
    as_json = False
    stream: TextIO | None = None
    encode = msgspec.json.Encoder(enc_hook=str).encode

    def write(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        values = {key: _readable(key, value) for key, value in fields.items()}
        now = datetime.now(UTC)
        if self.as_json:
            time = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            head = {"time": time, "level": level, "service": self.service, "event": event}
            line = self.encode({**head, **values, **head}).decode()
        else:
            line = f"{now:%H:%M:%S} {level:<7} {event}" + "".join(f" {k}={v}" for k, v in values.items())
        stream = self.stream or sys.stderr
        with contextlib.suppress(OSError, ValueError):  # a full disk or closed pipe must not stop a service
            stream.write(line + "\n")
            stream.flush()


_sink = _Sink()


def _readable(key: str, value: object) -> object:
    if key.endswith("_lsn") and isinstance(value, int):
        return format_lsn(value)
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return value


class Logger:
    """Writes events with fields. Cheap to call below the level; never raises."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields

    def bind(self, **fields: object) -> "Logger":
        """A logger that adds `fields` to each of its lines."""
        return Logger({**self._fields, **fields})

    def debug(self, event: str, **fields: object) -> None:
        self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._write("error", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """An error with the traceback of the exception being handled."""
        self._write("error", event, {**fields, "traceback": traceback.format_exc()})

    def _write(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        if LEVELS[level] >= _sink.level:
            _sink.write(level, event, {**self._fields, **_context.get({}), **fields})


def get_logger(name: str) -> Logger:
    return Logger({"logger": name.removeprefix("excimer.")})


@contextlib.contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Adds `fields` to every line written inside, also by tasks started there."""
    token = _context.set({**_context.get({}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class _FromLibraries(logging.Handler):
    """Brings lines of libraries (uvicorn, nats, asyncio) that use stdlib logging into the same stream."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        level = next((name for name, number in LEVELS.items() if record.levelno <= number), "error")
        _sink.write(level, record.getMessage(), fields)


def configure_logging(
    service: str, level: str = "info", *, as_json: bool = True, stream: TextIO | None = None
) -> None:
    """Sets the process's log once, at its start. `stream` None is standard error as it is at each line.

    Libraries are heard from "warning" on.
    """
    _sink.service = service
    _sink.level = LEVELS[level]
    _sink.as_json = as_json
    _sink.stream = stream
    root = logging.getLogger()
    root.handlers[:] = [_FromLibraries()]
    root.setLevel(max(LEVELS[level], logging.WARNING))
