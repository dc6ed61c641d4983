"""The WAL that replication slots need, in a directory that begins after a crash.

Such a directory has no WAL but a prefix of our making, with which PostgreSQL begins at the end of WAL
(`pgformat.wal_prefix`). Decoding needs the real one, from the oldest restart LSN on::

    restart LSN                                      C        E = end of WAL
    | real WAL, from safekeepers                     | prefix | PostgreSQL's own
                                                     |<------>| real bytes, put back once PostgreSQL
                                                                writes beyond the page of E

PostgreSQL has read the prefix then and never does so again; but it has the last page of it in memory, and
writes that as a whole until the page is full. Nobody is let in before the real bytes are in place.

From the same WAL come the mappings that a rewrite of a catalog leaves (pg_logical/mappings), which redo would
make: PostgreSQL logs all of them, and keeps none that is older than the oldest restart LSN.

Not here: which slots there are (`slot_keeper`).
"""

import asyncio
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from excimer.base.errors import RetryableError
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, format_lsn, parse_lsn
from excimer.compute.proposer import PostgresAddress
from excimer.compute.start_session import connect_at_start
from excimer.compute.state_collection import LocalWal
from excimer.compute.wal_source import WalRemovedError, WalSource, open_stream
from excimer.io.processes import give_to_user
from excimer.pgformat.clean_start import plain_page_header
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.kept_slots import KeptSlot, KeptSlots, snapshot_path
from excimer.pgformat.rewrite_mappings import find_mappings
from excimer.pgformat.wal_prefix import wal_segment_file_name
from excimer.service.logs import get_logger

FOLDER_NAME: Final = "slot_wal"
"""Beside the data directory, until that is laid."""
STALL_S: Final = 30.0
PAGE_FILL_RECORDS: Final = 90
"""Restore points of 104 bytes: more than a page."""
FILLS_MAX: Final = 4
_MAGIC_BYTES: Final = 2

log = get_logger(__name__)


class WalStalledError(RetryableError):
    """A safekeeper sends no more of the WAL that slots need."""


class Range(NamedTuple):
    start_lsn: Lsn
    end_lsn: Lsn


class SlotWal(NamedTuple):
    """On the disk, whole, up to the end of WAL."""

    folder: Path
    start_lsn: Lsn
    """A page; the end of WAL if no slot needs more than there is."""
    end_lsn: Lsn
    files: list[tuple[str, bytes]]
    """What belongs to the slots beside it: states, snapshots, mappings."""
    lost: list[KeptSlot]
    """Whose WAL no safekeeper has any more."""


class ReplacedWal(NamedTuple):
    """Real bytes in whose place the prefix lies."""

    chunks: list[tuple[Path, int, bytes]]
    """(segment, offset, bytes)"""
    page_end_lsn: Lsn
    """PostgreSQL writes no page below again once it has written so far."""


async def fetch_slot_wal(
    source: WalSource, kept: KeptSlots, own: Range, run_dir: Path, control: ControlFile
) -> SlotWal:
    """What the slots need, into a folder of its own in `run_dir`. `own`: real WAL that is at hand anyway.

    Raises `NoWalSourceError`, `WalStalledError`, OSError.
    """
    folder, size, end_lsn = run_dir / FOLDER_NAME, control.wal_segment_size, own.end_lsn
    slots = sorted(kept.parsed(), key=lambda pair: pair[0].restart_lsn if pair[0].needs_wal else end_lsn)
    lost: list[KeptSlot] = []
    while True:
        await asyncio.to_thread(_empty, folder)
        first_lsn = min((slot.restart_lsn for slot, _ in slots if slot.needs_wal), default=end_lsn)
        start_lsn = Lsn(first_lsn - first_lsn % WAL_PAGE_SIZE_BYTES) if first_lsn < own.start_lsn else end_lsn
        try:
            await _fetch(source, folder, start_lsn, end_lsn, kept.pg_version, control)
            break
        except WalRemovedError as error:
            slot, file = slots.pop(0)
            lost.append(file)
            log.warning("a replication slot is gone: its WAL is", slot=slot.name, reason=str(error))
    files = []
    for slot, file in slots:
        files.append((f"pg_replslot/{slot.name}/state", file.state))
        if file.snapshot is not None and (snapshot_path(slot.restart_lsn), file.snapshot) not in files:
            files.append((snapshot_path(slot.restart_lsn), file.snapshot))
    if any(slot.is_logical for slot, _ in slots):
        read = LocalWal(folder, size).read
        files += await asyncio.to_thread(_mappings, read, start_lsn, end_lsn, kept.pg_version, size)
    return SlotWal(folder, start_lsn, end_lsn, files, lost)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    give_to_user(folder)


