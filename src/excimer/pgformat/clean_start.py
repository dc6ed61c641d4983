"""WAL and pg_control with which stock PostgreSQL starts as after a clean shutdown, and redoes nothing.

The shutdown checkpoint is the last record of all, so with pg_control as it was and the page that holds this
record there is nothing to recover: unlogged relations and statistics stay, in all versions, and no
end-of-recovery checkpoint is written. It is what a restart of plain PostgreSQL does.

Not here: starts without a clean shutdown before them (`wal_prefix`).
"""

from typing import NamedTuple

from excimer.base.errors import CorruptionError
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, format_lsn
from excimer.pgformat.control_file import WAL_PAGE_MAGICS, ClusterState, ControlFile
from excimer.pgformat.wal_prefix import WalPrefix
from excimer.pgformat.wal_reader import WalReader
from excimer.pgformat.wal_record import Rmgr, unpack_record_header
from excimer.pgformat.wal_segment import LONG_HEADER, InvalidWalError, PageHeader, pack_page_header

_INFO_MASK = 0xF0
_CHECKPOINT_SHUTDOWN = 0x00
_RECORD_STEP_BYTES = 8
_TIMELINE = 1


class UncleanError(CorruptionError):
    """Not the WAL and pg_control of a cluster that was shut down cleanly."""


class CleanEnd(NamedTuple):
    """The shutdown checkpoint: the last record of a cluster that was shut down."""

    checkpoint_lsn: Lsn
    end_lsn: Lsn


def check_shut_down(control: ControlFile) -> None:
    """Raises `UncleanError`."""
    if control.state != ClusterState.SHUTDOWNED:
        raise UncleanError(f"pg_control does not say that the cluster was shut down: state {control.state}")
    if control.checkpoint.redo != control.checkpoint_lsn:
        raise UncleanError("pg_control's last checkpoint is not the one of a shutdown")


def find_clean_end(control: ControlFile, pg_version: int, wal: bytes) -> CleanEnd:
    """`wal`: bytes from the checkpoint's record on; there may be others behind it. Raises `UncleanError`."""
    check_shut_down(control)
    reader = WalReader(control.checkpoint_lsn, pg_version, control.wal_segment_size)
    try:
        for start in range(0, len(wal), _RECORD_STEP_BYTES):
            records = reader.feed(wal[start : start + _RECORD_STEP_BYTES])
            if records:
                header = unpack_record_header(records[0].data)
                if header.rmgr != Rmgr.XLOG or header.info & _INFO_MASK != _CHECKPOINT_SHUTDOWN:
                    raise UncleanError("the record to which pg_control points is no shutdown checkpoint")
                return CleanEnd(Lsn(control.checkpoint_lsn), records[0].end_lsn)
    except InvalidWalError as error:
        raise UncleanError(f"the shutdown checkpoint cannot be read: {error}") from error
    raise UncleanError("the shutdown checkpoint's record is not whole")


def build_clean_start(
    *, pg_version: int, control_file: bytes, wal_lsn: Lsn, wal: bytes, end_lsn: Lsn
) -> WalPrefix:
    """What to lay so that PostgreSQL starts at `end_lsn`, the end of `wal`, which begins with a page.

    Raises `UncleanError` unless the shutdown checkpoint is the last record of it; `ControlFileError`.
    """
    control = ControlFile.unpack(control_file, pg_version)
    if not wal_lsn <= control.checkpoint_lsn < wal_lsn + len(wal):
        raise UncleanError(
            f"the WAL does not have the checkpoint at {format_lsn(Lsn(control.checkpoint_lsn))}"
        )
    end = find_clean_end(control, pg_version, wal[control.checkpoint_lsn - wal_lsn :])
    if end.end_lsn != end_lsn or wal_lsn + len(wal) != end_lsn or wal_lsn % WAL_PAGE_SIZE_BYTES:
        raise UncleanError(
            f"the shutdown checkpoint ends at {format_lsn(end.end_lsn)}, not {format_lsn(end_lsn)}"
        )
    segment_size = control.wal_segment_size
    chunks: list[tuple[Lsn, bytes]] = []
    first = wal_lsn - wal_lsn % segment_size
    if first != wal_lsn:  # whose header a reader looks at before any other page of the segment
        chunks.append((Lsn(first), plain_page_header(pg_version, control, first)))
    position = int(wal_lsn)
    while position < end_lsn:
        size = min(segment_size - position % segment_size, end_lsn - position)
        chunks.append((Lsn(position), wal[position - wal_lsn : position - wal_lsn + size]))
        position += size
    return WalPrefix(chunks, end.checkpoint_lsn, control_file)


def plain_page_header(pg_version: int, control: ControlFile, lsn: int) -> bytes:
    """Of a page of which only records that begin in it are read."""
    magic, system_id, size = WAL_PAGE_MAGICS[pg_version], control.system_id, control.wal_segment_size
    if lsn % size:
        return pack_page_header(PageHeader(magic, 0, _TIMELINE, lsn, 0))
    return pack_page_header(PageHeader(magic, LONG_HEADER, _TIMELINE, lsn, 0, system_id, size))
