"""A directory of WAL as PostgreSQL's `restore_command` wants it: whole segments, and a last one that is not.

::

    excimer-branch                     whose WAL, and which segment comes next. Locked while it is used
    000000010000000000000003           whole, on disk before it has this name
    000000010000000000000004.partial   as far as it has come, then zeros

Names and bytes are pg_receivewal's. Whoever comes again writes the next segment anew, with the same bytes;
whole ones may have been taken away meanwhile.

Not here: where WAL comes from (`wal_receiving`).
"""

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Final

from excimer.base.errors import RefusedError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.export.ownership import Owner
from excimer.pgformat.wal_segment import segment_name

MARK_NAME: Final = "excimer-branch"
PARTIAL_SUFFIX: Final = ".partial"
_MARK_LSN: Final = b"%016X\n"
_MARK_LSN_SIZE_BYTES: Final = 17
_MARK_SIZE_BYTES: Final = 2 * 33 + _MARK_LSN_SIZE_BYTES
"""Ids of tenant and timeline, then the LSN at which the next segment begins; all in hex."""
_TIMELINE: Final = 1


class WalDirectoryError(RefusedError):
    """The directory cannot take this branch's WAL."""


class WalDirectory:
    """Opened for one branch; a context. Everything blocks for the disk and raises OSError."""

    def __init__(
        self, path: Path, tenant_id: TenantId, timeline_id: TimelineId, segment_size: int, owner: Owner
    ) -> None:
        """Makes the directory if there is none. Raises `WalDirectoryError` for one of another branch, or
        with other things in it, or in use.
        """
        self._path = path
        self._segment_size = segment_size
        self._owner = owner
        self._segment: tuple[int, int] | None = None  # number and fd
        if not path.exists():
            path.mkdir(mode=0o700)
            owner.take(path)
        self._mark, self.next_lsn = self._claim(f"{tenant_id} {timeline_id} ".encode())
        """Where the next byte belongs; 0: wherever the first segment is to begin."""

    def _claim(self, whose: bytes) -> tuple[int, Lsn]:
        """The mark, locked, and what it says."""
        mark = self._path / MARK_NAME
        if not mark.exists() and any(self._path.iterdir()):
            raise WalDirectoryError(f"{self._path} holds other things: name a new directory, or an empty one")
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WalDirectoryError(f"{self._path} is in use: somebody receives WAL there") from None
            found = os.pread(descriptor, _MARK_SIZE_BYTES, 0)
            if not found:
                os.pwrite(descriptor, whose + _MARK_LSN % 0, 0)
                self._owner.take(descriptor)
            elif not found.startswith(whose):
                raise WalDirectoryError(
                    f"{self._path} has WAL of another branch ({found.split()[1].decode()}): "
                    "each branch needs a directory of its own"
                )
            on_failure.pop_all()
        return descriptor, Lsn(int(found[len(whose) :] or b"0", 16))

    def begin(self, first_lsn: Lsn) -> Lsn:
        """Where to write from: the beginning of the segment that is not whole, at first of `first_lsn`'s."""
        self._close_segment()
        lsn = self.next_lsn or first_lsn
        self.next_lsn = Lsn(lsn - lsn % self._segment_size)
        self._write_mark()
        return self.next_lsn

    def write(self, lsn: Lsn, data: bytes) -> None:
        """Continues what was written, or what `begin` said. Segments that become whole are on disk then."""
        if lsn != self.next_lsn:
            raise ValueError(f"WAL of {format_lsn(lsn)} does not continue what is here")
        view = memoryview(data)
        while view:
            number, offset = divmod(self.next_lsn, self._segment_size)
            size = min(len(view), self._segment_size - offset)
            _write_fully(self._open(number), view[:size], offset)
            view = view[size:]
            self.next_lsn = Lsn(self.next_lsn + size)
            if offset + size == self._segment_size:
                self._finish(number)

    def sync(self) -> None:
        """What was written is on disk on return."""
        if self._segment is not None:
            os.fsync(self._segment[1])

    def _open(self, number: int) -> int:
        if self._segment is None:
            path = self._path_of(number, PARTIAL_SUFFIX)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._segment = number, descriptor
            self._owner.take(descriptor)
            os.ftruncate(descriptor, self._segment_size)
            self._sync_directory()
        return self._segment[1]

    def _finish(self, number: int) -> None:
        self.sync()
        self._close_segment()
        self._path_of(number, PARTIAL_SUFFIX).rename(self._path_of(number))
        self._sync_directory()
        self._write_mark()

    def _write_mark(self) -> None:
        os.pwrite(self._mark, _MARK_LSN % self.next_lsn, _MARK_SIZE_BYTES - _MARK_LSN_SIZE_BYTES)
        os.fsync(self._mark)

    def _path_of(self, number: int, suffix: str = "") -> Path:
        return self._path / (segment_name(_TIMELINE, number, self._segment_size) + suffix)

    def _sync_directory(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _close_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            os.close(segment[1])

    def close(self) -> None:
        """What was written is on disk."""
        self.sync()
        self._close_segment()
        os.close(self._mark)

    def __enter__(self) -> "WalDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_fully(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
