"""The system calls that make WAL durable, as an object, so that tests can make the N-th of them fail.

Not here: what is written where (`wal_storage`, `control_file`).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_ZEROS = bytes(1 << 20)


class Disk:
    """The real disk. All calls block and raise OSError."""

    def pwrite(self, fd: int, data: bytes, offset: int) -> None:
        """Writes all of `data`."""
        done = os.pwrite(fd, data, offset)
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def create_zeros(self, path: Path, size_bytes: int) -> None:
        """A durable file of real zeros: overwriting them later needs no new space and no journal."""
        with self._new_file(path) as fd:
            for offset in range(0, size_bytes, len(_ZEROS)):
                self.pwrite(fd, _ZEROS[: size_bytes - offset], offset)

    def replace_file(self, path: Path, data: bytes) -> None:
        """Puts `data` in the place of the whole file, durably: afterwards it is the old or the new."""
        with self._new_file(path) as fd:
            self.pwrite(fd, data, 0)

    @contextlib.contextmanager
    def _new_file(self, path: Path) -> Iterator[int]:
        """A file that gets its name once it is whole and on disk; a failed one leaves nothing behind."""
        temporary = path.with_name(path.name + ".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            yield fd
            os.fsync(fd)
            os.rename(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self.sync_directory(path.parent)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def sync_directory(self, directory: Path) -> None:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
