"""One process per data directory: an flock on `LOCK`, with the owner's pid inside for people.

The kernel drops the lock with its process, however that ends, so there are no stale locks. A process that
was killed may take a while to end: the pid in the file tells whether only that is waited for.
"""

import fcntl
import os
import signal
import time
from pathlib import Path
from types import TracebackType

from excimer.base.errors import RefusedError
from excimer.io.private_files import PRIVATE_FILE, claim_private_dir

LOCK_FILE_NAME = "LOCK"
ENDING_LIMIT_S = 10.0
"""How long a killed owner may take to end; writing to a slow disk is what it may be at."""
LOOK_S = 0.01


class AlreadyRunningError(RefusedError):
    """Another process owns the data directory."""


class InstanceLock:
    """Held from construction until `release` or the end of the process. Usable as a context."""

    def __init__(self, data_dir: Path, what: str, *, passable: bool = False) -> None:
        """Makes `data_dir` if needed, and closes it to others; `passable` as in `make_private_dir`.

        Raises `AlreadyRunningError`, at once unless the owner is about to end, and `ForeignDirectoryError`
        for one that holds other things and no lock of ours.
        """
        claim_private_dir(data_dir, (LOCK_FILE_NAME,), passable=passable)
        path = data_dir / LOCK_FILE_NAME
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        deadline = time.monotonic() + ENDING_LIMIT_S
        while not _lock(self._fd):
            owner = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            if not _is_ending(owner) or time.monotonic() > deadline:
                os.close(self._fd)
                whose = f"{what}: {data_dir} is in use by process {owner}"
                raise AlreadyRunningError(f"{whose}: stop it first, or use another directory")
            time.sleep(LOOK_S)
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


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_ending(owner: str) -> bool:
    """Whether the process has been killed, and only has not let go of everything yet."""
    try:
        lines = Path(f"/proc/{int(owner)}/status").read_text().splitlines()
    except ValueError:
        return False
    except OSError:
        return True
    status = dict(line.partition(":")[::2] for line in lines)
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return status["State"].split()[0] in "ZX" or bool(pending & 1 << signal.SIGKILL - 1)
