"""Directories that the unprivileged user can reach: pytest's own are closed to everyone but us."""

import contextlib
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
