"""Directories that pytest does not give: those the unprivileged user can reach, and those in memory."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def reachable_directory() -> Iterator[Path]:
    """A new directory, removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="excimer-test-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def new_memory_directory(prefix: str) -> Path:
    """A new directory without a disk below it, where the system has that: syncing costs nothing there."""
    shared_memory = Path("/dev/shm")
    parent = shared_memory if os.access(shared_memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
