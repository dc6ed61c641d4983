"""Control groups: found, limited, read and removed.

The tree of files is laid in a directory where the kernel of the machine that runs the tests may lack what it
takes (controllers bound to cgroup v1, a delegated subtree): there the files are checked, not what the kernel
makes of them. Membership and removal are checked on a real cgroup v2 (`test_resources`).
"""

import errno
import hashlib
from pathlib import Path

import pytest

from excimer.base.clock import Monotonic, UnixTime
from excimer.compute_node import cgroups
from excimer.compute_node.cgroups import Cgroup, Machine, prepare_cgroups, soft_limit_mib
from excimer.compute_node.group_sample import read_sample
from excimer.compute_node.resources import LimitsUnkeptError, MemoryInUseError, Resources
from excimer.compute_node.scaling_policy import Sample
from excimer.io.cgroup_files import write_value
from excimer.wire.compute_limits import (
    ComputeLimits,
    ComputeSize,
    limits_problem,
    shared_buffers_mib,
)

BOTH = ("cpu", "memory")
OWNER = Path("/srv/excimer/endpoints")
NAME = f"excimer-{hashlib.sha256(bytes(OWNER)).hexdigest()[:12]}"
GIB = 1 << 30
LIMITS = ComputeLimits(cpu_min_milli=250, cpu_max_milli=1500, memory_min_mib=256, memory_max_mib=1024)
GROUP_FILES = ("cgroup.procs", "cpu.max", "cpu.max.burst", "memory.high", "memory.max")


def lay(directory: Path, *controllers: str, enabled: tuple[str, ...] = ()) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cgroup.controllers").write_text(" ".join(controllers) + "\n")
    (directory / "cgroup.subtree_control").write_text(" ".join(enabled) + "\n")
    (directory / "cgroup.procs").write_text("")
    return directory


def prepared(parent: Path, machine: Machine, told: Path | None = None) -> cgroups.Cgroups:
    """With the files that a kernel puts into the node's group when it is made."""
    lay(parent / NAME)
    return prepare_cgroups(OWNER, told, machine)


def test_root_has_its_groups_below_the_machines_root(tmp_path: Path) -> None:
    mount = lay(tmp_path, *BOTH, enabled=("cpu",))
    found = prepared(mount, Machine(mount, "/system.slice/x.service", frozenset(), True))
    assert found.directory == mount / NAME
    assert not found.lacks
    assert (mount / "cgroup.subtree_control").read_text() == "+memory", "cpu was there already"
    assert found.described() == f"cpu and memory by {found.directory}"


def test_a_controller_of_cgroup_v1_lacks_and_is_named(tmp_path: Path) -> None:
    mount = lay(tmp_path, "hugetlb", "memory")
    found = prepared(mount, Machine(mount, "/", frozenset({"cpu", "cpuacct"}), True))
    assert found.lacks == {"cpu": "the kernel's cpu controller is bound to cgroup v1 on this machine"}
    assert found.described().startswith(f"memory by {found.directory}; cpu not kept to: the kernel's")


def test_others_use_the_subtree_that_systemd_has_delegated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = lay(tmp_path / "user.slice" / "excimer.service", *BOTH)
    machine = Machine(tmp_path, "/user.slice/excimer.service", frozenset(), False)
    not_ours = prepare_cgroups(OWNER, None, machine)
    assert not_ours.directory is None
    assert "no subtree of cgroup v2 is delegated" in not_ours.lacks["memory"]
    monkeypatch.setattr(cgroups, "_is_delegated", lambda path: path == unit)
    assert prepared(unit, machine).directory == unit / NAME
    in_its_leaf = machine._replace(own="/user.slice/excimer.service/main")
    assert prepared(unit, in_its_leaf).directory == unit / NAME, "DelegateSubgroup="


