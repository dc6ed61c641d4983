"""What an exported data directory holds: decided from a basebackup, without I/O.

The order of writing is the order in which a crash may cut it off: folders, small files, WAL, then the
files of pages, and `global/pg_control` last of all. PostgreSQL refuses a directory without it, so
half an export is never mistaken for a cluster.

PostgreSQL starts it as it starts after a crash: the WAL prefix of `pgformat.wal_prefix` is a checkpoint
and one empty record. Recovery of that record resets the unlogged relations from their init forks, takes
up prepared transactions and writes the first real checkpoint.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from excimer.base.keys import (
    SEGMENT_BLOCKS,
    SLRU_DIRECTORIES,
    Relation,
    make_key,
    parse_key,
    relation_block_key,
    relation_path,
    slru_block_key,
)
from excimer.base.lsn import Lsn
from excimer.compute.data_directory import FIXED_DIRECTORIES
from excimer.export.cluster_settings import HBA, IDENT, postgresql_conf
from excimer.pgformat.basebackup import Basebackup, unpack_relation_forks, unpack_slru_segments
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.wal_prefix import build_wal_prefix, wal_segment_file_name

CONTROL_FILE_PATH = "global/pg_control"
WAL_SUMMARIES = "pg_wal/summaries"
WAL_SUMMARIES_SINCE = 17


class PageFile(NamedTuple):
    """A segment of a relation's fork or of an SLRU: `blocks` adjacent blocks from the key on."""

    path: str
    key: bytes
    blocks: int


class PageRun(NamedTuple):
    """Adjacent blocks read with one request."""

    key: bytes
    blocks: int


class WalSegment(NamedTuple):
    """A file of WAL, all zeros but for the chunks (offset, bytes), which are in order."""

    path: str
    size_bytes: int
    chunks: list[tuple[int, bytes]]


class ExportLayout(NamedTuple):
    directories: list[str]
    """Parents before their children."""
    files: list[tuple[str, bytes]]
    wal: list[WalSegment]
    page_files: list[PageFile]
    control_file: bytes

    @property
    def page_count(self) -> int:
        return sum(file.blocks for file in self.page_files)


def plan_export(backup: Basebackup, now_s: int) -> ExportLayout:
    """The layout of a cluster at the basebackup's LSN."""
    control = ControlFile.unpack(backup.control_file, backup.pg_version)
    prefix = build_wal_prefix(
        pg_version=backup.pg_version,
        template=control,
        checkpoint=CheckPoint.unpack(backup.checkpoint),
        end_lsn=Lsn(backup.lsn),
        prev_lsn=Lsn(backup.prev_lsn),
        now_s=now_s,
    )
    configuration = postgresql_conf(
        control, Lsn(backup.lsn), pg_version=backup.pg_version, origin_count=backup.origin_count
    )
    files = [
        ("PG_VERSION", f"{backup.pg_version}\n".encode()),
        ("postgresql.conf", configuration.encode()),
        ("postgresql.auto.conf", b""),
        ("pg_hba.conf", HBA.encode()),
        ("pg_ident.conf", IDENT.encode()),
        *backup.files,
    ]
    page_files = list(page_files_of(backup))
    paths = [path for path, _ in files] + [file.path for file in page_files]
    return ExportLayout(
        directories=_directories(backup.pg_version, paths),
        files=files,
        wal=_wal_segments(prefix.chunks, control.wal_segment_size),
        page_files=page_files,
        control_file=prefix.control_file,
    )


def page_runs(file: PageFile, blocks_max: int) -> Iterator[PageRun]:
    """The file in pieces that one request each may ask for, first block first."""
    kind, spc, db, rel, fork, first = parse_key(file.key)
    for start in range(0, file.blocks, blocks_max):
        key = make_key(kind, spc, db, rel, fork, first + start)
        yield PageRun(key, min(blocks_max, file.blocks - start))


def _directories(pg_version: int, paths: list[str]) -> list[str]:
    found = {name for name in FIXED_DIRECTORIES if name != WAL_SUMMARIES or pg_version >= WAL_SUMMARIES_SINCE}
    for path in paths:
        while "/" in path:
            path = path.rpartition("/")[0]
            found.add(path)
    return sorted(found)


def _wal_segments(chunks: list[tuple[Lsn, bytes]], segment_size: int) -> list[WalSegment]:
    segments: dict[str, dict[int, bytes]] = defaultdict(dict)
    for lsn, data in chunks:  # of two headers of one page, the later one knows of the record that crosses it
        segments[wal_segment_file_name(lsn, segment_size)][lsn % segment_size] = data
    return [
        WalSegment(f"pg_wal/{name}", segment_size, sorted(placed.items()))
        for name, placed in sorted(segments.items())
    ]


def page_files_of(backup: Basebackup) -> Iterator[PageFile]:
    """Every file of pages, as the basebackup's manifest has it; one without blocks for an empty fork."""
    for spc, db, rel, fork, blocks in unpack_relation_forks(backup.relation_forks):
        relation = Relation(spc, db, rel)
        for start in range(0, max(blocks, 1), SEGMENT_BLOCKS):
            path = relation_path(relation, fork, start // SEGMENT_BLOCKS)
            key = relation_block_key(relation, fork, start)
            yield PageFile(path, key, min(blocks - start, SEGMENT_BLOCKS))
    for slru, segment, blocks in unpack_slru_segments(backup.slru_segments):
        path = f"{SLRU_DIRECTORIES[slru]}/{segment:04X}"
        yield PageFile(path, slru_block_key(slru, segment, 0), blocks)
