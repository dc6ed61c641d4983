"""A timeline's WAL on disk: PostgreSQL's own segment files, so that `pg_waldump` reads them.

::

    000000010000000000000002   [0000 zeros 0000|WAL............]   the timeline starts in its middle
    000000010000000000000003   [WAL...........|zeros]              written up to write_lsn
    000000010000000000000004   [zeros]                             prepared ahead

A segment is filled with real zeros and synced before it is used: appending then only overwrites,
and an fdatasync writes data alone, without the file system's journal (as pg_receivewal does it).
The next segment is prepared by a thread while the current one fills.

Bytes between `flush_lsn` and `write_lsn` may be lost by a crash. Bytes above `write_lsn` are zeros after
a `truncate`, and of no meaning after a crash: whoever opens the files finds the end of the last whole
record by its checksum (`recovery`).

**Not here:** what a safekeeper may accept (`consensus.acceptor`); which segments may go (`wal_retention`).
"""

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from excimer.base.errors import CorruptionError, RefusedError, RetryableError
from excimer.base.lsn import Lsn, format_lsn
from excimer.pgformat.wal_segment import parse_segment_name, segment_name
from excimer.safekeeper.disk import Disk
from excimer.wire.replication import POSTGRES_TIMELINE

_PREPARE_NEXT_AT = 0.5
"""The next segment is prepared once this much of the current one is written. Not earlier: the segment where
kept WAL begins, this one and the next would be there for less than half a segment that is needed."""
_REWRITE_SIZE_BYTES = 1 << 20


class DiskFullError(RetryableError):
    """WAL cannot be stored now. Nothing is acknowledged until it can."""


class DiskFailedError(RetryableError):
    """The disk refused a write or a sync: what was not flushed before counts as lost."""


class WalMissingError(RefusedError):
    """The WAL asked for is not stored here."""


class AppendSpan(NamedTuple):
    """Prepared bytes of one segment that WAL may be written over, from `write_lsn` up to `end_lsn`."""

    fd: int
    segment_start_lsn: Lsn
    end_lsn: Lsn


