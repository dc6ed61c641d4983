"""Whether a PostgreSQL that is shutting down gets on with it: it may take as long as it needs, while it does.

::

    fast shutdown --> sessions end --> checkpoint, of gigabytes perhaps --> its WAL to a majority --> gone
                         |                   |                                  |
                     processes end     its process works              the quorum's WAL grows
                         '-------------------'------- progress ------------------'

Who is killed in a shutdown checkpoint loses what the stop would have kept. So there is no limit on the
whole; what ends the patience is that nothing moves for a while, or that no majority of safekeepers answers:
then the shutdown's WAL cannot get there, and the stop is no clean one anyway.

What a session does is no progress: one that does not end would be waited for for ever. Nor are processes that
come: who tries to connect makes some.

Not here: ending it (`postgres_process`).
"""

import contextlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

STILL_S: Final = 3.0
"""How long nothing may move."""

_CHECKPOINTER: Final = re.compile(rb"postgres: (?:.*: )?checkpointer ")
_CPU_TIME: Final = slice(11, 13)
"""Of the fields of /proc/PID/stat after the program's name: ticks in user and in system mode."""


class StopSigns(NamedTuple):
    """What moves in a shutdown."""

    process_count: int
    work: tuple[int, ...]
    """Of the checkpointer: bytes read and written or, where the system does not tell us, CPU ticks."""
    commit_lsn: int
    """WAL below is at a majority of safekeepers."""
    has_majority: bool


class StopProgress:
    """Of one shutdown. Times are of a monotonic clock."""

    def __init__(self, started_s: float) -> None:
        self.moved_s = started_s
        """When something last did."""
        self._newest: StopSigns | None = None
        self._fewest = 0

    def may_go_on(self, signs: StopSigns, now_s: float) -> bool:
        """Called again and again, in the order of time."""
        newest, self._newest = self._newest, signs
        if newest is None:
            self._fewest = signs.process_count
        elif signs.has_majority and (
            signs.process_count < self._fewest
            or signs.work != newest.work
            or signs.commit_lsn > newest.commit_lsn
        ):
            self.moved_s = now_s
        self._fewest = min(self._fewest, signs.process_count)
        return now_s - self.moved_s < STILL_S


class StopBeat:
    """Says that a stop gets on, to whoever waits for it: in a file and, within the process, by `moved_s`."""

    def __init__(self) -> None:
        self.path: Path | None = None
        """Where to say it; None: nowhere yet."""
        self.moved_s = 0.0
        """When something last moved, by the monotonic clock."""
        self._count = 0

    def move(self, moved_s: float) -> None:
        """Nothing is said unless it is later than before."""
        if moved_s <= self.moved_s:
            return
        self.moved_s = moved_s
        self._count += 1
        if self.path is not None:
            with contextlib.suppress(OSError):  # on a full disk nobody waits longer than usual
                self.path.write_text(f"{self._count}\n")

    def end(self) -> None:
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


class AroundStop(NamedTuple):
    """What a shutdown depends on besides PostgreSQL itself."""

    own_walsender: Callable[[], int | None]
    """Pid of the process through which our WAL arrives; None while it cannot be told."""
    quorum: Callable[[], tuple[int, bool]]
    """Commit LSN, and whether a majority of safekeepers answers."""
    beat: StopBeat


ON_ITS_OWN: Final = AroundStop(lambda: None, lambda: (0, True), StopBeat())
"""A PostgreSQL whose WAL nobody has to have."""


def checkpointer_work(children: Iterable[int]) -> tuple[int, ...]:
    """What the checkpointer among these processes has done so far; nothing if there is none."""
    for pid in children:
        process = Path(f"/proc/{pid}")
        try:
            if _CHECKPOINTER.match(process.joinpath("cmdline").read_bytes()):
                return (pid, *(_bytes_moved(process) or _cpu_ticks(process)))
        except OSError:
            continue
    return ()


def _cpu_ticks(process: Path) -> tuple[int, ...]:
    """A process that only looks now and then whether it may go on takes less than one in three seconds."""
    fields = process.joinpath("stat").read_bytes().rpartition(b")")[2].split()
    return tuple(map(int, fields[_CPU_TIME]))


def _bytes_moved(process: Path) -> tuple[int, ...]:
    """Attempts that fail are not in it: on a full disk they go on for ever."""
    try:
        lines = process.joinpath("io").read_text().splitlines()
    except OSError:  # another user's, and we are not root
        return ()
    return tuple(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
