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

from excimer.base.errors import CorruptionError
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    DEFAULT_TABLESPACE,
    GLOBAL_TABLESPACE,
    KEY_SIZE_BYTES,
    SEGMENT_BLOCKS,
    SLRU_DIRECTORIES,
    SLRU_SEGMENT_BLOCKS,
    KeyKind,
    parse_key,
)
from excimer.pgformat.cluster_paths import UnsafePathError, check_carried_path
from excimer.pgformat.replication_origins import ORIGINS_PATH, count_origins
from excimer.pgformat.slru import SEGMENT_MAX

FORMAT_VERSION = 1

FILE_SIZE_BYTES_MAX = 64 << 20
"""Of a small file; the largest are states of prepared transactions."""
FILES_MAX = 1 << 20
PAGE_FILES_MAX = 1 << 22
"""Files of relations and SLRUs; each is an entry that the compute keeps in memory."""

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


class BasebackupContentError(CorruptionError):
    """A basebackup names what no cluster has, or what may not be written for it."""


def decode_basebackup(data: bytes) -> Basebackup:
    """Checked: every path stays within a data directory, and nothing is of an absurd size or number.

    Raises msgspec.ValidationError or msgspec.DecodeError on bytes that are not a basebackup, and
    `BasebackupContentError`.
    """
    backup = msgspec.msgpack.decode(data, type=Basebackup)
    if backup.format_version == FORMAT_VERSION:
        check_basebackup(backup)
    return backup


def check_basebackup(backup: Basebackup) -> None:
    """Raises `BasebackupContentError`."""
    try:
        _check_files(backup.files)
        segments = _check_relation_forks(unpack_relation_forks(backup.relation_forks))
        segments += _check_slru_segments(unpack_slru_segments(backup.slru_segments))
        for page in backup.pages:
            _check_page(page)
    except (UnsafePathError, struct.error) as error:
        raise BasebackupContentError(f"the basebackup is damaged: {error}") from error
    if segments > PAGE_FILES_MAX:
        raise BasebackupContentError(f"the basebackup names {segments} files of pages, too many")


def _check_files(files: list[tuple[str, bytes]]) -> None:
    if len(files) > FILES_MAX:
        raise BasebackupContentError(f"the basebackup carries {len(files)} files, too many")
    seen = set()
    for path, content in files:
        if check_carried_path(path) in seen:
            raise BasebackupContentError(f"the basebackup carries {path} twice")
        seen.add(path)
        if len(content) > FILE_SIZE_BYTES_MAX:
            raise BasebackupContentError(f"the basebackup's {path} has {len(content)} bytes, too many")


def _check_relation_forks(forks: list[RelationFork]) -> int:
    """How many files they have."""
    segments = 0
    for spc, db, rel, fork, blocks in forks:
        is_global = spc == GLOBAL_TABLESPACE
        if not (is_global or spc == DEFAULT_TABLESPACE) or is_global is not (db == 0) or not rel or fork > 3:
            raise BasebackupContentError(f"the basebackup names a relation {spc}/{db}/{rel} fork {fork}")
        segments += blocks // SEGMENT_BLOCKS + 1
    if len(set(forks)) != len(forks):
        raise BasebackupContentError("the basebackup names a relation twice")
    return segments


def _check_slru_segments(segments: list[SlruSegment]) -> int:
    for slru, segment, blocks in segments:
        if slru >= len(SLRU_DIRECTORIES) or segment > SEGMENT_MAX[slru] or blocks > SLRU_SEGMENT_BLOCKS:
            raise BasebackupContentError(
                f"the basebackup names segment {segment} of SLRU {slru} with {blocks} blocks"
            )
    return len(segments)


def _check_page(page: InlinePage) -> None:
    if len(page.key) != KEY_SIZE_BYTES or len(page.page) != BLOCK_SIZE_BYTES:
        raise BasebackupContentError("the basebackup carries a page that is none")
    kind, spc, db, rel, fork, block = parse_key(page.key)
    if kind == KeyKind.RELATION_BLOCK:
        _check_relation_forks([RelationFork(spc, db, rel, fork, block)])
    elif kind == KeyKind.SLRU_BLOCK:
        _check_slru_segments([SlruSegment(spc, rel, block)])
    else:
        raise BasebackupContentError(f"the basebackup carries a page of kind {kind}")
