"""A stopped data directory as an import stream.

Two kinds can be imported: a cluster that was shut down cleanly, and a base backup (backup_label,
backup_manifest, and in pg_wal the WAL that it needs, as pg_basebackup leaves it). Of a backup WAL is
taken up to its end in pg_wal, or up to `--to`. All else is refused, with what to do: a crashed cluster
recovers by itself when PostgreSQL starts it, and then it can be stopped.

Not here: what of the files is kept (`pgformat.cluster_files`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from excimer.base.errors import CorruptionError
from excimer.base.keys import Fork
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn, parse_lsn, record_end
from excimer.cli.import_source import SourceRefusedError, check_target, tar_frames
from excimer.io.cluster_directory import WalMissingError, checkpoint_end, cluster_paths, read_parts, read_wal
from excimer.pgformat.cluster_files import (
    ClusterFileError,
    FileKind,
    identify_file,
    parse_backup_label,
)
from excimer.pgformat.control_file import CONTROL_VERSIONS, ClusterState, ControlFile
from excimer.pgformat.tar_stream import END_OF_TAR, pack_file_header, padding
from excimer.wire.import_stream import (
    FilesEnd,
    ImportBegin,
    encode_begin,
    encode_end,
    encode_files_end,
    encode_wal,
)


class _Start(NamedTuple):
    """Where in the WAL the files are."""

    start_lsn: Lsn
    prev_record_lsn: Lsn
    readable_lsn: Lsn
    postgres_timeline: int
    is_backup: bool


class DirectorySource:
    """An `ImportSource`. Raises `SourceRefusedError` at once for what cannot be imported."""

    def __init__(self, directory: Path, to_lsn: Lsn | None) -> None:
        self._directory = directory
        self._to_lsn = to_lsn
        self.phase = "reading files"
        try:
            self.pg_version = _read_version(directory)
            _check_stopped(directory)
            _check_tablespaces(directory)
            self._control = _read_control_file(directory, self.pg_version)
            self._start = _find_start(directory, self._control, self.pg_version, to_lsn)
            self._files = _list_files(directory)
        except OSError as error:
            raise SourceRefusedError(f"cannot read {error.filename}: {error.strerror}") from error
        except (CorruptionError, ClusterFileError, WalMissingError) as error:
            raise SourceRefusedError(f"{directory}: {error}") from error
        self.total_size_bytes = sum(size for _, size in self._files)

    def frames(self) -> Iterator[bytes]:
        start = self._start
        yield encode_begin(
            ImportBegin(
                pg_version=self.pg_version,
                system_id=self._control.system_id,
                wal_segment_size_bytes=self._control.wal_segment_size,
                start_lsn=start.start_lsn,
                prev_record_lsn=start.prev_record_lsn,
            )
        )
        try:
            yield from tar_frames(self._tar())
            yield encode_files_end(FilesEnd(readable_lsn=start.readable_lsn))
            if start.is_backup:
                self.phase = "reading WAL"
                yield from self._wal()
        except OSError as error:
            raise SourceRefusedError(f"cannot read {error.filename}: {error.strerror}") from error
        yield encode_end()

    def close(self) -> None:
        """Nothing is held open."""

    def _tar(self) -> Iterator[bytes]:
        for path, size in self._files:
            yield pack_file_header(path, size)
            left = size
            for part in read_parts(self._directory / path):
                yield part[:left]
                left = max(0, left - len(part))
            yield bytes(left) + padding(size)
        yield END_OF_TAR

    def _wal(self) -> Iterator[bytes]:
        control, start = self._control, self._start
        for lsn, data in read_wal(
            self._directory,
            start.start_lsn,
            start.postgres_timeline,
            self.pg_version,
            control.wal_segment_size,
        ):
            if self._to_lsn is not None and lsn + len(data) >= self._to_lsn:
                yield encode_wal(lsn, data[: self._to_lsn - lsn])
                return
            yield encode_wal(lsn, data)


def _read_version(directory: Path) -> int:
    try:
        text = (directory / "PG_VERSION").read_text().strip()
    except FileNotFoundError as error:
        raise SourceRefusedError(f"{directory} is not a data directory: it has no PG_VERSION") from error
    if not text.isdigit() or int(text) not in CONTROL_VERSIONS:
        versions = f"{min(CONTROL_VERSIONS)} to {max(CONTROL_VERSIONS)}"
        raise SourceRefusedError(f"{directory} is of PostgreSQL {text}: only {versions} can be imported")
    return int(text)


def _check_stopped(directory: Path) -> None:
    if (directory / "postmaster.pid").exists():
        raise SourceRefusedError(
            f"a server runs in {directory}, or crashed there: stop it with `pg_ctl stop` (after a crash, "
            "start it once before), or import it live with its postgres:// URL"
        )


def _check_tablespaces(directory: Path) -> None:
    places = directory / "pg_tblspc"
    names = sorted(path.name for path in places.iterdir()) if places.is_dir() else []
    if names or (directory / "tablespace_map").exists():
        raise SourceRefusedError(
            f"the cluster has tablespaces ({', '.join(names)}), which Excimer's computes do not have: "
            "move what is in them to pg_default, and drop them"
        )


def _read_control_file(directory: Path, pg_version: int) -> ControlFile:
    return ControlFile.unpack((directory / "global/pg_control").read_bytes(), pg_version)


def _find_start(directory: Path, control: ControlFile, pg_version: int, to_lsn: Lsn | None) -> _Start:
    label_path = directory / "backup_label"
    if label_path.exists():
        label = parse_backup_label(label_path.read_text())
        readable_lsn = _backup_end(directory, label.postgres_timeline)
        check_target(to_lsn, readable_lsn)
        start_lsn = record_end(label.start_lsn, control.wal_segment_size)
        return _Start(start_lsn, INVALID_LSN, readable_lsn, label.postgres_timeline, True)
    if control.state != ClusterState.SHUTDOWNED:
        state = ClusterState(control.state).name.lower().replace("_", " ")
        raise SourceRefusedError(
            f"the cluster in {directory} was not shut down cleanly (its state is: {state}) and is no backup: "
            "start PostgreSQL on it and stop it (a fresh `excimer export` needs that too: "
            f"`excimer pg exec {pg_version} pg_ctl -D {directory} -w start`, then stop), or take a backup "
            "with pg_basebackup"
        )
    end_lsn = checkpoint_end(directory, control, pg_version)
    if to_lsn is not None and to_lsn != end_lsn:
        raise SourceRefusedError(
            f"a stopped cluster is imported as of its end, {format_lsn(end_lsn)}: leave out --to"
        )
    return _Start(end_lsn, Lsn(control.checkpoint_lsn), end_lsn, control.checkpoint.timeline, False)


def _backup_end(directory: Path, postgres_timeline: int) -> Lsn:
    """From backup_manifest: nothing else in a backup's directory says where it is consistent."""
    try:
        ranges = json.loads((directory / "backup_manifest").read_bytes())["WAL-Ranges"]
        found = [(each["Timeline"], parse_lsn(each["End-LSN"])) for each in ranges]
    except FileNotFoundError as error:
        raise SourceRefusedError(
            f"the backup in {directory} has no backup_manifest, which says where it is consistent: "
            "start PostgreSQL on it and stop it, then import"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SourceRefusedError(f"{directory}/backup_manifest cannot be understood: {error}") from error
    if [timeline for timeline, _ in found] != [postgres_timeline]:
        raise SourceRefusedError(
            "the backup's WAL crosses from one PostgreSQL timeline to another: "
            "start PostgreSQL on it and stop it, then import"
        )
    return found[0][1]


def _list_files(directory: Path) -> list[tuple[str, int]]:
    """Paths and sizes of what is imported: of unlogged relations only the init forks."""
    wanted = [(path, file) for path in cluster_paths(directory) if (file := identify_file(path)) is not None]
    unlogged = {
        file.relation for _, file in wanted if file.kind is FileKind.RELATION and file.fork == Fork.INIT
    }
    return [
        (path, (directory / path).stat().st_size)
        for path, file in wanted
        if file.kind is not FileKind.RELATION or file.fork == Fork.INIT or file.relation not in unlogged
    ]
