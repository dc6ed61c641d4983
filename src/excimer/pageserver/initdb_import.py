"""A freshly made, cleanly stopped cluster as the content a timeline begins with.

Everything that has a key is read: relations with all their forks, SLRU segments, relation maps, PG_VERSION of
each database, pg_control and the checkpoint in it. Pages of zeros are left out: a block below
its relation's size without a value is one. It all holds at the end of the shutdown checkpoint's record.

Not here: running initdb, storing the images (`Timeline.import_images`).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from excimer._native.wal_scanner import WalScanner
from excimer.base.errors import RefusedError
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    DEFAULT_TABLESPACE,
    FORK_SUFFIXES,
    GLOBAL_TABLESPACE,
    SEGMENT_BLOCKS,
    SLRU_DIRECTORIES,
    KeyKind,
    Relation,
    make_key,
    relation_block_key,
    relation_size_key,
    slru_block_key,
    slru_size_key,
)
from excimer.base.lsn import Lsn, format_lsn
from excimer.pgformat.checkpoint_state import CheckpointState, ClusterSettings
from excimer.pgformat.control_file import ClusterState, ControlFile
from excimer.pgformat.wal_segment import segment_name

_RELATION_FILE = re.compile(r"(\d+)(_fsm|_vm|_init)?(?:\.(\d+))?\Z")
_SLRU_FILE = re.compile(r"[0-9A-F]{4,6}\Z")
_ZERO_PAGE = bytes(BLOCK_SIZE_BYTES)
_POSTGRES_EPOCH_S = 946_684_800

Image = tuple[bytes, bytes]


class ClusterNotStoppedError(RefusedError):
    """The cluster was not shut down cleanly: its files are not the whole truth."""


class ImportedCluster(NamedTuple):
    control_file: ControlFile
    end_lsn: Lsn
    """Where the images hold and WAL goes on: the end of the shutdown checkpoint's record."""
    prev_record_lsn: Lsn
    """That record's start."""
    images: list[Image]
    """Key and whole value, keys in order."""


def import_initdb(directory: Path, pg_version: int) -> ImportedCluster:
    """Reads the data directory of a stopped cluster without user tablespaces.

    Raises `ClusterNotStoppedError`, `ControlFileError`, `InvalidWalError`, OSError.
    """
    control_bytes = (directory / "global/pg_control").read_bytes()
    control = ControlFile.unpack(control_bytes, pg_version)
    if control.state != ClusterState.SHUTDOWNED:
        raise ClusterNotStoppedError(f"the cluster in {directory} is not shut down cleanly")
    start_lsn = Lsn(control.checkpoint_lsn)
    state = CheckpointState(control.checkpoint, ClusterSettings.from_control_file(control))
    commit_time = (control.checkpoint.time - _POSTGRES_EPOCH_S) * 1_000_000
    images = [
        *_read_relations(directory),
        *_read_slrus(directory),
        *_read_databases(directory),
        (make_key(KeyKind.CHECKPOINT), state.pack()),
        (make_key(KeyKind.CONTROL_FILE), control_bytes),
        (make_key(KeyKind.COMMIT_TIME), commit_time.to_bytes(8, "little", signed=True)),
    ]
    end_lsn = _checkpoint_end(directory, control, pg_version)
    return ImportedCluster(control, end_lsn, start_lsn, sorted(images))


def _checkpoint_end(directory: Path, control: ControlFile, pg_version: int) -> Lsn:
    """Read in steps of 8 bytes, for what follows the record is not WAL."""
    segment_size = control.wal_segment_size
    lsn = control.checkpoint_lsn
    scanner = WalScanner(lsn, pg_version, segment_size)
    number, offset = divmod(lsn, segment_size)
    for segment in (number, number + 1):
        path = directory / "pg_wal" / segment_name(control.checkpoint.timeline, segment, segment_size)
        with path.open("rb") as file:
            file.seek(offset)
            while step := file.read(8):
                scanner.feed(step)
                if scanner.record_count:
                    return scanner.last_record_end
        offset = 0
    raise ClusterNotStoppedError(f"no checkpoint record at {format_lsn(lsn)} in {directory}")


def _database_directories(directory: Path) -> Iterator[tuple[Path, int, int]]:
    yield directory / "global", GLOBAL_TABLESPACE, 0
    for path in sorted((directory / "base").iterdir()):
        if path.name.isdigit():
            yield path, DEFAULT_TABLESPACE, int(path.name)


def _read_relations(directory: Path) -> Iterator[Image]:
    for path, spc, db in _database_directories(directory):
        sizes: dict[tuple[Relation, int], int] = {}
        for file in sorted(path.iterdir()):
            match = _RELATION_FILE.match(file.name)
            if match is None:
                continue
            relation = Relation(spc, db, int(match[1]))
            fork = FORK_SUFFIXES.index(match[2] or "")
            start = int(match[3] or 0) * SEGMENT_BLOCKS
            data = file.read_bytes()
            end = start + len(data) // BLOCK_SIZE_BYTES
            sizes[relation, fork] = max(end, sizes.get((relation, fork), 0))
            for block, page in _pages(data):
                yield relation_block_key(relation, fork, start + block), page
        for (relation, fork), size in sizes.items():
            yield relation_size_key(relation, fork), size.to_bytes(4, "little")


def _read_slrus(directory: Path) -> Iterator[Image]:
    for slru, name in enumerate(SLRU_DIRECTORIES):
        for file in sorted((directory / name).iterdir()):
            if not _SLRU_FILE.match(file.name):
                continue
            segment = int(file.name, 16)
            data = file.read_bytes()
            yield slru_size_key(slru, segment), (len(data) // BLOCK_SIZE_BYTES).to_bytes(4, "little")
            for block, page in _pages(data):
                yield slru_block_key(slru, segment, block), page


def _read_databases(directory: Path) -> Iterator[Image]:
    for path, spc, db in _database_directories(directory):
        if (path / "pg_filenode.map").exists():
            yield make_key(KeyKind.RELATION_MAP, spc, db), (path / "pg_filenode.map").read_bytes()
        if (path / "PG_VERSION").exists():
            yield make_key(KeyKind.DATABASE, spc, db), (path / "PG_VERSION").read_bytes()


def _pages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Block number and content of the pages that are not all zeros."""
    for block in range(len(data) // BLOCK_SIZE_BYTES):
        page = data[block * BLOCK_SIZE_BYTES : (block + 1) * BLOCK_SIZE_BYTES]
        if page != _ZERO_PAGE:
            yield block, page
