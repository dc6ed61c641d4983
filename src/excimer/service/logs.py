"""Log lines: one JSON object per line on standard error, or a short line for people.

::

    {"time":"2026-01-31T12:00:00.123Z","level":"info","service":"safekeeper-1","event":"timeline opened",
     "timeline_id":"…","commit_lsn":"0/16B3748"}

A logger is made once per module (`log = get_logger(__name__)`) and called with an event and
fields: ``log.info("timeline opened", commit_lsn=lsn)``. Integer fields whose name ends in `_lsn`
are written as PostgreSQL writes LSNs. Fields of the surrounding request or timeline come from
`log_context`, which follows tasks and threads as context variables do.

An event that comes too often is counted rather than written (`log_limit`); then ``repeated`` says how often.
Lines of level "debug" are never withheld: who asks for them wants them all.

Our own lines rather than structlog: importing that costs 60 ms (it loads rich), which a
compute manager would pay within its user's wake-up. The call style is the same.

Not here: where lines go (whoever starts a process redirects its standard error), and how long those files
become (`log_files`).
"""

import atexit
import contextlib
import contextvars
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import msgspec

from excimer.base.lsn import format_lsn
from excimer.service.log_limit import LogLimit

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}

TIMER_NAME: Final = "log limit"
"""Of the one thread that the log makes now and then, and that a fork may lack: see `begin_in_fork`."""

OWN_PREFIX: Final = "excimer."
"""Of the names of our loggers, of either kind."""

_context: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar("log_context")


class _Sink:
    """Where lines go. One per process; `configure_logging` sets its fields."""

    service = "excimer"
    level = LEVELS["warning"]
    as_json = False
    stream: TextIO | None = None
    encode = msgspec.json.Encoder(enc_hook=str).encode

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._limit = LogLimit()
        self._timer: threading.Timer | None = None

    def set_limit(self, limit: LogLimit) -> None:
        with self._lock:
            self._limit = limit

    def hold(self) -> None:
        """Around a fork: no thread may be in the middle of a line then, whose end the fork would miss."""
        self._lock.acquire()

    def let_go(self) -> None:
        self._lock.release()

    def begin_in_fork(self) -> None:
        """A fork has neither our timer's thread nor a lock that it could wait for; what was withheld is told
        by the process that it happened in.
        """
        self._lock = threading.RLock()
        self._limit = LogLimit()
        self._timer = None

    def write(self, level: str, event: str, fields: Mapping[str, object], kind: str | None = None) -> None:
        """`kind` stands for the event where that is not one of a few texts."""
        with self._lock:
            now = time.monotonic()
            self._tell_withheld(now)
            if level == "debug" or self._limit.admits(
                (level, str(fields.get("logger", "")), kind or event), now
            ):
                self._put(level, event, fields)
            else:
                self._tell_later(now)

    def tell_withheld(self, *, at_end: bool = False) -> None:
        """Writes the counts that are due; all of them `at_end`."""
        with self._lock:
            now = time.monotonic()
            self._timer = None
            self._tell_withheld(float("inf") if at_end else now)
            if not at_end:
                self._tell_later(now)

    def _tell_withheld(self, now: float) -> None:
        for withheld in self._limit.take_due(now):
            level, logger, event = withheld.event
            self._put(level, event, {"logger": logger, "repeated": withheld.count})

    def _tell_later(self, now: float) -> None:
        due = self._limit.next_due()
        if due is None or self._timer is not None:
            return
        timer = threading.Timer(max(due - now, 0.0), self.tell_withheld)
        timer.daemon = True
        timer.name = TIMER_NAME
        with contextlib.suppress(RuntimeError):  # no more threads: the next line tells it
            timer.start()
            self._timer = timer

    def _put(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        values = {key: _readable(key, value) for key, value in fields.items()}
        now = datetime.now(UTC)
        if self.as_json:
            time_text = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            head = {"time": time_text, "level": level, "service": self.service, "event": event}
            line = self.encode({**head, **values, **head}).decode()
        else:
            line = f"{now:%H:%M:%S} {level:<7} {event}" + "".join(f" {k}={v}" for k, v in values.items())
        stream = self.stream or sys.stderr
        with contextlib.suppress(OSError, ValueError):  # a full disk or closed pipe must not stop a service
            stream.write(line + "\n")
            stream.flush()


_sink = _Sink()
atexit.register(_sink.tell_withheld, at_end=True)
os.register_at_fork(before=_sink.hold, after_in_parent=_sink.let_go, after_in_child=_sink.begin_in_fork)


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
    return Logger({"logger": name.removeprefix(OWN_PREFIX)})


@contextlib.contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Adds `fields` to every line written inside, also by tasks started there."""
    token = _context.set({**_context.get({}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class _FromLibraries(logging.Handler):
    """Brings lines of whoever uses stdlib logging into the same stream: libraries (uvicorn, nats, asyncio),
    and our own packages below this one, such as the storage engine.
    """

    def emit(self, record: logging.LogRecord) -> None:
        is_ours = record.name.startswith(OWN_PREFIX)
        fields: dict[str, Any] = {"logger": record.name.removeprefix(OWN_PREFIX), **_context.get({})}
        if record.exc_info:
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        level = next((name for name, number in LEVELS.items() if record.levelno <= number), "error")
        _sink.write(level, record.getMessage(), fields, kind=str(record.msg) if is_ours else "(any)")


def configure_logging(
    service: str,
    level: str = "info",
    *,
    as_json: bool = True,
    stream: TextIO | None = None,
    limit: LogLimit | None = None,
) -> None:
    """Sets the process's log once, at its start. `stream` None is standard error as it is at each line.

    Libraries are heard from "warning" on, our own packages that use stdlib logging from `level` on.
    """
    _sink.service = service
    _sink.level = LEVELS[level]
    _sink.as_json = as_json
    _sink.stream = stream
    _sink.set_limit(limit or LogLimit())
    root = logging.getLogger()
    root.handlers[:] = [_FromLibraries()]
    _set_level(root, max(LEVELS[level], logging.WARNING))
    _set_level(logging.getLogger(OWN_PREFIX.rstrip(".")), LEVELS[level])


def _set_level(logger: logging.Logger, level: int) -> None:
    """Setting the same again would write to every logger of every library, which forks share."""
    if logger.level != level:
        logger.setLevel(level)
