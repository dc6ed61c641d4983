"""How often one event may be written: a burst in full, then a count.

An event that comes more than `LINES_MAX` times within `WINDOW_S` is written no more until the window ends;
then one line says how many there were. No event fills a disk, however often it happens, and none is hidden.

Pure: the caller brings the time, writes the lines, and asks for what is due.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

LINES_MAX: Final = 20
WINDOW_S: Final = 10.0
EVENTS_MAX: Final = 1024
"""Events that are told apart at a time."""

LogEvent: TypeAlias = tuple[str, str, str]
"""Level, logger, event."""


@dataclass(slots=True)
class _Window:
    start: float
    written: int = 0
    withheld: int = 0


@dataclass(frozen=True, slots=True)
class Withheld:
    """What was not written of an event in a window."""

    event: LogEvent
    count: int


class LogLimit:
    def __init__(self, lines_max: int = LINES_MAX, window_s: float = WINDOW_S) -> None:
        self._lines_max = lines_max
        self._window_s = window_s
        self._windows: dict[LogEvent, _Window] = {}

    def admits(self, event: LogEvent, now: float) -> bool:
        """Whether the event is to be written now; if not, it is counted."""
        window = self._windows.get(event)
        if window is None:
            if len(self._windows) >= EVENTS_MAX and not self._forget_quiet(now):
                return True  # more kinds of events than can be told apart: none of them is frequent
            window = self._windows[event] = _Window(now)
        elif now >= window.start + self._window_s and not window.withheld:
            window.start, window.written = now, 0
        if window.written < self._lines_max:
            window.written += 1
            return True
        window.withheld += 1
        return False

    def take_due(self, now: float) -> list[Withheld]:
        """What was withheld in windows that have ended; to be called before `admits`, and at `next_due`."""
        due = []
        for event, window in self._windows.items():
            if window.withheld and now >= window.start + self._window_s:
                due.append(Withheld(event, window.withheld))
                window.start, window.written, window.withheld = now, 0, 0
        return due

    def next_due(self) -> float | None:
        """When something withheld is to be told; None: nothing is."""
        return min(
            (window.start + self._window_s for window in self._windows.values() if window.withheld),
            default=None,
        )

    def _forget_quiet(self, now: float) -> bool:
        """Makes room. False if all events are recent."""
        quiet = [
            event
            for event, window in self._windows.items()
            if not window.withheld and now >= window.start + self._window_s
        ]
        for event in quiet:
            del self._windows[event]
        return bool(quiet)
