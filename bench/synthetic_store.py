"""A timeline of any size in an object store that makes up its layers' bytes when they are asked for.

::

    L0 delta  |---- every 160th block -------------------------|   5 of them, whole key range, 64 MiB
    images    |--64 MiB--|--64 MiB--|--64 MiB--| ...               one round that covers everything

What a test of ten gigabytes would else have to write is computed: all blocks of a layer have the same
length (four pages of bytes that do not compress, stored as they are), so the bytes at any offset follow
from the block's number. Indexes and checksums are real, made once. Each request takes a round trip and then
its bytes at a bandwidth, as from a store in the same region; those at the same time do not slow each other.
"""

import random
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import google_crc32c
import zstandard

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, Relation, relation_block_key, relation_size_key
from excimer.io.object_store import MemoryObjectStore, ObjectInfo
from excimer.storage.format.layer_block import VALUE_HEAD
from excimer.storage.format.layer_file import (
    HEADER_SIZE_BYTES,
    MAGIC,
    LayerHeader,
    LayerKind,
    pack_header,
)
from excimer.storage.format.manifest import LayerDescription, Manifest, ManifestName, pack_manifest
from excimer.storage.format.values import FLAG_STARTS_CHAIN, ValueKind

TENANT = TenantId("5e" * 16)
TIMELINE = TimelineId("7a" * 16)
TABLE = Relation(1663, 5, 16384)
IMAGE_LSN: Final = 0x100_0000_0000
DELTA_WAL_BYTES: Final = 1 << 26
PAGES_PER_BLOCK: Final = 4
BLOCKS_PER_LAYER: Final = 2048
DELTAS: Final = 5
PAGE: Final = random.Random(7).randbytes(BLOCK_SIZE_BYTES)
_INDEX_ENTRY = struct.Struct("<18s18sIQQQII")
_TRAILER = struct.Struct("<QIIQII")


