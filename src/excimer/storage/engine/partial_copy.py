"""A layer of which only parts are here: read by ranges from object storage into a sparse local file.

::

    object   |  0  |  1  |  2  |  3  |  4  |  5  |  6  |     chunks of 1 MiB
    presence |  .  |  P  |  P  |  .  |  L  |  L  |  .  |     absent, loading, present
                                                             (in memory only: after a restart, all absent)

A read claims the absent chunks it needs, fetches adjacent ones with one request and writes them to the file;
a chunk that somebody else loads is waited for. A sequential reader is served ahead of itself, up to
`AHEAD_CHUNKS_MAX`. A file that cannot be written (disk full) costs the cache, not the read.

When half of a layer is here, and the disk has room for the rest, the rest is fetched in the background: at
most as much again, and each miss it saves is a round trip to object storage. A whole copy is synced and
gets its final name, which a restart trusts.

Not here: what the bytes mean, and whether they are right (`disk_layer` checks every block's checksum).
"""

import logging
import threading
from pathlib import Path
from typing import Final

from excimer.base.errors import CorruptionError
from excimer.io.filesystem import Filesystem, SparseFile
from excimer.io.object_store import ObjectMissingError, ObjectStore, ObjectStoreError
from excimer.storage.engine.local_disk import LocalDisk

_log = logging.getLogger(__name__)

CHUNK_SIZE_BYTES: Final = 1024 * 1024
AHEAD_CHUNKS_MAX: Final = 8
PARTIAL_SUFFIX: Final = ".partial"

ABSENT, LOADING, PRESENT = range(3)


class LayerMissingError(CorruptionError):
    """The manifest names a layer that object storage does not have."""

    def __init__(self, object_name: str) -> None:
        super().__init__(
            f"layer {object_name} is missing in object storage, though the manifest names it: what needs it "
            "cannot be read; restore it from a backup of the bucket"
        )
        self.object_name = object_name


class LayerObject:
    """One layer in object storage: its bytes by range."""

    def __init__(self, store: ObjectStore, disk: LocalDisk, name: str, size_bytes: int) -> None:
        self._store = store
        self._disk = disk
        self.name = name
        self.size_bytes = size_bytes

    def fetch(self, start: int, end: int) -> bytes:
        """Raises `LayerMissingError`, `ObjectStoreError`."""
        try:
            data = self._store.get_range(self.name, start, end)
        except ObjectMissingError as error:
            self._disk.count_fetch(None)
            raise LayerMissingError(self.name) from error
        except ObjectStoreError:
            self._disk.count_fetch(None)
            raise
        self._disk.count_fetch(len(data))
        return data