def test_processes_of_the_parent_move_to_a_leaf_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own rule, which a directory does not have: no controllers below a group with processes."""
    parent = lay(tmp_path, *BOTH)
    (parent / "cgroup.procs").write_text("17\n4\n")
    lay(parent / cgroups.OWN_LEAF)
    moved: list[str] = []

    def write_as_the_kernel(path: Path, value: str) -> None:
        if path == parent / "cgroup.subtree_control" and (parent / "cgroup.procs").read_text():
            raise OSError(errno.EBUSY, "Device or resource busy")
        if path == parent / cgroups.OWN_LEAF / "cgroup.procs":
            moved.append(value)
            if moved == ["17", "4"]:
                (parent / "cgroup.procs").write_text("")
        write_value(path, value)

    monkeypatch.setattr("excimer.compute_node.cgroups.write_value", write_as_the_kernel)
    found = prepared(parent, Machine(None, "/", frozenset(), False), told=parent)
    assert moved == ["17", "4"]
    assert not found.lacks


def test_nothing_of_it_is_there(tmp_path: Path) -> None:
    found = prepare_cgroups(OWNER, None, Machine(None, "/", frozenset(), True))
    assert found.described() == "not kept to: this machine has no cgroup v2 mounted"
    named = prepare_cgroups(OWNER, tmp_path / "gone", Machine(tmp_path, "/", frozenset(), True))
    assert "No such file or directory" in named.lacks["cpu"]


def group(tmp_path: Path, *controllers: str) -> Cgroup:
    for name in GROUP_FILES:
        (tmp_path / name).touch()
    return Cgroup(tmp_path, frozenset(controllers))


@pytest.mark.parametrize("milli", [100, 250, 1000, 3500])
def test_cpu_is_a_part_of_each_period(tmp_path: Path, milli: int) -> None:
    made = group(tmp_path, *BOTH)
    made.limit_cpu(milli)
    assert (tmp_path / "cpu.max").read_text() == f"{milli * 100} 100000"
    assert (tmp_path / "cpu.max.burst").read_text() == str(milli * 100), "what was not used may be, once"
    assert made.size() == ComputeSize(cpu_milli=milli)
    made.limit_cpu(0)
    assert (tmp_path / "cpu.max").read_text() == "max 100000"
    assert made.size() == ComputeSize()


def test_memory_is_reclaimed_before_anything_is_killed(tmp_path: Path) -> None:
    made = group(tmp_path, *BOTH)
    made.limit_memory(1024)
    assert (tmp_path / "memory.max").read_text() == str(GIB)
    assert (tmp_path / "memory.high").read_text() == str(soft_limit_mib(1024) << 20)
    assert made.size() == ComputeSize(memory_mib=1024)
    assert all(size - 64 <= soft_limit_mib(size) < size for size in (256, 1024))
    made.limit_memory(0)
    assert {(tmp_path / f"memory.{name}").read_text() for name in ("high", "max")} == {"max"}


def test_a_kernel_without_a_file_is_not_given_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Cgroup(tmp_path, frozenset(BOTH)).limit_cpu(100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"cpu_min_milli": 100, "cpu_max_milli": 100}, None),
        ({"cpu_max_milli": 1000}, "limits of CPU are 100 to 256000 millicores"),
        ({"cpu_min_milli": 99, "cpu_max_milli": 1000}, "limits of CPU are"),
        ({"memory_min_mib": 255, "memory_max_mib": 256}, "limits of memory are 256 to"),
        ({"memory_min_mib": 512, "memory_max_mib": 256}, "the minimum of memory, 512 MiB, is above"),
        ({"memory_min_mib": 256, "memory_max_mib": 0}, "limits of memory are"),
        ({"cpu_min_milli": -100, "cpu_max_milli": 100}, "limits of CPU are"),
    ],
)
def test_which_limits_may_be(changes: dict[str, int], problem: str | None) -> None:
    found = limits_problem(ComputeLimits(**changes))
    assert (found is None) if problem is None else (found is not None and found.startswith(problem))


def test_shared_buffers_are_a_quarter_of_the_minimum() -> None:
    assert shared_buffers_mib(ComputeLimits()) is None
    assert shared_buffers_mib(ComputeLimits(cpu_min_milli=100, cpu_max_milli=200)) is None
    assert shared_buffers_mib(LIMITS) == 64
    assert shared_buffers_mib(ComputeLimits(memory_min_mib=1 << 20, memory_max_mib=1 << 20)) == 8192


class Warnings(dict[str, str]):
    def warn(self, about: str, warning: str | None) -> None:
        self.pop(about, None)
        if warning is not None:
            self[about] = warning


def resources(tmp_path: Path, when_unkept: str, *controllers: str) -> tuple[Resources, Warnings]:
    machine = Machine(lay(tmp_path, *controllers), "/", frozenset({"cpu"}), True)
    warnings = Warnings()
    found = prepared(tmp_path, machine)
    assert found.directory is not None
    directory = found.directory / "endpoint-main"
    directory.mkdir()
    group(directory, *controllers)
    return Resources(found, "refuse" if when_unkept == "refuse" else "tell", warnings.warn), warnings


def test_limits_that_cannot_be_kept_to_are_told(tmp_path: Path) -> None:
    made, warnings = resources(tmp_path, "tell", "memory")
    placed = made.place("main", LIMITS)
    assert placed is not None
    assert placed.size() == ComputeSize(memory_mib=256), "what can be kept to is"
    assert warnings["endpoint main"].startswith(
        "without what was asked for: limits of cpu are not kept to: the"
    )
    assert made.change("main", ComputeLimits(memory_min_mib=512, memory_max_mib=512)) == ""
    assert not warnings
    assert placed.size().memory_mib == 512
    assert "bound to cgroup v1" in made.change("main", LIMITS)
    made.release("main").close()
    assert not warnings, "it does not run any more"


def test_or_refused(tmp_path: Path) -> None:
    made, warnings = resources(tmp_path, "refuse", "memory")
    with pytest.raises(
        LimitsUnkeptError, match="endpoint main is not started: its limits of cpu are not kept"
    ):
        made.place("main", LIMITS)
    assert not made.sizes
    only_memory = ComputeLimits(memory_min_mib=512, memory_max_mib=512)
    assert made.place("main", only_memory) is not None
    with pytest.raises(LimitsUnkeptError):
        made.change("main", LIMITS)
    assert made.size("main") == ComputeSize(memory_mib=512), "as it was"
    assert not warnings


class FixedClock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.now_s)

    def now(self) -> UnixTime:
        return UnixTime(self.now_s)


def write_use(group: Path, cpu_us: int, *, refaults: int = 0, in_use_mib: int = 100) -> None:
    """As Linux 6.1 writes it."""
    (group / "cpu.stat").write_text(f"usage_usec {cpu_us}\nuser_usec 1\nnr_periods 9\nthrottled_usec 0\n")
    (group / "memory.stat").write_text(
        f"anon {in_use_mib << 19}\nshmem {in_use_mib << 19}\nfile 99\nworkingset_refault_file {refaults}\n"
    )
    (group / "memory.current").write_text(f"{1 << 28}\n")
    (group / "memory.pressure").write_text(
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n"
    )


def test_a_sample_is_what_the_files_of_a_group_say(tmp_path: Path) -> None:
    assert read_sample(tmp_path, 1.0, 7) == Sample(1.0, 0, 0, 0, 0, 7, 0, 0, 0), "nothing is there"
    group(tmp_path, *BOTH)
    write_use(tmp_path, 1234, refaults=5)
    (tmp_path / "cgroup.procs").write_text("1\n2\n")
    assert read_sample(tmp_path, 1.0, 7) == Sample(1.0, 1234, 0, 5, 77, 7, 256, 100, 2)


def test_a_size_follows_what_is_used_and_is_written(tmp_path: Path) -> None:
    machine = Machine(lay(tmp_path, *BOTH, enabled=BOTH), "/", frozenset(), True)
    found, clock = prepared(tmp_path, machine), FixedClock()
    assert found.directory is not None
    directory = found.directory / "endpoint-main"
    directory.mkdir()
    placed = group(directory, *BOTH)
    made = Resources(found, clock=clock)
    made.place("main", LIMITS)
    assert made.elastic() == ["main"]
    assert placed.size() == ComputeSize(1500, 256), "a start has all the CPU that it may have"
    for second in range(200):
        clock.now_s += 1
        write_use(directory, second * 100_000, refaults=0)
        made.scale("main", 0)
    assert placed.size() == made.size("main") == ComputeSize(250, 256)
    clock.now_s += 1
    write_use(directory, 199 * 100_000 + 240_000, refaults=50_000)
    made.scale("main", 0)
    assert placed.size() == ComputeSize(350, 384), "more of both, at once"
    write_use(directory, 0, in_use_mib=400)
    with pytest.raises(MemoryInUseError, match="endpoint main has 400 MiB in use"):
        made.change("main", ComputeLimits(memory_min_mib=256, memory_max_mib=300))
    assert placed.size() == ComputeSize(350, 384), "nothing has changed"
    made.change("main", ComputeLimits(memory_min_mib=1024, memory_max_mib=2048))
    assert placed.size() == ComputeSize(0, 1024)
    fixed = ComputeLimits(memory_min_mib=1024, memory_max_mib=1024)
    made.change("main", fixed)
    assert made.elastic() == []
