"""Progress of replication origins: the file in which PostgreSQL keeps it, and the WAL records that change it.

An origin (a subscription's, say) is a 16-bit id; its progress is the LSN, on the server it comes from, up
to which its transactions have been applied here. `pg_logical/replorigin_checkpoint` has it as of a
checkpoint, alike in PostgreSQL 14 to 18::

    magic 4 | per origin: id 2, padding 6, remote LSN 8 | crc32c of all before 4

From there on commit records say more (`transaction_records`), and two records of a resource manager of
their own: SET, which may go back, and DROP.
Source: CheckPointReplicationOrigin and replorigin_redo in src/backend/replication/logical/origin.c.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

import google_crc32c

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn

ORIGINS_PATH = "pg_logical/replorigin_checkpoint"

REPLORIGIN_SET = 0x00
REPLORIGIN_DROP = 0x10

_MAGIC = 0x1257DADE
_HEAD = struct.Struct("<I")
_ORIGIN = struct.Struct("<H6xQ")
_SET = struct.Struct("<QH?")
_DROP = struct.Struct("<H")


class OriginsFileError(RefusedError):
    """A file of origins is not what PostgreSQL writes."""


class OriginProgress(NamedTuple):
    origin: int
    remote_lsn: Lsn


class OriginSet(NamedTuple):
    origin: int
    remote_lsn: Lsn
    may_go_back: bool


def pack_origins(origins: Iterable[OriginProgress]) -> bytes:
    """The whole file."""
    data = _HEAD.pack(_MAGIC) + b"".join(_ORIGIN.pack(*origin) for origin in origins)
    return data + _HEAD.pack(google_crc32c.value(data))


def parse_origins(data: bytes) -> list[OriginProgress]:
    """In the file's order. Raises `OriginsFileError`."""
    content, crc = data[: -_HEAD.size], data[-_HEAD.size :]
    if len(content) < _HEAD.size or (len(content) - _HEAD.size) % _ORIGIN.size:
        raise OriginsFileError(f"{ORIGINS_PATH} has {len(data)} bytes, which is no whole number of origins")
    if content[: _HEAD.size] != _HEAD.pack(_MAGIC) or crc != _HEAD.pack(google_crc32c.value(content)):
        raise OriginsFileError(f"{ORIGINS_PATH} is damaged: its checksum is wrong")
    return [OriginProgress(origin, Lsn(lsn)) for origin, lsn in _ORIGIN.iter_unpack(content[_HEAD.size :])]


def count_origins(data: bytes) -> int:
    """Of a whole file, by its size alone."""
    return (len(data) - 2 * _HEAD.size) // _ORIGIN.size


def decode_origin_set(main_data: bytes) -> OriginSet:
    """Of a SET record. Raises struct.error when it is short."""
    remote_lsn, origin, may_go_back = _SET.unpack_from(main_data)
    return OriginSet(origin, Lsn(remote_lsn), may_go_back)


def decode_origin_drop(main_data: bytes) -> int:
    """The origin of a DROP record. Raises struct.error when it is short."""
    (origin,) = _DROP.unpack_from(main_data)
    return int(origin)
