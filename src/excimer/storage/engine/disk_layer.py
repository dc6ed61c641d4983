"""One layer as an object with a local copy: brings the copy when it is missing, reads blocks of it.

The local copy is only a cache of the object. One of the wrong size (a torn download, an eviction)
is brought again; one whose bytes fail a checksum raises, naming the file, and never yields a value.

Not here: which blocks mean what (`excimer.storage.format`).
"""

import threading
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import zstandard

from excimer.io.filesystem import RandomReader
from excimer.storage.engine.context import StorageContext
from excimer.storage.format.layer_file import (
    HEADER_SIZE_BYTES,
    DamagedLayerError,
    LayerIndex,
    unpack_block_data,
    unpack_header,
    unpack_index,
)
from excimer.storage.format.manifest import LayerDescription

_per_thread = threading.local()


class DiskLayer:
    """Opened on first use. Any thread; all calls may block on disk and object storage."""

    def __init__(
        self, context: StorageContext, description: LayerDescription, local_path: Path, object_name: str
    ) -> None:
        self.description = description
        self.local_path = local_path
        self.object_name = object_name
        self._context = context
        self._lock = threading.Lock()
        self._opened: tuple[RandomReader, LayerIndex] | None = None

    def blocks(
        self, first_key: bytes, last_key: bytes, low_lsn: int, high_lsn: int, *, cached: bool = True
    ) -> Iterator[bytes]:
        """Raw blocks that may hold values of the keys in [first, last] with low < LSN <= high, in order.

        With `cached` false they are neither looked for nor left in the cache (compaction, big scans).
        Raises `DamagedLayerError`, `ObjectStoreError`, OSError.
        """
        reader, index = self._open()
        cache = self._context.cache
        numbers = index.find_blocks(first_key, last_key, low_lsn, high_lsn)
        if not cached:
            for number in numbers:
                yield from self._read_run(reader, index, number, number + 1)
            return
        held = {number: cache.try_get((self.object_name, number)) for number in numbers}
        for missing, run in groupby(numbers, key=lambda number: held[number] is None):
            run_numbers = list(run)
            if missing:
                for start, end in _adjacent(run_numbers):
                    for number, block in enumerate(self._read_run(reader, index, start, end), start):
                        cache.add((self.object_name, number), block)
                        yield block
            else:
                for number in run_numbers:
                    block_or_none = held[number]
                    if block_or_none is not None:
                        yield block_or_none

    def close(self) -> None:
        """Closes the file; a later read opens it again."""
        with self._lock:
            opened, self._opened = self._opened, None
        del opened  # the descriptor is closed when the last reader lets go of it

    def remove_local(self) -> None:
        self.close()
        self._context.filesystem.remove(self.local_path)

    def _open(self) -> tuple[RandomReader, LayerIndex]:
        opened = self._opened
        if opened is not None:
            return opened
        with self._lock:
            if self._opened is None:
                self._opened = self._open_locked()
            return self._opened

    def _open_locked(self) -> tuple[RandomReader, LayerIndex]:
        filesystem, description = self._context.filesystem, self.description
        if filesystem.size_bytes(self.local_path) != description.size_bytes:
            data = self._context.store.get(self.object_name)
            if len(data) != description.size_bytes:
                raise DamagedLayerError(
                    self.object_name, f"it has {len(data)} bytes instead of {description.size_bytes}"
                )
            filesystem.write_atomically(self.local_path, [data])
        reader = filesystem.open_reader(self.local_path)
        name = str(self.local_path)
        header = unpack_header(reader.read(0, HEADER_SIZE_BYTES), name)
        if (header.start_lsn, header.end_lsn) != (description.start_lsn, description.end_lsn):
            raise DamagedLayerError(name, "it is another layer than the manifest says")
        tail = reader.read(description.index_offset, description.size_bytes - description.index_offset)
        return reader, unpack_index(tail, description.index_offset, name)

    def _read_run(self, reader: RandomReader, index: LayerIndex, start: int, end: int) -> Iterator[bytes]:
        """Adjacent blocks with one read of the file."""
        places = index.places[start:end]
        offset = places[0].offset
        data = reader.read(offset, places[-1].offset + places[-1].stored_size_bytes - offset)
        decompressor = _decompressor()
        for place in places:
            at = place.offset - offset
            stored = data[at : at + place.stored_size_bytes]
            yield unpack_block_data(stored, place, decompressor, str(self.local_path))


def _adjacent(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """[3, 4, 5, 9] -> (3, 6), (9, 10)."""
    start = end = numbers[0]
    for number in numbers:
        if number != end:
            yield start, end
            start = number
        end = number + 1
    yield start, end


def _decompressor() -> zstandard.ZstdDecompressor:
    """One per thread: they are not shared safely."""
    found: zstandard.ZstdDecompressor | None = getattr(_per_thread, "decompressor", None)
    if found is None:
        found = _per_thread.decompressor = zstandard.ZstdDecompressor()
    return found
