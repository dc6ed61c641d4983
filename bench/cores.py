"""Binding what is measured to one core, so that "on one core" means it; and what a process has used of it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

CORES = frozenset(os.sched_getaffinity(0))
MEASURED_CORE = min(CORES)


@contextlib.contextmanager
def bound_to_one_core() -> Iterator[None]:
    """This program and processes started within, with all their threads; the latter stay there."""
    with _bound_to({MEASURED_CORE}):
        yield


@contextlib.contextmanager
def away_from_it() -> Iterator[None]:
    """This program on the other cores, if there are any."""
    with _bound_to(set(CORES - {MEASURED_CORE} or CORES)):
        yield


@contextlib.contextmanager
def _bound_to(cores: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(process: "subprocess.Popen[bytes] | None") -> float:
    """User and system time of a running process so far: its cost, whatever else wants its core."""
    assert process is not None
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
