"""Who may touch an endpoint's data directory: its manager while it lives, or who removes what a stop left.

An flock on the directory around it, which the kernel drops with its holder. The instance lock would not do:
who removes holds it for a moment, and a manager that starts just then has to wait, not to give up.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from excimer.base.errors import RetryableError

WAIT_S: Final = 30.0
_POLL_S = 0.01


class DirectoryBusyError(RetryableError):
    """Somebody else works in the endpoint's directory."""


@contextlib.contextmanager
def directory_lock(run_dir: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Holds `run_dir`, which must exist. Blocks up to `wait_s`; raises `DirectoryBusyError`, OSError."""
    descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + wait_s
    try:
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise DirectoryBusyError(f"{run_dir} is in use by another process")
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
