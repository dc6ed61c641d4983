"""One process per data directory: an flock on `LOCK`, with the owner's pid inside for people.

The kernel drops the lock with its process, however that ends, so there are no stale locks; the
pid in the file is only for the message.
"""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from excimer.base.errors import RefusedError
from excimer.io.private_files import PRIVATE_FILE, claim_private_dir

LOCK_FILE_NAME = "LOCK"


class AlreadyRunningError(RefusedError):
    """Another process owns the data directory."""


class InstanceLock:
    """Held from construction until `release` or the end of the process. Usable as a context."""

    def __init__(self, data_dir: Path, what: str, *, passable: bool = False) -> None:
        """Makes `data_dir` if needed, and closes it to others; `passable` as in `make_private_dir`.

        Raises `AlreadyRunningError` at once, without waiting, and `ForeignDirectoryError` for one that holds
        other things and no lock of ours.
        """
        claim_private_dir(data_dir, (LOCK_FILE_NAME,), passable=passable)
        path = data_dir / LOCK_FILE_NAME
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunningError(
                f"{what}: {data_dir} is in use by process {owner}: stop it first, or use another directory"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Idempotent. The file stays: removing it would let two owners in."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "InstanceLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
