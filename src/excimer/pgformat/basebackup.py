"""What a compute needs to start at an LSN: Excimer's basebackup, as one MessagePack value.

Small files travel inline; relations and SLRU segments only as a manifest of sizes, because the
compute fetches their blocks when it first reads them; a start-up working set of pages is inline,
and so is every page that a commit may write (an absent one inside a critical section would be a
PANIC).

Not here: who builds it (`excimer.pageserver`), who lays it out (`excimer.compute`).
"""

import struct
from typing import NamedTuple

import msgspec

from excimer.pgformat.replication_origins import ORIGINS_PATH, count_origins

FORMAT_VERSION = 1

_RELATION_FORK = struct.Struct("<IIIB3xI")
_SLRU_SEGMENT = struct.Struct("<B3xII")


class RelationFork(NamedTuple):
    spc: int
    db: int
    rel: int
    fork: int
    blocks: int


class SlruSegment(NamedTuple):
    slru: int
    segment: int
    blocks: int


class InlinePage(msgspec.Struct, frozen=True, array_like=True):
    """One page that the compute lays down as present."""

    key: bytes
    """18 bytes, a RELATION_BLOCK or SLRU_BLOCK key (`excimer.base.keys`)."""
    page: bytes


class Basebackup(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int = FORMAT_VERSION
    pg_version: int
    lsn: int
    """End of the last record at or below the LSN asked for; the compute's WAL continues here."""
    prev_lsn: int
    """Start of that last record; 0 when unknown (an LSN in the past that no record start is kept for)."""
    control_file: bytes
    """pg_control as initdb wrote it, with the settings copies that WAL has changed since."""
    checkpoint: bytes
    """A packed `CheckPoint`: the fields a checkpoint taken at `lsn` would have."""
    files: list[tuple[str, bytes]]
    """Relative path and content: PG_VERSION, pg_filenode.map, pg_twophase/…, replication origins."""
    relation_forks: bytes
    slru_segments: bytes
    pages: list[InlinePage]

    @property
    def origin_count(self) -> int:
        """Replication origins with progress."""
        return sum(count_origins(content) for path, content in self.files if path == ORIGINS_PATH)


def origins_setting(pg_version: int) -> str:
    """The setting that bounds how many replication origins have progress; with fewer, start-up is a PANIC."""
    return "max_active_replication_origins" if pg_version >= 18 else "max_replication_slots"


def pack_relation_forks(forks: list[RelationFork]) -> bytes:
    """20 bytes each: u32 spc, db, rel; u8 fork, 3 pad; u32 blocks. Little-endian."""
    return b"".join(_RELATION_FORK.pack(*fork) for fork in forks)


def unpack_relation_forks(data: bytes) -> list[RelationFork]:
    return [RelationFork._make(fields) for fields in _RELATION_FORK.iter_unpack(data)]


def pack_slru_segments(segments: list[SlruSegment]) -> bytes:
    """12 bytes each: u8 slru, 3 pad; u32 segment, blocks. Little-endian."""
    return b"".join(_SLRU_SEGMENT.pack(*segment) for segment in segments)


def unpack_slru_segments(data: bytes) -> list[SlruSegment]:
    return [SlruSegment._make(fields) for fields in _SLRU_SEGMENT.iter_unpack(data)]


def encode_basebackup(backup: Basebackup) -> bytes:
    return msgspec.msgpack.encode(backup)


def decode_basebackup(data: bytes) -> Basebackup:
    """Raises msgspec.ValidationError or msgspec.DecodeError on bytes that are not a basebackup."""
    return msgspec.msgpack.decode(data, type=Basebackup)
