"""A data directory on the local file system. Blocks of zeros are left as holes.

It is written in its place: until `global/pg_control`, which comes last, PostgreSQL refuses it. It belongs
to its owner from the first byte on, and nobody else may look into it. While it is written its directory is
locked against another export, which may have found it empty, too.
"""

import errno
import fcntl
import os
import shutil
from pathlib import Path

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.export.ownership import Owner
from excimer.export.sink import ZERO_PAGE, OutputRefusedError
from excimer.pgformat.cluster_paths import check_relative_path

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class DirectorySink:
    """See `ExportSink`."""

    def __init__(self, root: Path, owner: Owner) -> None:
        self._root = root
        self._owner = owner
        self._is_new = False
        self._is_ours = False
        self._lock = -1
        self._file = -1
        self._position = 0
        self._size_bytes = 0

    def begin(self) -> None:
        root = self._root
        try:
            root.mkdir(mode=DIRECTORY_MODE)
            self._is_new = True
        except FileExistsError:
            if not root.is_dir():
                raise OutputRefusedError(f"{root} is a file: name a directory that does not exist") from None
        except OSError as error:
            raise OutputRefusedError(f"{root} cannot be made: {error.strerror}") from error
        self._take_lock()
        if any(root.iterdir()):
            raise OutputRefusedError(f"{root} is not empty: an export needs a place of its own")
        self._is_ours = True
        try:
            self._owner.take(root)
            root.chmod(DIRECTORY_MODE)
        except OSError as error:
            raise OutputRefusedError(
                f"{root} cannot be given to {self._owner.name}: {error.strerror}"
            ) from error

    def add_directory(self, path: str) -> None:
        place = self._root / check_relative_path(path)
        place.mkdir(mode=DIRECTORY_MODE)
        self._owner.take(place)

    def add_file(self, path: str, content: bytes) -> None:
        self.open_file(path, len(content))
        os.pwrite(self._file, content, 0)
        self.close_file()

    def open_file(self, path: str, size_bytes: int) -> None:
        self._file = os.open(self._root / check_relative_path(path), _NEW_FILE, FILE_MODE)
        self._owner.take(self._file)
        os.ftruncate(self._file, size_bytes)
        self._position, self._size_bytes = 0, size_bytes

    def write(self, data: bytes) -> None:
        """Whole pages; runs of them that are not all zeros are written together."""
        view = memoryview(data)
        start = 0
        for end in [*_zero_blocks(data), len(data)]:
            if end > start:
                _write_all(self._file, view[start:end], self._position + start)
            start = end + BLOCK_SIZE_BYTES
        self._position += len(data)

    def skip(self, size_bytes: int) -> None:
        self._position += size_bytes

    def close_file(self) -> None:
        file, self._file = self._file, -1
        os.close(file)

    def finish(self) -> None:
        """Files first, then the directories that name them, then where the export itself lies."""
        files = [path for path in self._root.rglob("*") if not path.is_dir()]
        directories = [path for path in self._root.rglob("*") if path.is_dir()]
        for path in [*files, *directories, self._root, self._root.absolute().parent]:
            _sync(path)
        self._release_lock()

    def abandon(self) -> None:
        if self._file >= 0:
            self.close_file()
        if self._is_ours:
            self._remove()
        self._release_lock()

    def _take_lock(self) -> None:
        """On a file system that has no locks, without one."""
        try:
            self._lock = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise OutputRefusedError(f"{self._root} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputRefusedError(f"another export is being written to {self._root}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise

    def _release_lock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _remove(self) -> None:
        if self._is_new:
            shutil.rmtree(self._root, ignore_errors=True)
            return
        for path in self._root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _zero_blocks(data: bytes) -> list[int]:
    """Where blocks of zeros begin."""
    return [at for at in range(0, len(data), BLOCK_SIZE_BYTES) if data.startswith(ZERO_PAGE, at)]


def _write_all(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
