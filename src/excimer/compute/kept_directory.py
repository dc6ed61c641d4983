"""The directory that an endpoint's clean stop leaves, and the record beside it that says so.

::

    postmaster gone, its WAL confirmed --> record written --> record taken away --> postgres started
                                                 |                                       |
                                           the next start decides                  crash: no record

The record is there only while the directory is as PostgreSQL's shutdown left it: it goes before anything
there changes. It lies in the endpoint's own directory, where PostgreSQL's user cannot write. Nothing is
synced: the page cache is as old as the boot that the record names (H3).

Not here: the decision (`warm_start`), how many directories may stay (`kept_space`).
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from excimer.base.errors import CorruptionError
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, format_lsn
from excimer.compute.admission import remove_admission
from excimer.compute.arena import Arena
from excimer.compute.places import ComputePlaces
from excimer.compute.server_certificate import remove_pair
from excimer.compute.spec import ComputeSpec
from excimer.compute.warm_start import FoundDirectory, Owner, ShutdownRecord
from excimer.io.private_files import write_private
from excimer.pgformat.control_file import ClusterState, ControlFile, ControlFileError
from excimer.pgformat.wal_prefix import wal_segment_file_name
from excimer.pgformat.wal_reader import WalReader
from excimer.pgformat.wal_segment import InvalidWalError
from excimer.postgres import PostgresBuild
from excimer.service.logs import get_logger
from excimer.wire.safekeeping import TermStart

BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")
DIRECTORY_ID_NAME: Final = "excimer_directory"
"""In the data directory: which one it is."""
CONTROL_FILE_NAME: Final = "global/pg_control"
REMOVED: Final = "removed-"
"""How names begin of what is being removed."""
DIRECTORY_ID_BYTES: Final = 16
_CHECKPOINT_READ_BYTES: Final = 4 * WAL_PAGE_SIZE_BYTES
"""Far more than the record of a checkpoint, wherever it begins in a page."""

log = get_logger(__name__)


class CleanEnd(NamedTuple):
    """What a quorum had when PostgreSQL had ended by itself."""

    commit_lsn: Lsn
    writer: TermStart | None
    ingested_lsn: Lsn
    """How far the pageserver was, as far as is known."""
    saved_unlogged: bool
    """What was saved at this end has unlogged rows, or may have."""


def owner_of(spec: ComputeSpec) -> Owner:
    """Blocks."""
    return Owner(
        tenant_id=spec.tenant_id,
        timeline_id=spec.timeline_id,
        endpoint=spec.endpoint_name,
        postgres=f"{spec.build.full_version} ({spec.build.identity()})",
        module=str(spec.module),
    )


def read_boot_id() -> str | None:
    """None where the system does not say: then no directory is kept."""
    try:
        return BOOT_ID_PATH.read_text().strip() or None
    except OSError:
        return None


def new_directory_id() -> bytes:
    return secrets.token_bytes(DIRECTORY_ID_BYTES)


def read_record(path: Path) -> ShutdownRecord | None:
    """None when there is none, or none that this version understands."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ShutdownRecord)
    except (OSError, msgspec.MsgspecError):
        return None


def write_record(places: ComputePlaces, record: ShutdownRecord) -> None:
    """The last step of a stop. Whoever reads sees all of it or none."""
    write_private(places.shutdown_record, msgspec.json.encode(record))


def take_record(places: ComputePlaces) -> None:
    """The first step of a start on the directory: from here on a crash leaves none that looks usable."""
    places.shutdown_record.unlink()


def look(places: ComputePlaces) -> FoundDirectory | None:
    """What is there; None: nothing."""
    if not _is_directory(places.data_dir):
        return None
    return FoundDirectory(
        directory_id=_read_directory_id(places.data_dir),
        arena_id=_read_arena_id(places),
        control_digest=control_digest(places.data_dir),
    )


def control_digest(data_dir: Path) -> str | None:
    """Of pg_control; None when it cannot be read."""
    try:
        return hashlib.sha256((data_dir / CONTROL_FILE_NAME).read_bytes()).hexdigest()
    except OSError:
        return None


def why_not_kept(places: ComputePlaces, build: PostgresBuild, end: CleanEnd) -> str | None:
    """Why a directory cannot be used again although PostgreSQL has ended by itself there; None: it can."""
    try:
        content = (places.data_dir / CONTROL_FILE_NAME).read_bytes()
        control = ControlFile.unpack(content, build.version)
        end_lsn = _shutdown_end(places.data_dir, control, build.version)
    except (ControlFileError, InvalidWalError, OSError) as error:
        return str(error)
    if control.state != ClusterState.SHUTDOWNED or end_lsn is None:
        return "PostgreSQL has not written its shutdown's checkpoint"
    if end_lsn != end.commit_lsn or end.writer is None:
        return (
            f"a quorum has its WAL up to {format_lsn(end.commit_lsn)}, and it ends at {format_lsn(end_lsn)}"
        )
    return None


