"""The control groups (cgroup v2) of a node's endpoints: found or made, limited, read, removed.

::

    PARENT                                told, or the machine's root, or the subtree delegated to us
      '- excimer-HASH                     this node's; the hash is of its endpoints' directory
           |- endpoint-main               manager, postgres, backends: each is born in it
           '- endpoint-other

A manager enters its group in the first instruction of its fork, so that all it ever starts is in it, a
PostgreSQL that is started again included, and nothing needs to be moved later.

The kernel enables a controller for groups only below one that holds no process itself (but for the root).
Where a controller lacks, groups count what the kernel always counts (cpu.stat, pressure), and `lacks` says
why the limit cannot be kept to.

Not here: which size an endpoint is to have, and what is done where a controller lacks (`resources`).
"""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from excimer.io.cgroup_files import read_size, read_words, write_value
from excimer.service.logs import get_logger
from excimer.wire.compute_limits import ComputeSize

CONTROLLERS: Final = ("cpu", "memory")
GROUP_PREFIX: Final = "endpoint-"
OWN_LEAF: Final = "services"
"""Where processes go that sit in a delegated group, which may then have controllers for others."""
MOVE_ROUNDS: Final = 10
CPU_PERIOD_US: Final = 100_000
REMOVAL_LIMIT_S: Final = 2.0
REMOVAL_POLL_S: Final = 0.01
MOUNTS: Final = Path("/proc/self/mountinfo")
OWN_GROUPS: Final = Path("/proc/self/cgroup")

log = get_logger(__name__)


class Machine(NamedTuple):
    """What this machine has of cgroup v2; tests lay another."""

    mount: Path | None
    """Where the hierarchy is mounted."""
    own: str
    """Our group in it, as ``/system.slice/excimer.service``."""
    elsewhere: frozenset[str]
    """Controllers that cgroup v1 has taken."""
    is_root: bool


def look_at_machine() -> Machine:
    mount = None
    with contextlib.suppress(OSError):
        mount = next(_mounts(MOUNTS.read_text()), None)
    own, elsewhere = "/", set[str]()
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            number, names, path = line.split(":", 2)
            if number == "0":
                own = path
            else:
                elsewhere.update(names.split(","))
    return Machine(mount, own, frozenset(elsewhere), os.geteuid() == 0)


def _mounts(mountinfo: str) -> Iterator[Path]:
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            yield Path(before.split()[4].encode().decode("unicode_escape"))


class Cgroups:
    """All groups of one node. `directory` None: this machine has none for us, and there are no groups."""

    def __init__(self, directory: Path | None, lacks: Mapping[str, str]) -> None:
        self.directory = directory
        self.lacks = lacks
        """By controller, why limits of it cannot be kept to."""

    def group(self, endpoint: str) -> "Cgroup | None":
        if self.directory is None:
            return None
        return Cgroup(
            self.directory / f"{GROUP_PREFIX}{endpoint}", frozenset(CONTROLLERS) - self.lacks.keys()
        )

    def groups(self) -> dict[str, "Cgroup"]:
        """Those that are there, by their endpoint."""
        found: dict[str, Cgroup] = {}
        with contextlib.suppress(OSError):
            for path in [] if self.directory is None else self.directory.iterdir():
                if path.name.startswith(GROUP_PREFIX) and path.is_dir():
                    name = path.name.removeprefix(GROUP_PREFIX)
                    group = self.group(name)
                    assert group is not None
                    found[name] = group
        return found

    def leave(self) -> None:
        """Removes the node's own group if nothing is left in it."""
        if self.directory is not None:
            with contextlib.suppress(OSError):
                self.directory.rmdir()

    def described(self) -> str:
        """For an operator, in a line."""
        if self.directory is None:
            return f"not kept to: {'; '.join(sorted(set(self.lacks.values())))}"
        kept = [name for name in CONTROLLERS if name not in self.lacks]
        said = [f"{' and '.join(kept)} by {self.directory}"] if kept else []
        return "; ".join(said + [f"{name} not kept to: {why}" for name, why in sorted(self.lacks.items())])


def prepare_cgroups(owner: Path, told: Path | None, machine: Machine) -> Cgroups:
    """Finds the parent, makes the node's group there, and enables what can be enabled. Never raises.

    `owner`: the directory that tells this node from others of the machine. `told`: the parent that the
    operator has named.
    """
    if machine.mount is None and told is None:
        return _none("this machine has no cgroup v2 mounted")
    try:
        parent = told or _find_parent(machine)
        if parent is None:
            return _none(
                f"no subtree of cgroup v2 is delegated to us in {machine.own}: start Excimer as a systemd "
                "service with Delegate=yes, or name a group as cgroup_parent"
            )
        directory = _directory(owner, parent)
        directory.mkdir(exist_ok=True)
    except OSError as error:
        return _none(f"{error.filename}: {error.strerror}")
    is_lacking = {
        name: reason for name in CONTROLLERS if (reason := _enable(name, parent, directory, machine))
    }
    return Cgroups(directory, is_lacking)


