"""A cluster's directory split in two: what a compute starts with, and what a page server serves.

Stands in for basebackup and page server together: a *stopped* plain cluster is the truth, `split_cluster`
copies its small files and lists its relations and SLRU segments in an arena.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.compute.arena import Arena, ArenaFile, ArenaSettings, build_arena
from excimer.io.processes import give_to_user
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.wal_prefix import wal_segment_file_name

RELATION_FILE = re.compile(r"(base/\d+|global)/\d+(_fsm|_vm|_init)?(\.\d+)?\Z")
SLRU_FILE = re.compile(r"(pg_xact|pg_multixact/offsets|pg_multixact/members|pg_commit_ts)/[0-9A-F]{4,}\Z")
NOT_COPIED = re.compile(r"(postmaster\.(pid|opts)|.*/pg_internal\.init.*|pg_wal/[0-9A-F]{24}|pg_stat/.*)\Z")


def cluster_files(directory: Path) -> Iterator[str]:
    """Relative paths of all files."""
    for folder, _, names in os.walk(directory):
        for name in names:
            yield str((Path(folder) / name).relative_to(directory))


def split_cluster(source: Path, data_dir: Path, arena_path: Path, settings: ArenaSettings) -> Arena:
    """Builds `data_dir` and its arena from a stopped cluster; its last WAL segment comes along."""
    files: list[ArenaFile] = []
    for folder, _, _ in os.walk(source):
        (data_dir / Path(folder).relative_to(source)).mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in cluster_files(source):
        if RELATION_FILE.match(path) or SLRU_FILE.match(path):
            files.append(ArenaFile(path, (source / path).stat().st_size // BLOCK_SIZE_BYTES))
        elif not NOT_COPIED.match(path):
            shutil.copyfile(source / path, data_dir / path)
            (data_dir / path).chmod(0o600)
    segment = last_wal_segment(source)
    shutil.copyfile(source / "pg_wal" / segment, data_dir / "pg_wal" / segment)
    for folder, _, names in os.walk(data_dir):
        for name in ["", *names]:
            give_to_user(Path(folder) / name)
    return build_arena(arena_path, files=files, settings=settings, data_dir=data_dir)


def last_wal_segment(source: Path) -> str:
    """The one with the shutdown checkpoint, all that a start reads; recycled ones have later names."""
    version = int((source / "PG_VERSION").read_text())
    control = ControlFile.unpack((source / "global/pg_control").read_bytes(), version)
    return wal_segment_file_name(control.checkpoint_lsn, control.wal_segment_size)