class WalStorage:
    """One timeline's segments. Writing is one thread's at a time; `read` may be called from any."""

    def __init__(
        self,
        directory: Path,
        segment_size_bytes: int,
        flush_lsn: Lsn,
        *,
        disk: Disk,
        preparer: ThreadPoolExecutor,
    ) -> None:
        """Opens what is there. `flush_lsn` is where valid WAL ends, as `recovery` found it."""
        self.flush_lsn = flush_lsn
        """Everything below is on disk (fdatasync)."""
        self.write_lsn = flush_lsn
        self._directory = directory
        self._segment_size_bytes = segment_size_bytes
        self._disk = disk
        self._preparer = preparer
        self._preparing: tuple[int, Future[None]] | None = None
        self._current: tuple[int, int] | None = None  # number and fd of the segment being written
        self._dirty: set[int] = set()  # fds written since the last flush

    def path_of(self, number: int) -> Path:
        return self._directory / segment_name(POSTGRES_TIMELINE, number, self._segment_size_bytes)

    def write(self, lsn: Lsn, data: bytes) -> None:
        """Writes at exactly `write_lsn`. Raises `DiskFullError`, `DiskFailedError`: then call `revert`."""
        if lsn != self.write_lsn:
            raise CorruptionError(f"WAL of {format_lsn(lsn)} written at {format_lsn(self.write_lsn)}")
        done = 0
        while done < len(data):
            number, offset = divmod(lsn + done, self._segment_size_bytes)
            size = min(len(data) - done, self._segment_size_bytes - offset)
            try:
                fd = self._open_for_write(number)
                self._dirty.add(fd)
                part = data if size == len(data) else data[done : done + size]
                self._disk.pwrite(fd, part, offset)
            except OSError as error:
                raise _as_failure(error, self.path_of(number)) from error
            done += size
            self.write_lsn = Lsn(lsn + done)
            if offset + size > self._segment_size_bytes * _PREPARE_NEXT_AT:
                self._prepare(number + 1)

    def flush(self) -> Lsn:
        """Makes everything written durable and returns the new `flush_lsn`. Blocks for the disk."""
        for fd in list(self._dirty):
            try:
                self._disk.fdatasync(fd)
            except OSError as error:
                raise _as_failure(error, self._directory) from error
            self._dirty.discard(fd)
            if self._current is None or fd != self._current[1]:
                os.close(fd)
        self.flush_lsn = self.write_lsn
        return self.flush_lsn

    def open_span(self) -> AppendSpan | None:
        """Where somebody else may write and sync now, who says how far with `flushed_beside`.

        None while the segment is not open, something is not flushed, or the next one is to be prepared.
        """
        if self._current is None or self._dirty or self.write_lsn != self.flush_lsn:
            return None
        number, fd = self._current
        start_lsn = number * self._segment_size_bytes
        size_bytes = self._segment_size_bytes
        if self._preparing is None or self._preparing[0] != number + 1:
            size_bytes = int(size_bytes * _PREPARE_NEXT_AT)
        end_lsn = Lsn(start_lsn + size_bytes)
        return AppendSpan(fd, Lsn(start_lsn), end_lsn) if start_lsn <= self.write_lsn < end_lsn else None

    def flushed_beside(self, lsn: Lsn) -> None:
        """The open span is written and synced up to `lsn`."""
        self.write_lsn = self.flush_lsn = lsn

    def as_failure(self, error: OSError) -> DiskFullError | DiskFailedError:
        """What an error of whoever wrote to the open span means."""
        return _as_failure(error, self._directory)

    def revert(self) -> None:
        """Forgets what was not flushed, after a failed write or sync: it has to be sent again.

        A failed fdatasync leaves pages that look clean but are not on disk; writing them anew is the only
        way to have them written, so they must not count.
        """
        self._close_all()
        self.write_lsn = self.flush_lsn

    def truncate(self, lsn: Lsn) -> None:
        """Leaves nothing but zeros at and above `lsn`, durably, last segment first: a crash in between
        leaves a shorter tail of the same WAL, never a hole. Raises `DiskFullError`, `DiskFailedError`."""
        self._wait_prepared()
        self._close_all()
        first, offset = divmod(lsn, self._segment_size_bytes)
        try:
            for number in sorted(self._segment_numbers(), reverse=True):
                start = offset if number == first else 0
                if number < first or (start == 0 and self._is_zero(number, start)):
                    continue
                if start:
                    self._zero_from(number, start)
                else:
                    self._disk.remove(self.path_of(number))
                    self._disk.sync_directory(self._directory)
        except OSError as error:
            raise _as_failure(error, self._directory) from error
        self.write_lsn = self.flush_lsn = lsn

    def discard(self, lsn: Lsn) -> None:
        """Leaves no WAL, durably; the next is written at `lsn`. Raises `DiskFullError`, `DiskFailedError`."""
        self._wait_prepared()
        self._close_all()
        try:
            for number in sorted(self._segment_numbers()):
                self._disk.remove(self.path_of(number))
            self._disk.sync_directory(self._directory)
        except OSError as error:
            raise _as_failure(error, self._directory) from error
        self.write_lsn = self.flush_lsn = lsn

    def remove_below(self, lsn: Lsn) -> int:
        """Removes segments that lie below `lsn` as a whole, oldest first; how many bytes they had.

        A crash in between leaves the newer ones. May run beside reading and writing. Raises OSError.
        """
        below = [number for number in self._segment_numbers() if number < lsn // self._segment_size_bytes]
        for number in sorted(below):
            self._disk.remove(self.path_of(number))
        if below:
            self._disk.sync_directory(self._directory)
        return len(below) * self._segment_size_bytes

    @property
    def stored_size_bytes(self) -> int:
        """What the segments take."""
        return len(self._segment_numbers()) * self._segment_size_bytes

    def read(self, start_lsn: Lsn, end_lsn: Lsn) -> bytes:
        """The bytes [start_lsn, end_lsn). Raises `WalMissingError`. May block for the disk."""
        parts = []
        lsn = int(start_lsn)
        while lsn < end_lsn:
            number, offset = divmod(lsn, self._segment_size_bytes)
            size = min(end_lsn - lsn, self._segment_size_bytes - offset)
            parts.append(self._read_segment(number, offset, size))
            lsn += size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def rewrite(self, start_lsn: Lsn, end_lsn: Lsn) -> None:
        """Writes stored bytes again and syncs them: what a crash left may be in the page cache only.

        `end_lsn` becomes the end of the WAL. Raises `DiskFullError`, `DiskFailedError`.
        """
        self._close_all()
        self.write_lsn = start_lsn
        while self.write_lsn < end_lsn:
            chunk_end_lsn = Lsn(min(end_lsn, self.write_lsn + _REWRITE_SIZE_BYTES))
            self.write(self.write_lsn, self.read(self.write_lsn, chunk_end_lsn))
        self.flush()

    def end_lsn(self) -> Lsn:
        """End of the newest segment there is; 0 without any."""
        return Lsn((max(self._segment_numbers(), default=-1) + 1) * self._segment_size_bytes)

    def close(self) -> None:
        self._wait_prepared()
        self._close_all()

    def _segment_numbers(self) -> list[int]:
        names = (parse_segment_name(name, self._segment_size_bytes) for name in os.listdir(self._directory))
        return [name.number for name in names if name is not None]

    def _read_segment(self, number: int, offset: int, size: int) -> bytes:
        path = self.path_of(number)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise WalMissingError(f"WAL segment {path.name} is not stored here") from error
        try:
            data = os.pread(fd, size, offset)
        finally:
            os.close(fd)
        if len(data) != size:
            raise CorruptionError(f"{path} is {size - len(data)} bytes short at {offset}")
        return data

    def _open_for_write(self, number: int) -> int:
        if self._current is not None:
            if self._current[0] == number:
                return self._current[1]
            if self._current[1] not in self._dirty:
                os.close(self._current[1])
            self._current = None
        path = self.path_of(number)
        if self._preparing is not None and self._preparing[0] == number:
            self._wait_prepared()
        if not path.exists():
            self._disk.create_zeros(path, self._segment_size_bytes)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._current = (number, fd)
        return fd

    def _prepare(self, number: int) -> None:
        if self._preparing is not None and self._preparing[0] == number:
            return
        self._wait_prepared()
        self._preparing = (number, self._preparer.submit(self._create_if_absent, number))

    def _create_if_absent(self, number: int) -> None:
        path = self.path_of(number)
        if not path.exists():
            self._disk.create_zeros(path, self._segment_size_bytes)

    def _wait_prepared(self) -> None:
        """A failure to prepare is no failure yet: it is met again when the segment is needed."""
        if self._preparing is not None:
            self._preparing[1].exception()
            self._preparing = None

    def _is_zero(self, number: int, offset: int) -> bool:
        size = self._segment_size_bytes - offset
        return self._read_segment(number, offset, size) == bytes(size)

    def _zero_from(self, number: int, offset: int) -> None:
        """Syncs even when all is zero already: it may be so in the page cache only."""
        is_zero = self._is_zero(number, offset)
        fd = os.open(self.path_of(number), os.O_RDWR | os.O_CLOEXEC)
        try:
            if not is_zero:
                self._disk.pwrite(fd, bytes(self._segment_size_bytes - offset), offset)
            self._disk.fdatasync(fd)
        finally:
            os.close(fd)

    def _close_all(self) -> None:
        open_fds = set(self._dirty)
        if self._current is not None:
            open_fds.add(self._current[1])
        self._dirty.clear()
        self._current = None
        for fd in open_fds:
            os.close(fd)


def _as_failure(error: OSError, path: Path) -> DiskFullError | DiskFailedError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"no space for WAL in {path.parent}: free some; commits wait until then")
    return DiskFailedError(f"cannot store WAL in {path}: {error.strerror}")
