"""What each file of a data directory is to us, told by its path; and the label of a backup.

::

    base/5/16384        base/5/16384_vm.2        global/1260        relations
    pg_xact/0000        pg_multixact/offsets/…   pg_commit_ts/…     SLRU segments
    base/5/pg_filenode.map    base/5/PG_VERSION  pg_twophase/…      values of their own
    pg_logical/replorigin_checkpoint                               how far replication origins are applied
    global/pg_control                                              the cluster's state

All else is not kept: configuration (a compute writes its own), temporary files and relations, replication
slots, statistics, notifications, what start-up makes anew (pg_subtrans, relation caches).

Not here: reading any of it.
"""

import re
from enum import Enum, auto
from typing import NamedTuple

from excimer.base.errors import RefusedError
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    DEFAULT_TABLESPACE,
    FORK_SUFFIXES,
    GLOBAL_TABLESPACE,
    SEGMENT_BLOCKS,
    SLRU_DIRECTORIES,
    SLRU_SEGMENT_BLOCKS,
    Relation,
)
from excimer.base.lsn import Lsn, parse_lsn
from excimer.pgformat.cluster_paths import UnsafePathError, check_relative_path
from excimer.pgformat.replication_origins import ORIGINS_PATH
from excimer.pgformat.slru import SEGMENT_MAX

_RELATION = re.compile(r"(?:global|base/(\d+))/(\d+)(_fsm|_vm|_init)?(?:\.(\d+))?\Z", re.ASCII)
_SLRU_SEGMENT = re.compile(r"(.+)/([0-9A-F]{4,15})\Z")
_OF_DATABASE = re.compile(r"(?:global|base/(\d+))/(pg_filenode\.map|PG_VERSION)\Z", re.ASCII)
_TWO_PHASE = re.compile(r"pg_twophase/([0-9A-F]{8}|[0-9A-F]{16})\Z")
_OID_MAX = (1 << 32) - 1
_DIGITS_MAX = 10
RELATION_SEGMENT_MAX = ((1 << 32) - 2) // SEGMENT_BLOCKS
WHOLE_FILE_SIZE_BYTES_MAX = 16 << 20
"""Of a file that becomes one value."""
_LABEL_LINE = re.compile(r"START WAL LOCATION: ([0-9A-F]+/[0-9A-F]+) \(file [0-9A-F]+\)\Z")
_LABEL_TIMELINE = re.compile(r"START TIMELINE: (\d+)\Z")


class ClusterFileError(RefusedError):
    """A file of the cluster is not what PostgreSQL writes there, or one is missing."""


class FileKind(Enum):
    RELATION = auto()
    SLRU = auto()
    RELATION_MAP = auto()
    DATABASE = auto()
    TWO_PHASE = auto()
    ORIGINS = auto()
    CONTROL = auto()


class ClusterFile(NamedTuple):
    kind: FileKind
    relation: Relation = Relation(0, 0, 0)
    """Of RELATION; of RELATION_MAP and DATABASE only spc and db."""
    fork: int = 0
    segment: int = 0
    """The file's number within the fork; of SLRU its segment."""
    slru: int = 0
    xid: int = 0
    """Of TWO_PHASE: 32 bits before PostgreSQL 17, all 64 from then on."""


def identify_file(path: str) -> ClusterFile | None:
    """What the file at `path`, relative to the data directory, is; None for what is not kept.

    Raises `ClusterFileError` for a path that would lead out of a data directory, and for numbers that
    PostgreSQL does not have.
    """
    try:
        check_relative_path(path)
    except UnsafePathError as error:
        raise ClusterFileError(str(error)) from error
    if path == "global/pg_control":
        return ClusterFile(FileKind.CONTROL)
    if path == ORIGINS_PATH:
        return ClusterFile(FileKind.ORIGINS)
    if match := _RELATION.match(path):
        db, rel, suffix, segment = match.groups()
        relation = Relation(*_place(db), _number(rel, _OID_MAX, path))
        number = _number(segment or "0", RELATION_SEGMENT_MAX, path)
        return ClusterFile(FileKind.RELATION, relation, FORK_SUFFIXES.index(suffix or ""), segment=number)
    if match := _OF_DATABASE.match(path):
        kind = FileKind.DATABASE if match[2] == "PG_VERSION" else FileKind.RELATION_MAP
        return ClusterFile(kind, Relation(*_place(match[1]), 0))
    if match := _TWO_PHASE.match(path):
        return ClusterFile(FileKind.TWO_PHASE, xid=int(match[1], 16))
    match = _SLRU_SEGMENT.match(path)
    if match is not None and match[1] in SLRU_DIRECTORIES:
        slru = SLRU_DIRECTORIES.index(match[1])
        number = int(match[2], 16)
        if number > SEGMENT_MAX[slru]:
            raise ClusterFileError(f"{path} lies beyond the last segment that PostgreSQL uses")
        return ClusterFile(FileKind.SLRU, segment=number, slru=slru)
    return None


def file_size_bytes_max(kind: FileKind) -> int:
    """The largest file of a kind that PostgreSQL writes, or that we take as one value."""
    match kind:
        case FileKind.RELATION:
            return SEGMENT_BLOCKS * BLOCK_SIZE_BYTES
        case FileKind.SLRU:
            return SLRU_SEGMENT_BLOCKS * BLOCK_SIZE_BYTES
        case _:
            return WHOLE_FILE_SIZE_BYTES_MAX


def _place(db: str | None) -> tuple[int, int]:
    return (GLOBAL_TABLESPACE, 0) if db is None else (DEFAULT_TABLESPACE, _number(db, _OID_MAX, f"base/{db}"))


def _number(digits: str, largest: int, path: str) -> int:
    number = int(digits) if len(digits) <= _DIGITS_MAX else largest + 1
    if number > largest:
        raise ClusterFileError(f"{path[:200]} has a number that PostgreSQL does not use")
    return number


class BackupLabel(NamedTuple):
    """What backup_label says of where WAL is needed from."""

    start_lsn: Lsn
    postgres_timeline: int


def parse_backup_label(text: str) -> BackupLabel:
    """Raises `ClusterFileError`."""
    lines = text.splitlines()
    starts = [match for line in lines if (match := _LABEL_LINE.match(line))]
    timelines = [match for line in lines if (match := _LABEL_TIMELINE.match(line))]
    if not starts or not timelines:
        raise ClusterFileError("backup_label does not say where its WAL starts")
    return BackupLabel(parse_lsn(starts[0][1]), int(timelines[0][1]))
