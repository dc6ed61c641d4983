"""Values as the page store keeps them, and the packed batch in which ingest hands them over.

A page's history is a chain of values ordered by LSN. A value either *starts a chain* (nothing
before it matters: an image, a tombstone, a record that initialises its page) or builds upon the
one before.

====  ==========  ==============================================================  ============
kind  name        payload                                                         starts chain
====  ==========  ==============================================================  ============
1     IMAGE       the whole value (8192 bytes for a page)                         yes
2     WAL_RECORD  u64 start LSN, then the raw record (its header included)        if will-init
3     NATIVE      a small record of our own (`excimer.pgformat.native_records`)   no
4     TOMBSTONE   empty: the key does not exist from here on                      yes
5     ZERO_PAGE   empty: a page of zeros                                          yes
6     PAGE_IMAGE  a full-page image as WAL carries it (below)                     yes
====  ==========  ==============================================================  ============

PAGE_IMAGE: ``u8 compression (0 none, 1 pglz, 2 lz4, 3 zstd), u8 0, u16 hole offset, u16 hole
length, data``; restoring it fills the hole with zeros and, unless the page is all zeros, sets
pd_lsn to the value's LSN.

A value's LSN is the *end* of the WAL record that made it, which is also what redo writes into
pd_lsn. Per (key, LSN) there is one value; if a batch has two, the later one counts.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

ENTRY = struct.Struct("<18sBBIQQ")
"""key, kind, flags, payload length, LSN, payload offset: 40 bytes, naturally aligned."""

ENTRY_SIZE_BYTES = 40
assert ENTRY.size == ENTRY_SIZE_BYTES

FLAG_STARTS_CHAIN = 0x01


class ValueKind(IntEnum):
    IMAGE = 1
    WAL_RECORD = 2
    NATIVE = 3
    TOMBSTONE = 4
    ZERO_PAGE = 5
    PAGE_IMAGE = 6


class PackedBatch(NamedTuple):
    """Values in WAL order (LSNs never decrease), as arrays over one buffer.

    `entries` holds ENTRY structs back to back; each points into `data`.
    """

    entries: bytes
    data: bytes

    @property
    def value_count(self) -> int:
        return len(self.entries) // ENTRY_SIZE_BYTES


class Value(NamedTuple):
    """One value unpacked, for tests, tools and metadata: never on the hot path."""

    key: bytes
    lsn: int
    kind: ValueKind
    starts_chain: bool
    payload: bytes


def pack_batch(values: list[Value]) -> PackedBatch:
    entries = bytearray()
    data = bytearray()
    for value in values:
        flags = FLAG_STARTS_CHAIN if value.starts_chain else 0
        entries += ENTRY.pack(value.key, value.kind, flags, len(value.payload), value.lsn, len(data))
        data += value.payload
    return PackedBatch(bytes(entries), bytes(data))


def unpack_batch(batch: PackedBatch) -> list[Value]:
    return [
        Value(
            key,
            lsn,
            ValueKind(kind),
            bool(flags & FLAG_STARTS_CHAIN),
            batch.data[offset : offset + size],
        )
        for key, kind, flags, size, lsn, offset in ENTRY.iter_unpack(batch.entries)
    ]
