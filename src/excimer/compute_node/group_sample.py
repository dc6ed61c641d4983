"""A sample of what an endpoint's group uses, from the files of its cgroup and the arena's counters.

What a file says that is not there is 0: without the kernel's memory controller nothing is known of memory.

Not here: what follows from it (`scaling_policy`).
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from excimer.compute_node.scaling_policy import Sample
from excimer.io.cgroup_files import read_words

IN_USE: Final = ("anon", "shmem", "unevictable", "kernel_stack", "pagetables", "slab_unreclaimable")
"""Of memory.stat: what reclaim cannot give back where there is no swap."""


def read_sample(group: Path, now_s: float, reads: int) -> Sample:
    """`reads`: of the arena, 0 if that is not known."""
    cpu = _table(group / "cpu.stat")
    memory = _table(group / "memory.stat")
    return Sample(
        time_s=now_s,
        cpu_us=cpu.get("usage_usec", 0),
        throttled_us=cpu.get("throttled_usec", 0),
        refaults=memory.get("workingset_refault_file", 0),
        stalled_us=_stalled_us(group / "memory.pressure"),
        reads=reads,
        memory_mib=_number(group / "memory.current") >> 20,
        in_use_mib=sum(memory.get(name, 0) for name in IN_USE) >> 20,
        processes=len(_words(group / "cgroup.procs")),
    )


def _table(path: Path) -> Mapping[str, int]:
    words = _words(path)
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=False)}


def _stalled_us(path: Path) -> int:
    """``some avg10=0.00 … total=1234``."""
    for word in _words(path)[:5]:
        if word.startswith("total="):
            return int(word.removeprefix("total="))
    return 0


def _number(path: Path) -> int:
    words = _words(path)
    return int(words[0]) if words else 0


def _words(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return read_words(path)
    return []
