"""A layer file: immutable values of a range of keys and LSNs, readable by range requests.

::

    +---------------------------------------------------------------+
    | header 72: magic 8 | version u16 | kind u8 | 0 u8 | 0 u32     |
    |   start LSN u64 | end LSN u64 | tenant 16 | timeline 16       |
    |   0 u32 | crc32c of the header so far u32                     |
    +---------------------------------------------------------------+
    | block 0, zstd (or raw where that is not smaller)              |
    | block 1 ...                                                   |
    +---------------------------------------------------------------+
    | index, zstd: per block 72 bytes:                              |
    |   first key 18 | last key 18 | crc32c u32 | offset u64        |
    |   lowest LSN u64 | highest LSN u64 | stored size u32 | raw u32|
    +---------------------------------------------------------------+
    | trailer 48: index offset u64 | stored size u32 | raw size u32 |
    |   value count u64 | block count u32 | crc32c of the index u32 |
    |   0 u32 | crc32c of the trailer so far u32 | magic 8          |
    +---------------------------------------------------------------+

A *delta* layer holds the values that WAL in [start LSN, end LSN) made. A value's LSN is the end of
its record, so these are the values with start < LSN <= end. An *image* layer holds whole values as
of its one LSN. Checksums are taken of the stored (compressed) bytes.

zstd level 1 rather than LZ4: on heap pages it is 6.4 against 3.5 times smaller and still
decompresses 630 MB/s against 1,300 on one core, and objects are what costs money.

Not here: blocks' insides (`layer_block`), files and objects (`excimer.storage.engine.disk_layer`).
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple, overload

import google_crc32c
import zstandard

from excimer._native.block_index import BlockIndex
from excimer.base.errors import CorruptionError
from excimer.base.keys import KEY_SIZE_BYTES

MAGIC = b"EXLAYER\n"
FORMAT_VERSION = 2
"""What is written. Version 1 lacks LSNs in relations' sizes and notes of truncations (`relation_size`)."""
FORMAT_VERSIONS_READ = (1, 2)
COMPRESSION_LEVEL = 1

_HEADER = struct.Struct("<8sHBxxxxxQQ16s16sxxxxI")
_INDEX_ENTRY = struct.Struct("<18s18sIQQQII")
_TRAILER = struct.Struct("<QIIQIIxxxxI8s")
HEADER_SIZE_BYTES = 72
INDEX_ENTRY_SIZE_BYTES = 72
TRAILER_SIZE_BYTES = 48
assert (_HEADER.size, _INDEX_ENTRY.size, _TRAILER.size) == (72, 72, 48)


class LayerKind(IntEnum):
    DELTA = 1
    IMAGE = 2


class DamagedLayerError(CorruptionError):
    """A layer file's bytes are not what was written."""

    def __init__(self, file: str, what: str) -> None:
        super().__init__(f"layer file {file} is damaged: {what}; restore it from object storage or a backup")
        self.file = file


class LayerHeader(NamedTuple):
    kind: LayerKind
    start_lsn: int
    end_lsn: int
    tenant_id: str
    timeline_id: str


class RawBlock(NamedTuple):
    """A block to be written, with what the index says about it."""

    data: bytes
    first_key: bytes
    last_key: bytes
    lowest_lsn: int
    highest_lsn: int
    value_count: int


class BlockPlace(NamedTuple):
    """One index entry."""

    first_key: bytes
    last_key: bytes
    checksum: int
    offset: int
    lowest_lsn: int
    highest_lsn: int
    stored_size_bytes: int
    raw_size_bytes: int


class LayerIndex:
    """Where the blocks are, kept as the file has it and searched natively (`_native/block_index.pyx`)."""

    def __init__(self, raw: bytes) -> None:
        self.blocks = BlockIndex(raw)
        self.places = BlockPlaces(raw)

    def find_blocks(self, first_key: bytes, last_key: bytes, low_lsn: int, high_lsn: int) -> list[int]:
        """Numbers of the blocks that may hold values of keys in [first, last] with low < LSN <= high."""
        return self.blocks.find_blocks(first_key, last_key, low_lsn, high_lsn)


