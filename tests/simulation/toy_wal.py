"""Self-checking records for simulations: a WAL whose scanner is ten lines of Python.

::

    +--------+-----------------------------+-----------+
    | length | crc32 of LSN, length, body  |   body    |
    |   4    |             4               | 8 or more |
    +--------+-----------------------------+-----------+

As in PostgreSQL a record vouches for its place (the LSN is in the checksum) but not for its term, so
a stale record left behind at the right place looks good. Lengths repeat often, to make that happen.
"""

import random
import struct
import zlib

_HEAD = struct.Struct("<II")
UNIFORM_SIZES = (8,)
MIXED_SIZES = (8, 8, 8, 16, 24)
LONG_SIZES = (8, 8, 8, 8, 24, 800)
"""The last is longer than any window in the simulation."""


def make_record(chance: random.Random, lsn: int, body_sizes: tuple[int, ...] = MIXED_SIZES) -> bytes:
    body = chance.randbytes(chance.choice(body_sizes))
    length = _HEAD.size + len(body)
    return _HEAD.pack(length, _checksum(lsn, length, body)) + body


def scan(wal: bytes | bytearray, start_lsn: int) -> int:
    """End of the last complete, valid record of `wal` (whose index 0 is LSN 0) from a boundary on."""
    end = start_lsn
    while len(wal) - end >= _HEAD.size:
        length, checksum = _HEAD.unpack_from(wal, end)
        if length <= _HEAD.size or end + length > len(wal):
            break
        if checksum != _checksum(end, length, bytes(wal[end + _HEAD.size : end + length])):
            break
        end += length
    return end


def _checksum(lsn: int, length: int, body: bytes) -> int:
    return zlib.crc32(body, lsn << 8 | length & 0xFF)
