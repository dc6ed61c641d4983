"""Files of a control group (cgroup v2): values read and written, and what they mean.

Not here: which groups there are (`excimer.compute_node.cgroups`).
"""

import contextlib
import os
from pathlib import Path

from excimer.wire.compute_limits import ComputeSize


def read_size(path: Path) -> ComputeSize:
    """Of a group: what the kernel keeps to."""
    cpu_milli = memory_mib = 0
    with contextlib.suppress(OSError, ValueError):
        quota, period = read_words(path / "cpu.max")
        cpu_milli = 0 if quota == "max" else int(quota) * 1000 // int(period)
    with contextlib.suppress(OSError, ValueError):
        (limit,) = read_words(path / "memory.max")
        memory_mib = 0 if limit == "max" else int(limit) >> 20
    return ComputeSize(cpu_milli, memory_mib)


def write_value(path: Path, value: str) -> None:
    """Into a file of the kernel's, which is there or not: none is made. Raises OSError with its name."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(descriptor)


def read_words(path: Path) -> list[str]:
    return path.read_text().split()