def make_record(
    places: ComputePlaces, owner: Owner, end: CleanEnd, superusers: Sequence[str]
) -> ShutdownRecord | None:
    """Of a directory about which `why_not_kept` has nothing to say; None where nobody could believe it."""
    boot_id, found = read_boot_id(), look(places)
    if boot_id is None or found is None or found.directory_id is None or end.writer is None:
        return None
    if found.arena_id != found.directory_id or found.control_digest is None:
        return None
    return ShutdownRecord(
        boot_id=boot_id,
        owner=owner,
        directory_id=found.directory_id,
        control_digest=found.control_digest,
        end_lsn=end.commit_lsn,
        writer_term=end.writer.term,
        writer_start_lsn=end.writer.start_lsn,
        ingested_lsn=end.ingested_lsn,
        superusers=tuple(superusers),
        stopped_at_s=time.time(),
        size_bytes=disk_usage_bytes(places.run_dir),
        saved_unlogged=end.saved_unlogged,
    )


def discard(places: ComputePlaces, reason: str | None = None) -> None:
    """Removes a directory, what is beside it and its record; at no point does it look usable. Blocks.

    Also what an earlier removal did not finish. The next start tells the `reason`, if it is given one.
    """
    hide(places, reason)
    remove_hidden(places.run_dir)


def hide(places: ComputePlaces, reason: str | None = None) -> None:
    """The quick part of `discard`: nobody finds anything any more, and its place is free."""
    if reason is not None:
        with contextlib.suppress(OSError):  # only a word less to whoever asks
            write_private(places.not_kept, reason.encode())
    places.shutdown_record.unlink(missing_ok=True)
    places.arena.unlink(missing_ok=True)
    remove_lent(places)
    if places.data_dir.is_symlink():
        places.data_dir.unlink()
    elif places.data_dir.exists():
        places.data_dir.rename(places.data_dir.with_name(f"{REMOVED}{secrets.token_hex(8)}"))


def take_reason(places: ComputePlaces) -> str | None:
    """Why the last stop left no directory, told once; None if nothing is known."""
    try:
        reason = places.not_kept.read_text(errors="replace").strip()
        places.not_kept.unlink()
    except OSError:
        return None
    return reason or None


def remove_lent(places: ComputePlaces) -> None:
    """What each start makes anew for its PostgreSQL: the certificate, its key, the door; what it left."""
    remove_pair(places.run_dir)
    remove_admission(places.run_dir)
    places.hot_buffers.unlink(missing_ok=True)


def remove_hidden(run_dir: Path) -> None:
    for path in run_dir.glob(f"{REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)


def disk_usage_bytes(directory: Path) -> int:
    """What all files below it take, holes not counted."""
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
                total += status.st_blocks * 512
                if stat.S_ISDIR(status.st_mode):
                    total += disk_usage_bytes(Path(entry.path))
            except FileNotFoundError:
                continue
    return total


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _read_directory_id(data_dir: Path) -> str | None:
    try:
        return (data_dir / DIRECTORY_ID_NAME).read_text(errors="replace").strip() or None
    except OSError:
        return None


def _read_arena_id(places: ComputePlaces) -> str | None:
    try:
        arena = Arena.open(places.arena)
    except (CorruptionError, OSError, ValueError):  # ValueError: of an empty file
        return None
    try:
        return arena.directory_id.hex() if arena.data_dir == places.data_dir else None
    finally:
        arena.close()


def _shutdown_end(data_dir: Path, control: ControlFile, pg_version: int) -> Lsn | None:
    """Where the last checkpoint's record ends."""
    start_lsn, size = control.checkpoint_lsn, control.wal_segment_size
    reader = WalReader(start_lsn, pg_version, size)
    name = wal_segment_file_name(start_lsn, size)
    with (data_dir / "pg_wal" / name).open("rb") as segment:
        segment.seek(start_lsn % size)
        content = segment.read(_CHECKPOINT_READ_BYTES)
    following = data_dir / "pg_wal" / wal_segment_file_name(start_lsn + size, size)
    if len(content) < _CHECKPOINT_READ_BYTES and following.exists():
        with following.open("rb") as segment:
            content += segment.read(_CHECKPOINT_READ_BYTES)
    # Word by word: what follows the record is none, and the reader would say so.
    for place in range(0, len(content), 8):
        records = reader.feed(content[place : place + 8])
        if records:
            return records[0].end_lsn
    return None
