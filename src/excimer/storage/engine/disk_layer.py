"""One layer as an object with a local copy: finds the bytes, reads and checks blocks of them.

The local copy is only a cache of the object. A whole one is used as it is; without one, the index is
fetched once and blocks come by ranges (`partial_copy`). A copy that cannot be read, or whose bytes fail a
checksum, is thrown away, loudly, and the object is asked; if its bytes fail too, the error names it, and
no value is yielded.

Not here: which blocks mean what (`excimer.storage.format`), what is evicted when (`local_disk`).
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, groupby
from pathlib import Path
from typing import NamedTuple

import zstandard

from excimer._native.block_index import BlockIndex
from excimer.io.filesystem import RandomReader
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.partial_copy import (
    CHUNK_SIZE_BYTES,
    LayerMissingError,
    LayerObject,
    PartialCopy,
)
from excimer.storage.format.layer_file import (
    HEADER_SIZE_BYTES,
    DamagedLayerError,
    LayerIndex,
    unpack_block_data,
    unpack_header,
    unpack_index,
)
from excimer.storage.format.manifest import LayerDescription

_log = logging.getLogger(__name__)

_per_thread = threading.local()
_layer_numbers = count(1)


class _Opened(NamedTuple):
    layer_index: LayerIndex
    whole: RandomReader | None
    partial: PartialCopy | None
    """One of the two."""

    def local_size_bytes(self, whole_size_bytes: int) -> int:
        return whole_size_bytes if self.partial is None else self.partial.local_size_bytes

    def read(self, offset: int, size: int) -> bytes:
        if self.partial is not None:
            return self.partial.read(offset, size)
        assert self.whole is not None
        return self.whole.read(offset, size)


class DiskLayer:
    """Opened on first use. Any thread; all calls may block on disk and object storage."""

    def __init__(
        self, context: StorageContext, description: LayerDescription, local_path: Path, object_name: str
    ) -> None:
        self.description = description
        self.number = next(_layer_numbers)
        """In the block cache. Every object has its own, so nothing is ever found under another's."""
        self.local_path = local_path
        self.object_name = object_name
        self.last_used = 0
        self._context = context
        self.disk = context.local_disk
        self._object = LayerObject(context.store, self.disk, object_name, description.size_bytes)
        self._open_lock = threading.Lock()
        """Held while opening, which may wait for object storage."""
        self._lock = threading.Lock()
        """Held for a moment: `_opened` and the existence of the files."""
        self._opened: _Opened | None = None
        self._is_removed = False

    def blocks(
        self, first_key: bytes, last_key: bytes, low_lsn: int, high_lsn: int, *, cached: bool = True
    ) -> Iterator[bytes]:
        """Raw blocks that may hold values of the keys in [first, last] with low < LSN <= high, in order.

        With `cached` false they are neither looked for nor left in the cache (compaction, big scans).
        Raises `DamagedLayerError`, `LayerMissingError`, `ObjectStoreError`.
        """
        self.last_used = self.disk.next_tick()
        opened = self._open()
        cache = self._context.cache
        numbers = opened.layer_index.find_blocks(first_key, last_key, low_lsn, high_lsn)
        if not cached:
            for number in numbers:
                yield from self._read_run(opened, number, number + 1)
            return
        held = {number: cache.try_get(self.number, number) for number in numbers}
        for missing, run in groupby(numbers, key=lambda number: held[number] is None):
            run_numbers = list(run)
            if missing:
                for start, end in _adjacent(run_numbers):
                    for number, block in enumerate(self._read_run(opened, start, end), start):
                        cache.add(self.number, number, block)
                        yield block
            else:
                for number in run_numbers:
                    block_or_none = held[number]
                    if block_or_none is not None:
                        yield block_or_none

    def needs_fetch(self, first_key: bytes, last_key: bytes, low_lsn: int, high_lsn: int) -> bool:
        """Whether `blocks` would have to ask object storage, as far as that can be told at once."""
        opened = self._opened
        if opened is None:
            return self.disk.size_of(self) != self.description.size_bytes
        if opened.partial is None:
            return False
        partial, index = opened.partial, opened.layer_index
        places = (index.places[each] for each in index.find_blocks(first_key, last_key, low_lsn, high_lsn))
        return any(not partial.has(place.offset, place.stored_size_bytes) for place in places)

    def note_local(self) -> None:
        """Counts a whole local copy, if there is one, as taking disk."""
        with suppress(OSError):
            if self._has_whole():
                self.last_used = self.disk.next_tick()
                self.disk.use(self, self.description.size_bytes)

    @property
    def index(self) -> BlockIndex | None:
        """None while the layer is not open. Never blocks."""
        opened = self._opened
        return None if opened is None else opened.layer_index.blocks

    def close(self) -> None:
        """Closes the file, and no longer counts it; a later read opens it again."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and opened.partial is not None:
            opened.partial.drop()
        self.disk.use(self, 0)
        del opened  # the descriptor is closed when the last reader lets go of it

    def remove_local(self) -> None:
        """For good: whoever still reads this layer reads from object storage and leaves nothing here."""
        self._is_removed = True
        self.close()
        self._context.filesystem.remove(self.local_path)

    def evict(self) -> None:
        """For `LocalDisk`: removes the local copy. Reads that have begun go on with it."""
        with self._lock:
            opened, self._opened = self._opened, None
            try:
                if opened is not None and opened.partial is not None:
                    opened.partial.drop()
                self._context.filesystem.remove(self.local_path)
            except OSError as error:
                _log.warning("the local copy of layer %s was not removed: %s", self.object_name, error)

    def _open(self) -> _Opened:
        opened = self._opened
        if opened is not None:
            return opened
        with self._open_lock:
            if self._opened is None:
                opened = self._open_whole_or_partial()
                with self._lock:
                    self._opened = opened
                self.disk.use(self, opened.local_size_bytes(self.description.size_bytes))
                return opened
            return self._opened

    def _open_whole_or_partial(self) -> _Opened:
        damage: DamagedLayerError | OSError | None = None
        try:
            if self._has_whole():
                return self._open_whole()
        except (DamagedLayerError, OSError) as error:
            damage = error
            _log.error("a local copy is thrown away and its object read instead: %s", error)
        try:
            opened = self._open_partial()
        except LayerMissingError:
            if damage is not None:
                raise damage from None
            raise
        if damage is not None:
            self._context.filesystem.remove(self.local_path)
        return opened

    def _has_whole(self) -> bool:
        return self._context.filesystem.size_bytes(self.local_path) == self.description.size_bytes

    def _open_whole(self) -> _Opened:
        description, name = self.description, str(self.local_path)
        reader = self._context.filesystem.open_reader(self.local_path)
        tail = reader.read(description.index_offset, description.size_bytes - description.index_offset)
        return _Opened(self._unpack_index(tail, name), reader, None)

    def _open_partial(self) -> _Opened:
        description = self.description
        partial = PartialCopy(self._object, self._context.filesystem, self.local_path)
        if self._is_removed:
            partial.drop()
        if description.size_bytes <= CHUNK_SIZE_BYTES:  # one request rather than two
            tail = partial.read(0, description.size_bytes)[description.index_offset :]
        else:
            tail = self._object.fetch(description.index_offset, description.size_bytes)
        return _Opened(self._unpack_index(tail, self.object_name), None, partial)

    def _unpack_index(self, tail: bytes, name: str) -> LayerIndex:
        description = self.description
        return unpack_index(tail, description.index_offset, name, fingerprint=description.fingerprint)

    def _read_run(self, opened: _Opened, start: int, end: int) -> list[bytes]:
        """Adjacent blocks with one read; once more from object storage if the local copy is no good."""
        try:
            blocks = _read_blocks(opened, start, end, str(self.local_path))
        except (DamagedLayerError, OSError) as error:
            opened = self._reopen(opened, error)
            blocks = _read_blocks(opened, start, end, self.object_name)
        if opened.partial is not None:
            self._account(opened, opened.partial)
        return blocks

    def _reopen(self, bad: _Opened, error: DamagedLayerError | OSError) -> _Opened:
        """Throws the local copy away, unless somebody has done it already, and opens the object.

        Raises `error` if there is no object.
        """
        with self._open_lock:
            if self._opened is not bad and self._opened is not None:
                return self._opened
            try:
                opened = self._open_partial()
            except LayerMissingError:
                raise error from None
            _log.error("a local copy is thrown away and its object read instead: %s", error)
            self.evict()
            with self._lock:
                self._opened = opened
            return opened

    def _account(self, opened: _Opened, partial: PartialCopy) -> None:
        """Tells the disk what the copy takes now, and has the rest of it fetched where that pays."""
        size = partial.local_size_bytes
        if self._opened is not opened or self._is_removed or size == partial.counted_bytes:
            return
        partial.counted_bytes = size
        self.disk.use(self, size)
        rest = self.description.size_bytes - size
        if self.disk.has_room(rest) and partial.try_take_wish_for_rest():
            self.disk.in_background(lambda: self._fetch_rest(opened, partial))

    def _fetch_rest(self, opened: _Opened, partial: PartialCopy) -> None:
        if self._opened is opened:
            partial.fetch_rest()
            self._account(opened, partial)


def _read_blocks(opened: _Opened, start: int, end: int, name: str) -> list[bytes]:
    places = opened.layer_index.places[start:end]
    offset = places[0].offset if start else 0
    data = opened.read(offset, places[-1].offset + places[-1].stored_size_bytes - offset)
    if start == 0:
        unpack_header(data[:HEADER_SIZE_BYTES], name)  # only to notice damage: all else is checked by itself
    decompressor = _decompressor()
    blocks = []
    for place in places:
        at = place.offset - offset
        stored = data[at : at + place.stored_size_bytes]
        blocks.append(unpack_block_data(stored, place, decompressor, name))
    return blocks


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
