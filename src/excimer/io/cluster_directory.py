"""A stopped cluster's data directory: its files in a useful order, their bytes, and its WAL.

All calls block. Errors of the file system pass as OSError; of the WAL as `InvalidWalError`.

Not here: what the files mean (`pgformat.cluster_files`).
"""

from collections.abc import Iterator
from pathlib import Path

from excimer._native.wal_scanner import WalScanner
from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn, format_lsn
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.wal_segment import InvalidWalError, segment_name

READ_SIZE_BYTES = 1 << 20
_SKIPPED_DIRECTORIES = frozenset(("pg_wal", "pg_tblspc", "pgsql_tmp", "pg_stat_tmp", "pg_dynshmem"))
_CONTROL_FILE = "global/pg_control"


class WalMissingError(RefusedError):
    """WAL without which the cluster is not consistent is not in pg_wal."""


def cluster_paths(directory: Path) -> Iterator[str]:
    """Relative paths of all plain files that may matter; pg_control first: it says whether to go on."""
    yield _CONTROL_FILE
    for path in _files(directory, ""):
        if path != _CONTROL_FILE:
            yield path


def _files(directory: Path, below: str) -> Iterator[str]:
    for entry in sorted((directory / below).iterdir()):
        path = f"{below}{entry.name}"
        if entry.is_dir():
            if entry.name not in _SKIPPED_DIRECTORIES:
                yield from _files(directory, f"{path}/")
        elif entry.is_file():
            yield path


def read_parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(READ_SIZE_BYTES):
            yield part


def checkpoint_end(directory: Path, control: ControlFile, pg_version: int) -> Lsn:
    """End of the record of pg_control's checkpoint. Raises `WalMissingError`, `InvalidWalError`.

    Read in steps of 8 bytes, for what follows the record is not WAL.
    """
    segment_size = control.wal_segment_size
    lsn = control.checkpoint_lsn
    scanner = WalScanner(lsn, pg_version, segment_size)
    number, offset = divmod(lsn, segment_size)
    for segment in (number, number + 1):
        path = directory / "pg_wal" / segment_name(control.checkpoint.timeline, segment, segment_size)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                while step := file.read(8):
                    scanner.feed(step)
                    if scanner.record_count:
                        return scanner.last_record_end
        except FileNotFoundError as error:
            raise WalMissingError(f"{path} with the last checkpoint is missing") from error
        offset = 0
    raise WalMissingError(f"no checkpoint record at {format_lsn(lsn)} in {directory}")


def read_wal(
    directory: Path, start_lsn: Lsn, postgres_timeline: int, pg_version: int, segment_size: int
) -> Iterator[tuple[Lsn, bytes]]:
    """WAL from the record end `start_lsn` up to the end of the last whole record that is there."""
    scanner = WalScanner(start_lsn, pg_version, segment_size)
    lsn = start_lsn
    for part in _wal_bytes(directory, start_lsn, postgres_timeline, segment_size):
        try:
            scanner.feed(part)
        except InvalidWalError:
            part = part[: max(0, scanner.last_record_end - lsn)]
            if part:
                yield lsn, part
            return
        yield lsn, part
        lsn = Lsn(lsn + len(part))


def _wal_bytes(directory: Path, start_lsn: Lsn, postgres_timeline: int, segment_size: int) -> Iterator[bytes]:
    number, offset = divmod(start_lsn, segment_size)
    while True:
        path = directory / "pg_wal" / segment_name(postgres_timeline, number, segment_size)
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(offset)
            while part := file.read(READ_SIZE_BYTES):
                yield part
        number, offset = number + 1, 0