class SyntheticLayer:
    """Pages `first`, `first + step`, … of the table at one LSN, four to a block; the size key before them."""

    def __init__(self, kind: LayerKind, start_lsn: int, end_lsn: int, first: int, step: int) -> None:
        self._first = first
        self._step = step
        self._lsn = end_lsn
        self._header = pack_header(LayerHeader(kind, start_lsn, end_lsn, TENANT, TIMELINE))
        self._block_size_bytes = PAGES_PER_BLOCK * (VALUE_HEAD.size + BLOCK_SIZE_BYTES)
        self._tail, fingerprint = self._make_tail()
        self.index_offset = HEADER_SIZE_BYTES + BLOCKS_PER_LAYER * self._block_size_bytes
        pages = BLOCKS_PER_LAYER * PAGES_PER_BLOCK
        self.description = LayerDescription(
            kind=kind,
            start_lsn=start_lsn,
            end_lsn=end_lsn,
            first_key=self._key(0).hex(),
            last_key=self._key(pages - 1).hex(),
            generation=1,
            fingerprint=fingerprint,
            size_bytes=self.index_offset + len(self._tail),
            index_offset=self.index_offset,
            value_count=pages,
            covers_after_lsn=0 if kind is LayerKind.IMAGE else None,
        )

    def read(self, start: int, end: int) -> bytes:
        size = self._block_size_bytes
        if start >= self.index_offset:
            return self._tail[start - self.index_offset : end - self.index_offset]
        first = max(start - HEADER_SIZE_BYTES, 0) // size
        last = min(-(-(end - HEADER_SIZE_BYTES) // size), BLOCKS_PER_LAYER)
        base = HEADER_SIZE_BYTES + first * size
        data = b"".join(self._block(number) for number in range(first, last))
        if start < HEADER_SIZE_BYTES:
            data, base = self._header + data, 0
        return (data + self._tail)[start - base : end - base]

    def _key(self, page: int) -> bytes:
        return relation_block_key(TABLE, 0, self._first + page * self._step)

    def _block(self, number: int) -> bytes:
        pages = range(number * PAGES_PER_BLOCK, (number + 1) * PAGES_PER_BLOCK)
        return b"".join(
            VALUE_HEAD.pack(self._key(page), ValueKind.IMAGE, FLAG_STARTS_CHAIN, BLOCK_SIZE_BYTES, self._lsn)
            + PAGE
            for page in pages
        )

    def _make_tail(self) -> tuple[bytes, int]:
        entries = []
        for number in range(BLOCKS_PER_LAYER):
            data = self._block(number)
            first, last = (self._key(number * PAGES_PER_BLOCK + at) for at in (0, PAGES_PER_BLOCK - 1))
            offset = HEADER_SIZE_BYTES + number * len(data)
            checksum = google_crc32c.value(data)
            entries.append(
                _INDEX_ENTRY.pack(first, last, checksum, offset, self._lsn, self._lsn, len(data), len(data))
            )
        raw = b"".join(entries)
        stored = zstandard.ZstdCompressor(level=1).compress(raw)
        fingerprint = google_crc32c.value(stored)
        values = BLOCKS_PER_LAYER * PAGES_PER_BLOCK
        trailer = _TRAILER.pack(
            HEADER_SIZE_BYTES + BLOCKS_PER_LAYER * self._block_size_bytes,
            *(len(stored), len(raw), values, BLOCKS_PER_LAYER, fingerprint),
        )
        trailer += bytes(4)
        return stored + trailer + struct.pack("<I", google_crc32c.value(trailer)) + MAGIC, fingerprint


def make_layers(image_layers: int) -> list[SyntheticLayer]:
    pages = BLOCKS_PER_LAYER * PAGES_PER_BLOCK
    layers = [
        SyntheticLayer(LayerKind.IMAGE, IMAGE_LSN, IMAGE_LSN, number * pages, 1)
        for number in range(image_layers)
    ]
    for number in range(DELTAS):
        start = IMAGE_LSN + number * DELTA_WAL_BYTES
        step = image_layers  # so that it spans the whole table and lies in every read's way
        layers.append(SyntheticLayer(LayerKind.DELTA, start, start + DELTA_WAL_BYTES, number + 1, step))
    return layers


class SyntheticStore(MemoryObjectStore):
    """Manifests and settings in memory, layers computed."""

    def __init__(self, layers: Sequence[SyntheticLayer], size_layer: tuple[LayerDescription, bytes]) -> None:
        super().__init__()
        prefix = f"tenants/{TENANT}/timelines/{TIMELINE}"
        self.round_trip_s = 0.0
        self.bytes_per_s = 0.0
        self.requests: list[str] = []
        self._layers = {f"{prefix}/layers/{layer.description.name}": layer for layer in layers}
        self.objects[f"{prefix}/layers/{size_layer[0].name}"] = size_layer[1]
        descriptions = [layer.description for layer in layers] + [size_layer[0]]
        self.last_lsn = max(each.end_lsn for each in descriptions)
        manifest = Manifest(
            tenant_id=TENANT,
            timeline_id=TIMELINE,
            pg_version=18,
            system_id=1,
            wal_segment_size_bytes=1 << 24,
            oldest_lsn=IMAGE_LSN,
            disk_consistent_lsn=self.last_lsn,
            prev_record_lsn=self.last_lsn - 64,
            layers=tuple(descriptions),
        )
        self.objects[f"tenants/{TENANT}/tenant"] = b"excimer tenant 1\n"
        self.objects[f"{prefix}/{ManifestName(1, 1)}"] = pack_manifest(manifest)

    def _wait(self, what: str, size_bytes: int = 0) -> None:
        self.requests.append(what)
        transfer_s = size_bytes / self.bytes_per_s if self.bytes_per_s else 0.0
        time.sleep(self.round_trip_s + transfer_s)

    def put(self, name: str, data: bytes) -> None:
        self._wait(f"put {name}", len(data))
        super().put(name, data)

    def put_file(self, name: str, path: Path) -> None:
        raise NotImplementedError("nothing is written here")

    def get(self, name: str) -> bytes:
        data = super().get(name)
        self._wait(f"get {name}", len(data))
        return data

    def get_range(self, name: str, start: int, end: int) -> bytes:
        layer = self._layers.get(name)
        data = self.objects[name][start:end] if layer is None else layer.read(start, end)
        self._wait(f"range {end - start} {name}", len(data))
        return data

    def size_bytes(self, name: str) -> int | None:
        self._wait(f"size {name}")
        return super().size_bytes(name)

    def list(self, prefix: str) -> list[ObjectInfo]:
        self._wait(f"list {prefix}")
        computed = [
            ObjectInfo(name, layer.description.size_bytes)
            for name, layer in self._layers.items()
            if name.startswith(prefix.rstrip("/") + "/")
        ]
        return sorted([*super().list(prefix), *computed])


def make_size_layer(pages: int) -> tuple[LayerDescription, bytes]:
    """The table's size: an image layer of one value."""
    from excimer.storage.format.layer_file import LayerEncoder, RawBlock

    key = relation_size_key(TABLE, 0)
    value = VALUE_HEAD.pack(key, ValueKind.IMAGE, FLAG_STARTS_CHAIN, 4, IMAGE_LSN) + struct.pack("<I", pages)
    encoder = LayerEncoder(LayerHeader(LayerKind.IMAGE, IMAGE_LSN, IMAGE_LSN, TENANT, TIMELINE))
    data = b"".join(encoder.parts([RawBlock(value, key, key, IMAGE_LSN, IMAGE_LSN, 1)]))
    description = LayerDescription(
        kind=LayerKind.IMAGE,
        start_lsn=IMAGE_LSN,
        end_lsn=IMAGE_LSN,
        first_key=key.hex(),
        last_key=key.hex(),
        generation=1,
        fingerprint=encoder.fingerprint,
        size_bytes=len(data),
        index_offset=encoder.index_offset,
        value_count=1,
        covers_after_lsn=0,
    )
    return description, data