class PartialCopy:
    """Any thread. The file appears with the first chunk."""

    def __init__(
        self, layer: LayerObject, filesystem: Filesystem, path: Path, chunk_size_bytes: int = CHUNK_SIZE_BYTES
    ) -> None:
        """`path` is the final one."""
        self._layer = layer
        self._filesystem = filesystem
        self._path = path
        self._partial_path = path.with_name(path.name + PARTIAL_SUFFIX)
        self._chunk_size_bytes = chunk_size_bytes
        self._states = bytearray(-(-layer.size_bytes // chunk_size_bytes))
        self._present = 0
        self._changed = threading.Condition()
        self._file: SparseFile | None = None
        self._file_failed = False
        self._next_chunk = -1
        self._ahead_chunks = 1
        self._dropped = False
        self._rest_wished = False
        self.counted_bytes = 0
        """What `LocalDisk` has been told that it takes."""

    @property
    def local_size_bytes(self) -> int:
        return min(self._present * self._chunk_size_bytes, self._layer.size_bytes)

    def read(self, offset: int, size: int) -> bytes:
        """Raises `LayerMissingError`, `ObjectStoreError`; OSError if the local file cannot be read."""
        end = min(offset + size, self._layer.size_bytes)
        first, last = offset // self._chunk_size_bytes, (end - 1) // self._chunk_size_bytes
        fetched: dict[int, bytes] = {}
        while (run := self._claim(first, last, fetched)) is not None:
            fetched |= self._load(*run)
        return b"".join(self._piece(chunk, fetched, offset, end) for chunk in range(first, last + 1))

    def has(self, offset: int, size: int) -> bool:
        """Whether all of it is here now."""
        first, last = offset // self._chunk_size_bytes, (offset + size - 1) // self._chunk_size_bytes
        return self._states.count(PRESENT, first, last + 1) == last + 1 - first

    def try_take_wish_for_rest(self) -> bool:
        """True once, when half is here."""
        with self._changed:
            if self._rest_wished or self._dropped or 2 * self._present < len(self._states):
                return False
            self._rest_wished = True
            return True

    def fetch_rest(self) -> None:
        """Loads what is absent and gives the copy its final name. Raises as `read`, and OSError."""
        last = len(self._states) - 1
        while (
            not (self._dropped or self._file_failed)
            and (run := self._claim(0, last, {}, wait=False)) is not None
        ):
            self._load(*run)
        with self._changed:
            file = self._file
            if self._dropped or file is None or self._present < len(self._states):
                return
        file.sync()
        with self._changed:
            if not self._dropped:
                self._filesystem.rename(self._partial_path, self._path)

    def drop(self) -> None:
        """Removes the file's name. Readers go on. Raises OSError."""
        with self._changed:
            self._dropped = True
            has_file = self._file is not None
        if has_file:
            self._filesystem.remove(self._partial_path)

    def _claim(
        self, first: int, last: int, fetched: dict[int, bytes], *, wait: bool = True
    ) -> tuple[int, int] | None:
        """The next run of chunks [start, end) for this thread to load; None when it needs none."""
        with self._changed:
            while True:
                waited = [
                    chunk
                    for chunk in range(first, last + 1)
                    if self._states[chunk] != PRESENT and chunk not in fetched
                ]
                absent = next((chunk for chunk in waited if self._states[chunk] == ABSENT), None)
                if absent is not None:
                    return self._claim_run_locked(absent, last)
                if not waited or not wait:
                    return None
                self._changed.wait()

    def _claim_run_locked(self, start: int, last: int) -> tuple[int, int]:
        is_sequential = start == self._next_chunk
        self._ahead_chunks = min(2 * self._ahead_chunks, AHEAD_CHUNKS_MAX) if is_sequential else 1
        wanted = min(max(last + 1, start + self._ahead_chunks), start + AHEAD_CHUNKS_MAX, len(self._states))
        end = start
        while end < wanted and self._states[end] == ABSENT:
            self._states[end] = LOADING
            end += 1
        self._next_chunk = end
        return start, end

    def _load(self, start: int, end: int) -> dict[int, bytes]:
        """Fetches claimed chunks; they are present afterwards if the file took them."""
        size = self._chunk_size_bytes
        state = ABSENT
        try:
            data = self._layer.fetch(start * size, min(end * size, self._layer.size_bytes))
            if self._write(start * size, data):
                state = PRESENT
        finally:
            with self._changed:
                self._states[start:end] = bytes([state]) * (end - start)
                if state == PRESENT:
                    self._present += end - start
                self._changed.notify_all()
        return {start + at: data[at * size : (at + 1) * size] for at in range(end - start)}

    def _write(self, offset: int, data: bytes) -> bool:
        if self._dropped:
            return False
        try:
            self._opened_file().write(offset, data)
        except OSError as error:
            if not self._file_failed:
                _log.warning("the local copy %s cannot be written: %s", self._partial_path, error)
            self._file_failed = True
            return False
        return True

    def _opened_file(self) -> SparseFile:
        with self._changed:
            if self._file is None:
                if self._dropped:
                    raise FileNotFoundError(f"{self._partial_path} was removed")
                self._file = self._filesystem.create_sparse(self._partial_path, self._layer.size_bytes)
            return self._file

    def _piece(self, chunk: int, fetched: dict[int, bytes], offset: int, end: int) -> bytes:
        """What of a chunk lies in [offset, end)."""
        base = chunk * self._chunk_size_bytes
        start, stop = max(offset - base, 0), min(end - base, self._chunk_size_bytes)
        if chunk in fetched:
            return fetched[chunk][start:stop]
        return self._opened_file().read(base + start, stop - start)
