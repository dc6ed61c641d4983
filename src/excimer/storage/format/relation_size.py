"""Sizes of relation forks, and which of their blocks' older values no longer count.

A size is a value of the key RELATION_SIZE::

    +--------+----------+---------------+
    | blocks | born LSN | truncated LSN |   little-endian; the two LSNs are missing in values that
    |   4    |    8     |       8       |   were written by version 1 of the layer format, and then 0
    +--------+----------+---------------+

A block below the size that has no value is a page of zeros. So a fork that is extended by a far block costs
one size, however many blocks lie between. But a block may have values from before it was cut off, and then
come back in such a gap: those are dead, and must not be read.

* Values below *born LSN* are dead for all blocks: the fork was made, or cut to nothing, after them.
* A fork that was cut to `n` > 0 blocks at T keeps T as its *truncated LSN*, and notes that values at or
  below T are dead for blocks from `n` on. A read that has found only newer values need not look further.

The notes are values of keys RELATION_TRUNCATION, each a u64 LSN. What counts for block b is the greatest LSN
noted for any n <= b. So that neither a truncation nor a read depends on how many there were, a note is made
at four levels, for n, n >> 8, n >> 16 and n >> 24; a read looks at those of its own group on each level::

    level 3   |  n >> 24   |                              the level is in the upper half of the key's fork
    level 2        |  n >> 16   |   in the group of b >> 24, below b >> 16
    level 1             |  n >> 8    |   in the group of b >> 16, below b >> 8
    level 0                  |  n  |     in the group of b >> 8, up to b

LSNs only grow, so that an older note of the same key never says more.

Not here: reading any of it (`storage.engine.page_reads`).
"""

import struct
from typing import NamedTuple

from excimer.base.errors import CorruptionError
from excimer.base.keys import KeyKind, make_key, parse_key

_SIZE = struct.Struct("<IQQ")
_BLOCKS = struct.Struct("<I")
_LSN = struct.Struct("<Q")
FIRST_BIRTH_LSN = 1
"""Of a fork whose blocks have no older values: an imported one. 0 says that it is not known: a size of
version 1, of which the first growth notes that the blocks beyond it are cut off.
"""
LEVELS = 4
GROUP_BITS = 8
_GROUP = 1 << GROUP_BITS


class RelationSize(NamedTuple):
    blocks: int
    born_lsn: int = 0
    """Values below it are dead."""
    truncated_lsn: int = 0
    """Of the last truncation to more than nothing; 0: there was none since the fork was born."""


class MalformedSizeError(CorruptionError):
    """A stored size is not of its shape."""


def pack_relation_size(size: RelationSize) -> bytes:
    return _SIZE.pack(*size)


def unpack_relation_size(value: bytes) -> RelationSize:
    """Of a fork, or of an SLRU segment, whose size is its blocks alone. Raises `MalformedSizeError`."""
    if len(value) == _SIZE.size:
        return RelationSize._make(_SIZE.unpack(value))
    if len(value) == _BLOCKS.size:
        return RelationSize(_BLOCKS.unpack(value)[0])
    raise MalformedSizeError(f"a size of {len(value)} bytes")


def size_blocks(value: bytes) -> int:
    """Raises `MalformedSizeError`. A basebackup asks for the size of each fork there is."""
    if len(value) not in (_SIZE.size, _BLOCKS.size):
        raise MalformedSizeError(f"a size of {len(value)} bytes")
    blocks: int = _BLOCKS.unpack_from(value)[0]
    return blocks


def truncation_notes(size_key: bytes, blocks: int, lsn: int) -> list[tuple[bytes, bytes]]:
    """Keys and values to put at `lsn` when the fork is cut to so many blocks."""
    note = _LSN.pack(lsn)
    return [(_note_key(size_key, level, blocks >> GROUP_BITS * level), note) for level in range(LEVELS)]


def note_ranges(size_key: bytes, first: int, last: int) -> list[tuple[bytes, bytes]]:
    """Ranges of keys [start, end) with all notes that count for a block of [first, last]; may be fewer than
    `LEVELS`. Those for `first` alone at the upper levels, which hold for the others too.
    """
    ranges = []
    for level in range(LEVELS):
        index = first >> GROUP_BITS * level
        end = last + 1 if level == 0 else index
        start = index - index % _GROUP
        if start < end:
            ranges.append((_note_key(size_key, level, start), _note_end(size_key, level, end)))
    return ranges


def dead_up_to(notes: list[tuple[bytes, bytes]], first: int, last: int) -> list[int]:
    """For each block of [first, last] the LSN at or below which its values are dead, from the notes found in
    `note_ranges` of them.
    """
    of_all = 0
    of_block: dict[int, int] = {}
    for key, note in notes:
        fields = parse_key(key)
        if len(note) != _LSN.size:
            raise MalformedSizeError(f"a note of a truncation of {len(note)} bytes")
        (lsn,) = _LSN.unpack(note)
        if fields.fork >> 4 or fields.block <= first:
            of_all = max(of_all, lsn)
        else:
            of_block[fields.block] = lsn
    found = []
    for block in range(first, last + 1):
        of_all = max(of_all, of_block.get(block, 0))
        found.append(of_all)
    return found


def _note_key(size_key: bytes, level: int, index: int) -> bytes:
    _, spc, db, rel, fork, _ = parse_key(size_key)
    return make_key(KeyKind.RELATION_TRUNCATION, spc, db, rel, fork | level << 4, index)


def _note_end(size_key: bytes, level: int, index: int) -> bytes:
    """The key before which a range ends; `index` may be one more than there are blocks."""
    if index < 1 << 32:
        return _note_key(size_key, level, index)
    _, spc, db, rel, fork, _ = parse_key(size_key)
    return make_key(KeyKind.RELATION_TRUNCATION, spc, db, rel, (fork | level << 4) + 1, 0)
