"""Images of a whole cluster, in whatever order its files come, as sorted layers: with bounded memory.

A cluster's files come in the order of a directory listing, each file in the order of its blocks, and
together they are larger than memory. Two ways lead from there to layers whose keys do not overlap, so
that a read of a page visits one of them:

::

    a file that fills a layer by itself ---------------------------------> layers of its own
    all smaller files -> buffer, sorted -> run (a local file), ... merged -> layers between those

So what is sorted with the help of the local disk is only the small files, compressed; a layer's local
copy can go as soon as it is uploaded, and then the cluster is never on our disk as a whole.

Rejected: layers in the order of arrival, each with nearly the whole key range (a 10 GB cluster would
be 160 layers to look into for each page, until compaction had rewritten all of it); sorting everything
on the local disk (twice the writing, and room for the cluster).

Not here: what the images are (`excimer.pageserver`), naming the layers in a manifest (`Timeline`).
"""

import heapq
import struct
from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from pathlib import Path

import google_crc32c
import zstandard

from excimer.base.errors import CorruptionError
from excimer.base.keys import describe_key
from excimer.storage.engine.layer_stack import LayerHome
from excimer.storage.engine.layer_writing import image_value, upload_layer, write_images
from excimer.storage.format.layer_block import VALUE_HEAD_SIZE_BYTES, pack_value, unpack_block
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.values import Value

_SEQUENCE_KEY_BYTES = 14
"""Keys that agree in so many bytes are blocks of one fork, or of one SLRU segment."""
_RUN_BLOCK_SIZE_BYTES = 256 * 1024
_RUN_BLOCK_HEAD = struct.Struct("<III")
"""Stored size, raw size, crc32c of the stored bytes."""
_COMPRESSION_LEVEL = 1

_key_of = itemgetter(0)


class RunDamagedError(CorruptionError):
    """A run that this process wrote to the local disk reads back differently."""


class ImageSorter:
    """Takes images of one LSN by `add`, in any order of files; `finish` gives the layers, all uploaded.

    Memory stays below about twice `image_layer_size_bytes`. Used by one thread at a time; calls block.
    After an error `discard`.
    """

    def __init__(self, home: LayerHome, lsn: int, generation: int, *, keep_local: bool) -> None:
        """`keep_local`: leave the layers' local copies, for reads that come soon."""
        self._keep_local = keep_local
        self._home = home
        self._lsn = lsn
        self._generation = generation
        self._limit_bytes = home.context.settings.image_layer_size_bytes
        self._sequence: list[Value] = []  # of the file that comes now
        self._sequence_size = 0
        self._small: list[Value] = []
        self._small_size = 0
        self._runs: list[Path] = []
        self._own_starts: list[bytes] = []  # first keys of layers that files have to themselves
        self._layers: list[LayerDescription] = []

    def add(self, key: bytes, data: bytes) -> None:
        """One key and its whole value. Blocks of one file come in ascending order, one after the other.

        Raises ValueError for a page of a wrong size, OSError, `ObjectStoreError`.
        """
        sequence = self._sequence
        if sequence:
            last_key = sequence[-1].key
            if key <= last_key or key[:_SEQUENCE_KEY_BYTES] != last_key[:_SEQUENCE_KEY_BYTES]:
                self._end_sequence()
        value = image_value(key, self._lsn, data)
        self._sequence.append(value)
        self._sequence_size += VALUE_HEAD_SIZE_BYTES + len(value.payload)
        if self._sequence_size >= self._limit_bytes:
            self._own_starts.append(self._sequence[0].key)
            self._write(iter(self._sequence))
            self._sequence, self._sequence_size = [], 0

    def finish(self) -> list[LayerDescription]:
        """All layers, which cover every key. Raises ValueError when a key has two images, OSError,
        `ObjectStoreError`.
        """
        self._end_sequence()
        self._small.sort(key=_key_of)
        runs = [self._read_run(path) for path in self._runs]
        merged = heapq.merge(*runs, iter(self._small), key=_key_of)
        for share in _cut(_without_doubles(merged), sorted(self._own_starts)):
            self._write(share)
        self.discard()
        return self._layers

    def discard(self) -> None:
        """Removes what was left on the local disk. Layers that were uploaded are the caller's."""
        self._sequence, self._small = [], []
        for path in self._runs:
            self._home.context.filesystem.remove(path)
        self._runs.clear()

    def _end_sequence(self) -> None:
        self._small += self._sequence
        self._small_size += self._sequence_size
        self._sequence, self._sequence_size = [], 0
        if self._small_size >= self._limit_bytes:
            self._small.sort(key=_key_of)
            path = self._home.local_dir / f"import-run-{len(self._runs):06d}"
            self._runs.append(path)
            self._home.context.filesystem.write_atomically(path, _pack_run(self._small))
            self._small, self._small_size = [], 0

    def _write(self, values: Iterator[Value]) -> None:
        layers = write_images(self._home, values, self._lsn, self._generation, covers_after_lsn=0)
        for layer in layers:
            upload_layer(self._home, layer)
            if not self._keep_local:
                self._home.context.filesystem.remove(self._home.local_path(layer))
        self._layers += layers

    def _read_run(self, path: Path) -> Iterator[Value]:
        reader = self._home.context.filesystem.open_reader(path)
        decompressor = zstandard.ZstdDecompressor()
        offset = 0
        try:
            while head := reader.read(offset, _RUN_BLOCK_HEAD.size):
                stored_size, raw_size, checksum = _RUN_BLOCK_HEAD.unpack(head)
                stored = reader.read(offset + _RUN_BLOCK_HEAD.size, stored_size)
                if google_crc32c.value(stored) != checksum:
                    raise RunDamagedError(f"{path} is damaged at byte {offset}: check the local disk")
                yield from unpack_block(decompressor.decompress(stored, max_output_size=raw_size))
                offset += _RUN_BLOCK_HEAD.size + stored_size
        finally:
            reader.close()


def _pack_run(values: list[Value]) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL)
    pending: list[bytes] = []
    size = 0
    for value in values:
        pending.append(pack_value(value))
        size += len(pending[-1])
        if size >= _RUN_BLOCK_SIZE_BYTES:
            yield _pack_run_block(compressor, b"".join(pending))
            pending, size = [], 0
    if pending:
        yield _pack_run_block(compressor, b"".join(pending))


def _pack_run_block(compressor: zstandard.ZstdCompressor, raw: bytes) -> bytes:
    stored = compressor.compress(raw)
    return _RUN_BLOCK_HEAD.pack(len(stored), len(raw), google_crc32c.value(stored)) + stored


def _without_doubles(values: Iterator[Value]) -> Iterator[Value]:
    last_key = b""
    for value in values:
        if value.key == last_key:
            raise ValueError(f"{describe_key(value.key)} has two images")
        last_key = value.key
        yield value


def _cut(values: Iterator[Value], cuts: list[bytes]) -> Iterator[Iterator[Value]]:
    """Shares of sorted values such that none reaches across a cut. Each must be used up before the next."""
    first = next(values, None)
    while first is not None:
        position = bisect_right(cuts, first.key)
        end = cuts[position] if position < len(cuts) else None
        rest: list[Value] = []
        yield chain([first], _below(values, end, rest))
        first = rest[0] if rest else None


def _below(values: Iterator[Value], end: bytes | None, rest: list[Value]) -> Iterator[Value]:
    """Values with keys below `end`; the first that is not goes to `rest`."""
    for value in values:
        if end is not None and value.key >= end:
            rest.append(value)
            return
        yield value