def remove_cgroups(owner: Path, told: Path | None, machine: Machine) -> bool:
    """All groups of a node that does not run, with what is in them; whether they are gone. Blocks."""
    parent = told or (_find_parent(machine) if machine.mount is not None else None)
    if parent is None or not _directory(owner, parent).is_dir():
        return True
    left = Cgroups(_directory(owner, parent), {})
    deadline = time.monotonic() + REMOVAL_LIMIT_S
    for group in left.groups().values():
        with contextlib.suppress(OSError):
            group.kill()
        while not group.remove() and time.monotonic() < deadline:
            time.sleep(REMOVAL_POLL_S)
    left.leave()
    return not _directory(owner, parent).exists()


def _directory(owner: Path, parent: Path) -> Path:
    return parent / f"excimer-{hashlib.sha256(bytes(owner)).hexdigest()[:12]}"


def _none(reason: str) -> Cgroups:
    return Cgroups(None, dict.fromkeys(CONTROLLERS, reason))


def _find_parent(machine: Machine) -> Path | None:
    """Root uses the machine's root, which alone may hold processes. Others use what systemd has delegated to
    them: the group they are in, or that one's parent (DelegateSubgroup=).
    """
    assert machine.mount is not None
    if machine.is_root:
        return machine.mount
    own = machine.mount / machine.own.lstrip("/")
    for path in (own.parent, own):
        if path != machine.mount and _is_delegated(path) and os.access(path, os.W_OK):
            return path
    return None


def _is_delegated(path: Path) -> bool:
    """systemd marks so what it leaves to its user; other groups it changes as it likes."""
    try:
        return os.getxattr(path, "user.delegate") == b"1"
    except OSError:
        return False


def _enable(name: str, parent: Path, directory: Path, machine: Machine) -> str | None:
    """Has a controller for the endpoints' groups; or says why not."""
    try:
        if name not in read_words(parent / "cgroup.controllers"):
            if name in machine.elsewhere:
                return f"the kernel's {name} controller is bound to cgroup v1 on this machine"
            return f"the {name} controller is not delegated to {parent}"
        if name not in read_words(parent / "cgroup.subtree_control"):
            _enable_below(name, parent)
        if name not in read_words(directory / "cgroup.subtree_control"):
            write_value(directory / "cgroup.subtree_control", f"+{name}")
    except OSError as error:
        return f"the {name} controller cannot be enabled below {parent}: {error.strerror}"
    return None


def _enable_below(name: str, parent: Path) -> None:
    """A group that holds processes may not: they move to a leaf of their own first. Raises OSError."""
    for _ in range(MOVE_ROUNDS):
        try:
            write_value(parent / "cgroup.subtree_control", f"+{name}")
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        leaf = parent / OWN_LEAF
        leaf.mkdir(exist_ok=True)
        for pid in read_words(parent / "cgroup.procs"):
            with contextlib.suppress(ProcessLookupError):
                write_value(leaf / "cgroup.procs", pid)
    write_value(parent / "cgroup.subtree_control", f"+{name}")


class Cgroup:
    """One endpoint's group. `controllers`: those that there are in it."""

    def __init__(self, path: Path, controllers: frozenset[str]) -> None:
        self.path = path
        self.controllers = controllers

    def make(self) -> None:
        """It may be there already. Raises OSError."""
        self.path.mkdir(exist_ok=True)

    def join(self) -> None:
        """Moves the process that calls it in. Raises OSError."""
        write_value(self.path / "cgroup.procs", "0")

    def holds(self, pid: int) -> bool:
        try:
            return str(pid) in read_words(self.path / "cgroup.procs")
        except OSError:
            return False

    def limit_cpu(self, cpu_milli: int) -> None:
        """0: no limit. Raises OSError."""
        burst = self.path / "cpu.max.burst"
        if not cpu_milli:
            write_value(self.path / "cpu.max", f"max {CPU_PERIOD_US}")
            return
        quota_us = cpu_milli * CPU_PERIOD_US // 1000
        with contextlib.suppress(OSError):  # it may not be above the quota, which is about to change
            write_value(burst, "0")
        write_value(self.path / "cpu.max", f"{quota_us} {CPU_PERIOD_US}")
        with contextlib.suppress(OSError):  # before Linux 5.14 there is none
            write_value(burst, str(quota_us))

    def limit_memory(self, memory_mib: int) -> None:
        """The kernel reclaims from `soft_limit_mib` on, and kills above it. 0: none. Raises OSError."""
        high = "max" if not memory_mib else str(soft_limit_mib(memory_mib) << 20)
        write_value(self.path / "memory.high", high)
        write_value(self.path / "memory.max", "max" if not memory_mib else str(memory_mib << 20))

    def remove(self) -> bool:
        """Whether it is gone: it is not while a process lives in it."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Every process in it, whatever its parent. Raises OSError; before Linux 5.14 always."""
        write_value(self.path / "cgroup.kill", "1")

    def size(self) -> ComputeSize:
        """What the kernel keeps to now."""
        return read_size(self.path)


def soft_limit_mib(memory_mib: int) -> int:
    """Where the kernel begins to take cached pages back: in time before there is none to take."""
    return memory_mib - max(memory_mib // 16, 8)