async def _fetch(
    source: WalSource, folder: Path, start_lsn: Lsn, end_lsn: Lsn, pg_version: int, control: ControlFile
) -> None:
    if start_lsn >= end_lsn:
        return
    size = control.wal_segment_size
    segment_lsn = start_lsn - start_lsn % size
    if segment_lsn != start_lsn:  # whose header a reader looks at before any other page of the segment
        header = plain_page_header(pg_version, control, segment_lsn)
        await asyncio.to_thread(_write, folder, size, segment_lsn, header)
    async with source.connected() as sources:
        used, stream = await open_stream(sources, start_lsn)
        position = start_lsn
        while position < end_lsn:
            try:
                async with asyncio.timeout(STALL_S):
                    data = (await stream.next_chunk()).data[: end_lsn - position]
            except TimeoutError as error:
                raise WalStalledError(f"no WAL came from {format_lsn(position)} on") from error
            await asyncio.to_thread(_write, folder, size, position, data)
            position = Lsn(position + len(data))
        # What it has not told a safekeeper of holds WAL there for a minute.
        used.client.report(write_lsn=position, flush_lsn=position, apply_lsn=position)
    first_page = LocalWal(folder, size).read(start_lsn, _MAGIC_BYTES)
    if not any(first_page):  # of before the branch's own WAL there are only zeros
        header = plain_page_header(pg_version, control, start_lsn)
        await asyncio.to_thread(_write, folder, size, start_lsn, header)
    log.info(
        "WAL that replication slots need is here", from_lsn=format_lsn(start_lsn), bytes=end_lsn - start_lsn
    )


def _write(folder: Path, segment_size: int, lsn: int, data: bytes) -> None:
    while data:
        offset = lsn % segment_size
        path = folder / wal_segment_file_name(lsn, segment_size)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, segment_size)
            part = data[: segment_size - offset]
            _write_at(descriptor, part, offset)
        finally:
            os.close(descriptor)
        lsn, data = lsn + len(part), data[len(part) :]


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _mappings(read: object, start: int, end: int, version: int, size: int) -> list[tuple[str, bytes]]:
    files: dict[str, bytearray] = {}
    for part in find_mappings(read, start, end, version, size):  # type: ignore[arg-type]
        content = files.setdefault(part.path, bytearray())
        del content[part.offset :]
        content += bytes(part.offset - len(content)) + part.data
    return [(path, bytes(content)) for path, content in files.items()]


def lay_slot_wal(
    data_dir: Path, wal: SlotWal, made: Iterable[tuple[Lsn, bytes]], segment_size: int
) -> ReplacedWal:
    """Puts the WAL into a directory that has been laid, under what was `made` there of a prefix.

    Blocks. Raises OSError.
    """
    end_lsn = wal.end_lsn
    page_end_lsn = Lsn(-(-end_lsn // WAL_PAGE_SIZE_BYTES) * WAL_PAGE_SIZE_BYTES)
    replaced: list[tuple[Path, int, bytes]] = []
    if wal.start_lsn >= end_lsn:
        shutil.rmtree(wal.folder)
        return ReplacedWal(replaced, page_end_lsn)
    for lsn, data in made:
        replaced += _lay_chunk(data_dir / "pg_wal", wal, lsn, data, segment_size)
    for path in sorted(wal.folder.iterdir()):
        give_to_user(path)
        path.replace(data_dir / "pg_wal" / path.name)
    wal.folder.rmdir()
    return ReplacedWal(replaced, page_end_lsn)


def _lay_chunk(
    pg_wal: Path, wal: SlotWal, lsn: int, data: bytes, segment_size: int
) -> Iterable[tuple[Path, int, bytes]]:
    """A chunk lies within one segment."""
    name, offset = wal_segment_file_name(lsn, segment_size), lsn % segment_size
    path = wal.folder / name
    if not path.exists():  # the prefix begins before the WAL that is needed
        return
    with path.open("r+b") as segment:
        segment.seek(offset)
        before = segment.read(len(data))
        segment.seek(offset)
        segment.write(data)
    skipped = max(0, wal.start_lsn - lsn)
    if skipped < len(data):
        yield pg_wal / name, offset + skipped, before[skipped:]


async def put_back(replaced: ReplacedWal, address: PostgresAddress) -> None:
    """The real bytes, once PostgreSQL will not write over them; commits must be confirmed meanwhile.

    Raises PostgresError, `ReplicationLostError`, OSError.
    """
    if not replaced.chunks:
        return
    client = await connect_at_start(address)
    try:
        await client.query("SET log_min_messages = 'panic'")  # each restore point is a line otherwise
        for _ in range(FILLS_MAX):
            rows = await client.query("SELECT pg_catalog.pg_current_wal_lsn()")
            assert rows[0][0] is not None
            if parse_lsn(rows[0][0].decode()) >= replaced.page_end_lsn:
                break
            await client.query(
                "SELECT pg_catalog.pg_current_xact_id(), pg_catalog.pg_create_restore_point('excimer_start') "
                f"FROM pg_catalog.generate_series(1, {PAGE_FILL_RECORDS})"
            )
        else:
            raise WalStalledError("PostgreSQL has written no more WAL")
    finally:
        client.close()
    await asyncio.to_thread(write_back, replaced)


def write_back(replaced: ReplacedWal) -> None:
    for path, offset, data in replaced.chunks:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write_at(descriptor, data, offset)
        finally:
            os.close(descriptor)
