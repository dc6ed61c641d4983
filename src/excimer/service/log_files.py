"""Log files that stay small while they are written: what has grown too long is copied aside and cut.

::

    pageserver.log      written by a process, its children, and whatever crashes in it
    pageserver.log.1    what came before, `LOG_SIZE_MAX` or a little more
    ...                 up to `LOG_FILES_KEPT`; older ones are gone

Copied and cut, not renamed: PostgreSQL and its backends, redo workers, and the C library when it reports a
crash, hold the file open and know of no rotation. All of them append, so that what they write next goes to
the beginning of the file. A line that is written between the copy and the cut, within microseconds, is lost.

Not here: what is written, and how often (`logs`, `log_limit`).
"""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

LOG_SIZE_MAX: Final = 16 << 20
LOG_FILES_KEPT: Final = 3
"""Beside the one that is written."""
CHECK_INTERVAL_S: Final = 2.0
_COPY_SIZE_BYTES: Final = 1 << 20
_FILE_MODE: Final = 0o600


def open_log(path: Path) -> int:
    """A descriptor to give to a process as its output: appends, to a file that only its owner may read.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _FILE_MODE)
    os.fchmod(descriptor, _FILE_MODE)
    return descriptor


def rotate(path: Path, size_max: int = LOG_SIZE_MAX, kept: int = LOG_FILES_KEPT) -> bool:
    """Copies the log aside and cuts it if it is longer than `size_max`; whether it did. Raises OSError.

    With a full disk there is no copy, and the log is cut all the same: it would only grow on.
    """
    try:
        source = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if os.fstat(source).st_size <= size_max:
            return False
        for number in range(kept, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(numbered(path, number - 1), numbered(path, number))
        try:
            _copy_end(source, numbered(path, 1), size_max)
        finally:
            os.ftruncate(source, 0)
        return True
    finally:
        os.close(source)


def numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _copy_end(source: int, target: Path, size_max: int) -> None:
    """The last `2 * size_max` bytes at most: after a flood the rest is of no use, and may not fit."""
    temporary = target.with_name(f"{target.name}.new")
    temporary.unlink(missing_ok=True)
    copy = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    try:
        position = max(0, os.fstat(source).st_size - 2 * size_max)
        while data := os.pread(source, _COPY_SIZE_BYTES, position):
            position += len(data)
            while data:
                data = data[os.write(copy, data) :]
        owner = os.fstat(source)
        if os.geteuid() == 0:
            os.fchown(copy, owner.st_uid, owner.st_gid)
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(copy)


class LogRotation:
    """A thread that keeps log files small until `stop`; one per process. It must not use the log itself."""

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        size_max: int = LOG_SIZE_MAX,
        interval_s: float = CHECK_INTERVAL_S,
        failed: Callable[[Path, OSError], None],
    ) -> None:
        self._paths = paths
        self._size_max = size_max
        self._interval_s = interval_s
        self._failed = failed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log rotation", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            for path in self._paths:
                try:
                    rotate(path, self._size_max)
                except OSError as error:
                    self._failed(path, error)
