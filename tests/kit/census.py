"""What an installation holds of its machine, to be compared with what it held before.

Counted is what an orderly process gives back: processes, threads, descriptors that are no files (sockets,
pipes, epoll and pidfds; files that hold layers and WAL come and go), System V segments, files in /dev/shm.

Not here: memory that grows as caches fill (`resident_kib` is for whoever sets a bound).
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SERVICES = ("supervisor", "broker", "controller", "compute-node", "pageserver", "safekeeper-1")


class Census(NamedTuple):
    pids: dict[str, int]
    """Of each service: another one has died meanwhile."""
    threads: dict[str, int]
    descriptors: dict[str, dict[str, int]]
    """By service and kind."""
    children: dict[str, int]
    cgroups: frozenset[str]

    def without_pools(self) -> "Census":
        """Threads and workers are pools that fill up to a bound as they are used, and shrink when they are
        idle.
        """
        return self._replace(threads={}, children={})


def take_census(pids: dict[str, int]) -> Census:
    children = Counter(parent for _, parent in _parents())
    return Census(
        pids=pids,
        threads={name: len(os.listdir(f"/proc/{pid}/task")) for name, pid in pids.items()},
        descriptors={name: _descriptors(pid) for name, pid in pids.items()},
        children={name: children[pid] for name, pid in pids.items()},
        cgroups=frozenset(Path(f"/proc/{pid}/cgroup").read_text() for pid in pids.values()),
    )


def resident_kib(pid: int) -> int:
    """Memory of its own: what was shared with the process that it was forked from is not counted."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return fields["Private_Clean"] + fields["Private_Dirty"]


def processes_in(directories: Iterable[Path]) -> list[str]:
    """Those whose working directory lies in one of these, with their command lines."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                cwd = os.readlink(f"/proc/{entry}/cwd").removesuffix(" (deleted)")
                if any(Path(cwd).is_relative_to(directory) for directory in directories):
                    arguments = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ")
                    found.append(f"{entry} in {cwd}: {arguments.decode(errors='replace')}")
            except OSError:
                continue
    return found


def shared_memory_of(postmaster: int) -> set[str]:
    """Names of the segments that it has mapped: files in /dev/shm, and System V's as ``sysv:ID``."""
    found = set()
    for line in Path(f"/proc/{postmaster}/maps").read_text().splitlines():
        _, _, _, _, inode, *path = line.split(maxsplit=5)
        if path and path[0].startswith("/SYSV"):
            found.add(f"sysv:{inode}")
        elif path and path[0].startswith("/dev/shm/"):
            found.add(path[0].removesuffix(" (deleted)"))
    return found


def unified_group(pid: int) -> Path | None:
    """A process's group of cgroup v2, where that is mounted; it may be gone by the time this is looked at."""
    mounts = [line.partition(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounted = [before.split()[4] for before, _, after in mounts if after.startswith("cgroup2 ")]
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    own = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    return Path(mounted[0], own[0].lstrip("/")) if mounted and own else None


def left_of(names: set[str]) -> set[str]:
    """Which of these segments are still there."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    there = {f"sysv:{line.split()[1]}" for line in lines}
    return {name for name in names if name in there or (name.startswith("/") and Path(name).exists())}


def _parents() -> list[tuple[int, int]]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                found.append((int(entry), int(fields[1])))
            except OSError:
                continue
    return found


def _descriptors(pid: int) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{entry}")
        except OSError:
            continue
        if not target.startswith("/"):
            kinds[target.partition(":[")[0]] += 1
    return dict(kinds)