class BlockPlaces(Sequence[BlockPlace]):
    """A packed index's entries as values, made when they are asked for."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw) // INDEX_ENTRY_SIZE_BYTES

    @overload
    def __getitem__(self, at: int) -> BlockPlace: ...
    @overload
    def __getitem__(self, at: slice) -> list[BlockPlace]: ...
    def __getitem__(self, at: int | slice) -> BlockPlace | list[BlockPlace]:
        numbers = range(len(self))[at]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        return BlockPlace._make(_INDEX_ENTRY.unpack_from(self._raw, numbers * INDEX_ENTRY_SIZE_BYTES))


class LayerEncoder:
    """Blocks in, bytes of the file out. After `parts` is exhausted, the sums below are set."""

    def __init__(self, header: LayerHeader) -> None:
        self._header = header
        self.places: list[BlockPlace] = []
        self.value_count = 0
        self.index_offset = 0
        self.fingerprint = 0
        """crc32c of the index, which holds every block's: differs whenever the content does."""

    def parts(self, blocks: Iterable[RawBlock]) -> Iterator[bytes]:
        """The file from its first to its last byte. The iterable is consumed as the parts are."""
        yield pack_header(self._header)
        compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)
        offset = HEADER_SIZE_BYTES
        for block in blocks:
            packed = compressor.compress(block.data)
            stored = packed if len(packed) < len(block.data) else block.data
            self.places.append(
                BlockPlace(
                    block.first_key,
                    block.last_key,
                    google_crc32c.value(stored),
                    offset,
                    block.lowest_lsn,
                    block.highest_lsn,
                    len(stored),
                    len(block.data),
                )
            )
            self.value_count += block.value_count
            offset += len(stored)
            yield stored
        self.index_offset = offset
        raw_index = b"".join(_INDEX_ENTRY.pack(*place) for place in self.places)
        stored_index = compressor.compress(raw_index)
        self.fingerprint = google_crc32c.value(stored_index)
        yield stored_index
        trailer = _TRAILER.pack(
            offset,
            len(stored_index),
            len(raw_index),
            self.value_count,
            len(self.places),
            self.fingerprint,
            0,
            MAGIC,
        )
        checksum = google_crc32c.value(trailer[:36])
        yield trailer[:36] + struct.pack("<I", checksum) + MAGIC


def pack_header(header: LayerHeader) -> bytes:
    packed = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        header.kind,
        header.start_lsn,
        header.end_lsn,
        bytes.fromhex(header.tenant_id),
        bytes.fromhex(header.timeline_id),
        0,
    )
    return packed[:-4] + struct.pack("<I", google_crc32c.value(packed[:-4]))


def unpack_header(data: bytes, file: str) -> LayerHeader:
    """Raises `DamagedLayerError`."""
    if len(data) != HEADER_SIZE_BYTES:
        raise DamagedLayerError(file, "its header is cut short")
    magic, version, kind, start_lsn, end_lsn, tenant, timeline, checksum = _HEADER.unpack(data)
    if magic != MAGIC or checksum != google_crc32c.value(data[:-4]):
        raise DamagedLayerError(file, "its header fails the checksum")
    if version not in FORMAT_VERSIONS_READ:
        known = " and ".join(map(str, FORMAT_VERSIONS_READ))
        raise DamagedLayerError(file, f"it has format version {version}, this program knows {known}")
    return LayerHeader(LayerKind(kind), start_lsn, end_lsn, tenant.hex(), timeline.hex())


def unpack_index(tail: bytes, index_offset: int, file: str, *, fingerprint: int | None = None) -> LayerIndex:
    """From the bytes of the file from `index_offset` on. With a fingerprint, it must be that layer's.

    Raises `DamagedLayerError`.
    """
    trailer = tail[-TRAILER_SIZE_BYTES:]
    if len(trailer) != TRAILER_SIZE_BYTES or trailer[-8:] != MAGIC:
        raise DamagedLayerError(file, "its trailer is missing")
    offset, stored_size, raw_size, _, block_count, checksum, own_checksum, _ = _TRAILER.unpack(trailer)
    if own_checksum != google_crc32c.value(trailer[:36]):
        raise DamagedLayerError(file, "its trailer fails the checksum")
    if fingerprint is not None and checksum != fingerprint:
        raise DamagedLayerError(file, "it is another layer than the manifest says")
    stored = tail[:-TRAILER_SIZE_BYTES]
    if offset != index_offset or stored_size != len(stored) or checksum != google_crc32c.value(stored):
        raise DamagedLayerError(file, "its index fails the checksum")
    raw = zstandard.ZstdDecompressor().decompress(stored, max_output_size=raw_size)
    if len(raw) != raw_size or raw_size != block_count * INDEX_ENTRY_SIZE_BYTES:
        raise DamagedLayerError(file, "its index has the wrong size")
    return LayerIndex(raw)


def unpack_block_data(
    stored: bytes, place: BlockPlace, decompressor: zstandard.ZstdDecompressor, file: str
) -> bytes:
    """The raw block. Raises `DamagedLayerError`."""
    if len(stored) != place.stored_size_bytes or google_crc32c.value(stored) != place.checksum:
        raise DamagedLayerError(file, f"the block at offset {place.offset} fails the checksum")
    if place.stored_size_bytes == place.raw_size_bytes:
        return stored
    raw = decompressor.decompress(stored, max_output_size=place.raw_size_bytes)
    if len(raw) != place.raw_size_bytes:
        raise DamagedLayerError(file, f"the block at offset {place.offset} has the wrong size")
    return raw


assert KEY_SIZE_BYTES == 18
