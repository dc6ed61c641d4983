"""The data directory of a starting compute: what it must hold, and writing it.

Planned from a basebackup without I/O, then written in one go. Almost nothing is written: folders,
small files, the two or three WAL pages of the prefix, and the pages the basebackup carries inline.
Every other block of every relation is only an entry in the arena, from which libhydrate makes the
file when PostgreSQL first opens it.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from excimer.base.keys import (
    SEGMENT_BLOCKS,
    SLRU_DIRECTORIES,
    KeyKind,
    Relation,
    parse_key,
    relation_path,
)
from excimer.base.lsn import Lsn
from excimer.io.processes import give_to_user
from excimer.pgformat import wal_summary
from excimer.pgformat.basebackup import Basebackup, unpack_relation_forks, unpack_slru_segments
from excimer.pgformat.cluster_paths import check_relative_path
from excimer.pgformat.saved_state import StateFork
from excimer.pgformat.wal_prefix import WalPrefix, wal_segment_file_name

FIXED_DIRECTORIES = (
    "base",
    "global",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal",
    "pg_wal/archive_status",
    wal_summary.SUMMARIES_DIRECTORY,
    "pg_xact",
)


class Configuration(NamedTuple):
    """Texts of PostgreSQL's two files: ours, and the endpoint's own list, which wins."""

    postgresql_conf: str
    auto_conf: str


class LazyFile(NamedTuple):
    """A file that PostgreSQL finds in the directory although only the arena knows it."""

    path: str
    blocks: int


class InlineRun(NamedTuple):
    """Adjacent pages of one file that are written at once and marked present."""

    path: str
    block: int
    data: bytes


class Carried(NamedTuple):
    """What a saved state adds to a basebackup."""

    files: list[tuple[str, bytes]]
    partial: list[StateFork]
    """Forks of which some blocks still come from the page store."""

    def with_slots(self, files: Sequence[tuple[str, bytes]]) -> "Carried":
        """The same with these files of replication slots, in place of all slots that it has."""
        names = {path for path, _ in files}
        others = [
            (path, content)
            for path, content in self.files
            if not path.startswith("pg_replslot/") and path not in names
        ]
        return Carried(others + list(files), self.partial)


NOTHING_CARRIED = Carried([], [])


class DataDirectoryPlan(NamedTuple):
    directories: list[str]
    files: list[tuple[str, bytes]]
    wal: list[tuple[str, int, bytes]]
    """(segment file name, offset, bytes)"""
    lazy_files: list[LazyFile]
    inline_runs: list[InlineRun]


def plan_data_directory(
    backup: Basebackup,
    prefix: WalPrefix,
    configuration: Sequence[tuple[str, bytes]],
    wal_segment_size: int,
    *,
    hot_standby: bool,
    carried: Carried = NOTHING_CARRIED,
) -> DataDirectoryPlan:
    """What to write. Raises ValueError when the basebackup names a relation in a user tablespace.

    `configuration` holds postgresql.conf and the files beside it, by name. What is `carried` takes the place
    of what the basebackup says of the same file.
    """
    files = [
        ("PG_VERSION", f"{backup.pg_version}\n".encode()),
        *configuration,
        ("global/pg_control", prefix.control_file),
        *backup.files,
        *carried.files,
    ]
    if hot_standby:
        files.append(("standby.signal", b""))
    if backup.pg_version >= wal_summary.FIRST_VERSION:
        files.append(wal_summary.start_summary(Lsn(backup.lsn)))
    replaced = {path for path, _ in carried.files} | {fork.path for fork in carried.partial}
    lazy_files = [file for file in _lazy_files(backup) if file.path not in replaced]
    lazy_files += [LazyFile(fork.path, fork.blocks) for fork in carried.partial]
    inline_runs = [run for run in _inline_runs(backup) if run.path not in replaced]
    inline_runs += [
        InlineRun(fork.path, run.block, run.data) for fork in carried.partial for run in fork.runs
    ]
    named = (*(path for path, _ in files), *(file.path for file in lazy_files))
    folders = {path.rpartition("/")[0] for path in named}
    directories = list(FIXED_DIRECTORIES) + sorted(folders - set(FIXED_DIRECTORIES) - {""})
    wal = [
        (wal_segment_file_name(lsn, wal_segment_size), lsn % wal_segment_size, data)
        for lsn, data in prefix.chunks
    ]
    return DataDirectoryPlan(directories, files, wal, lazy_files, inline_runs)


def write_data_directory(root: Path, plan: DataDirectoryPlan, wal_segment_size: int) -> None:
    """Makes `root` with everything but the lazy files and inline pages (the arena's business).

    All of it belongs to PostgreSQL's user. Nothing is synced: a directory that does not survive is
    made anew (H2). Raises OSError, FileExistsError when `root` is there already, and `UnsafePathError` before
    anything is written when a path would lead out of it.
    """
    paths = [*plan.directories, *(path for path, _ in plan.files)]
    for path in [*paths, *(file.path for file in plan.lazy_files), *(run.path for run in plan.inline_runs)]:
        check_relative_path(path)
    for directory in [root, *(root / name for name in plan.directories)]:
        directory.mkdir(mode=0o700)
        give_to_user(directory)
    for path, content in plan.files:
        write_private(root / path, content)
    segments: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
    for name, offset, data in plan.wal:
        segments[name].append((offset, data))
    for name, chunks in segments.items():
        segment_path = root / "pg_wal" / name
        with segment_path.open("wb") as segment:
            segment.truncate(wal_segment_size)
            for offset, data in chunks:
                segment.seek(offset)
                segment.write(data)
        give_to_user(segment_path)


def write_private(path: Path, content: bytes) -> None:
    """A file that only PostgreSQL's user can ever read; one that is there is replaced."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
    give_to_user(new)
    new.replace(path)


def lazy_path(key: bytes) -> tuple[str, int]:
    """The file that holds a page's key, and the block's number within that file."""
    fields = parse_key(key)
    if fields.kind == KeyKind.SLRU_BLOCK:
        return _slru_path(fields.spc, fields.rel), fields.block
    segment, block = divmod(fields.block, SEGMENT_BLOCKS)
    return relation_path(Relation(fields.spc, fields.db, fields.rel), fields.fork, segment), block


def _lazy_files(backup: Basebackup) -> list[LazyFile]:
    files = []
    for spc, db, rel, fork, blocks in unpack_relation_forks(backup.relation_forks):
        relation = Relation(spc, db, rel)
        for segment in range(blocks // SEGMENT_BLOCKS):
            files.append(LazyFile(relation_path(relation, fork, segment), SEGMENT_BLOCKS))
        segment, left = divmod(blocks, SEGMENT_BLOCKS)
        if left or not blocks:
            files.append(LazyFile(relation_path(relation, fork, segment), left))
    for slru, segment, blocks in unpack_slru_segments(backup.slru_segments):
        files.append(LazyFile(_slru_path(slru, segment), blocks))
    return files


def _slru_path(slru: int, segment: int) -> str:
    return f"{SLRU_DIRECTORIES[slru]}/{segment:04X}"


def _inline_runs(backup: Basebackup) -> list[InlineRun]:
    """Pages of the basebackup, neighbours joined."""
    placed = sorted((*lazy_path(page.key), page.page) for page in backup.pages)
    runs: list[InlineRun] = []
    pending: list[bytes] = []
    for index, (path, block, page) in enumerate(placed):
        pending.append(page)
        following = placed[index + 1] if index + 1 < len(placed) else None
        if following is None or following[:2] != (path, block + 1):
            runs.append(InlineRun(path, block - len(pending) + 1, b"".join(pending)))
            pending = []
    return runs
