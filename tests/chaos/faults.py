"""What can be done to a running system, each with its undoing; chosen at random, one or two at a time."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.chaos.links import Links, LinkState

HOLD_S = (0.2, 6.0)
BRIEF_STOPS = 40
BRIEF_STOP_S = 0.001


class Fault(Protocol):
    @property
    def name(self) -> str: ...

    def begin(self, chance: random.Random) -> None: ...

    def end(self) -> None:
        """Undoes it; dead processes are started again by the target."""


PidFinder = Callable[[], Sequence[int]]
"""Of the processes of one kind that live now."""


@dataclass(slots=True)
class Kill:
    """SIGKILL to one process of a kind."""

    what: str
    find: PidFinder

    @property
    def name(self) -> str:
        return f"kill {self.what}"

    def begin(self, chance: random.Random) -> None:
        if pids := self.find():
            _signal(chance.choice(pids), signal.SIGKILL)

    def end(self) -> None:
        pass


class Stall:
    """SIGSTOP to one process of a kind, SIGCONT at the end."""

    def __init__(self, what: str, find: PidFinder) -> None:
        self.name = f"stall {what}"
        self._find = find
        self._stopped: list[int] = []

    def begin(self, chance: random.Random) -> None:
        if pids := self._find():
            pid = chance.choice(pids)
            self._stopped.append(pid)
            _signal(pid, signal.SIGSTOP)

    def end(self) -> None:
        while self._stopped:
            _signal(self._stopped.pop(), signal.SIGCONT)


@dataclass(slots=True)
class BriefStalls:
    """Single processes of a kind stopped for about a millisecond, again and again: rare orders of events."""

    what: str
    find: PidFinder

    @property
    def name(self) -> str:
        return f"stall {self.what} for milliseconds"

    def begin(self, chance: random.Random) -> None:
        for _ in range(BRIEF_STOPS):
            pids = self.find()
            if not pids:
                return
            pid = chance.choice(pids)
            _signal(pid, signal.SIGSTOP)
            time.sleep(chance.expovariate(1 / BRIEF_STOP_S))
            _signal(pid, signal.SIGCONT)

    def end(self) -> None:
        pass


class BrokenLink:
    """One connection cut, or dead, until the end."""

    def __init__(self, links: Links, link: str, state: LinkState) -> None:
        self.name = f"{state.name.lower()} link {link}"
        self._links = links
        self._link = link
        self._state = state

    def begin(self, chance: random.Random) -> None:
        self._links.change(self._link, self._state)

    def end(self) -> None:
        self._links.change(self._link, LinkState.OPEN)


class FullDisk:
    """A ballast file takes all that is free of a small file system."""

    def __init__(self, what: str, mount: Path) -> None:
        self.name = f"full disk of {what}"
        self._ballast = mount / "ballast"
        self._mount = mount

    def begin(self, chance: random.Random) -> None:
        status = os.statvfs(self._mount)
        size_bytes = status.f_bavail * status.f_frsize
        with self._ballast.open("wb") as file, contextlib.suppress(OSError):
            while size_bytes >= status.f_frsize:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size_bytes)
                except OSError:
                    size_bytes //= 2

    def end(self) -> None:
        self._ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def small_file_system(path: Path, size_mib: int) -> Iterator[Path]:
    """A file system of its own at `path`, in memory; needs root."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0755", "tmpfs", str(path)], check=True
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def may_mount() -> bool:
    return os.geteuid() == 0


def children(pid: int, program: bytes = b"") -> list[int]:
    """Processes whose parent is `pid` and whose command line has `program`."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    if program in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(int(child))
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
