"""A block: the unit in which a layer file is compressed, checksummed and read.

Before compression a block is values back to back, by key, and within a key from the newest to the
oldest, so that a read can stop at the first value that starts a chain::

    +-----+------+-------+---------+-----+---------+
    | key | kind | flags | payload | LSN | payload |   little-endian
    |     |      |       | length  |     |         |
    | 18  |  1   |   1   |    4    |  8  | length  |
    +-----+------+-------+---------+-----+---------+

This is the definition; the hot paths are in `_native/page_chains.pyx` (reading) and
`_native/memory_layer.pyx` (cutting a memory layer into blocks).
"""

import struct
from collections.abc import Iterator

from excimer.base.errors import CorruptionError
from excimer.storage.format.values import FLAG_STARTS_CHAIN, Value, ValueKind

VALUE_HEAD = struct.Struct("<18sBBIQ")
VALUE_HEAD_SIZE_BYTES = 32
assert VALUE_HEAD.size == VALUE_HEAD_SIZE_BYTES

BLOCK_TARGET_SIZE_BYTES = 32 * 1024
"""Raw size that a block does not exceed, unless it holds a single larger value."""


class MalformedBlockError(CorruptionError):
    """A block passes its checksum but its structure is broken."""


def pack_value(value: Value) -> bytes:
    flags = FLAG_STARTS_CHAIN if value.starts_chain else 0
    head = VALUE_HEAD.pack(value.key, value.kind, flags, len(value.payload), value.lsn)
    return head + value.payload


def unpack_block(block: bytes) -> Iterator[Value]:
    """Every value of a raw block. Raises `MalformedBlockError`."""
    at = 0
    while at < len(block):
        if len(block) - at < VALUE_HEAD_SIZE_BYTES:
            raise MalformedBlockError("a value's head reaches past the end of its block")
        key, kind, flags, length, lsn = VALUE_HEAD.unpack_from(block, at)
        at += VALUE_HEAD_SIZE_BYTES
        if length > len(block) - at:
            raise MalformedBlockError("a value reaches past the end of its block")
        yield Value(key, lsn, ValueKind(kind), bool(flags & FLAG_STARTS_CHAIN), block[at : at + length])
        at += length
