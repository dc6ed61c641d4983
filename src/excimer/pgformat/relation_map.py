"""pg_filenode.map: which file holds each catalog that is too fundamental to be looked up.

::

    magic 4 | count 4 | (relation oid 4, file number 4) x 62, or 64 from 16 on | crc32c 4 | padding

Source: RelMapFile in src/backend/utils/cache/relmapper.c.
"""

import struct

from excimer.base.errors import CorruptionError

_HEAD = struct.Struct("<ii")
_MAPPING = struct.Struct("<II")
_MAGIC = 0x592717
_MAPPINGS_MAX = 64


class RelationMapError(CorruptionError):
    """Bytes are not a pg_filenode.map."""


def parse_relation_map(data: bytes) -> dict[int, int]:
    """File number by relation oid. Raises `RelationMapError`."""
    if len(data) < _HEAD.size:
        raise RelationMapError(f"a pg_filenode.map has only {len(data)} bytes")
    magic, count = _HEAD.unpack_from(data)
    end = _HEAD.size + count * _MAPPING.size
    if magic != _MAGIC or not 0 <= count <= _MAPPINGS_MAX or end > len(data):
        raise RelationMapError(f"bytes with magic {magic:#x} and {count} entries are no pg_filenode.map")
    return dict(_MAPPING.iter_unpack(data[_HEAD.size : end]))
