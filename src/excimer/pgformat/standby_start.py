"""Where in a branch's WAL a standby can begin: where it learns what transactions run, and who locks.

A standby opens once it knows which transactions are under way. WAL says so in two kinds of record: a snapshot
of all that run (RUNNING_XACTS, which a primary writes every fifteen seconds that it is used, and at
checkpoints), and a shutdown checkpoint, at which none does. What locks tables then stands in LOCK records
shortly before a snapshot::

    … | snapshot | … | LOCK | … | LOCK | … | snapshot | … | end
                     ^ a standby begins here

So it begins at the first LOCK record after the last snapshot but one, or at the last snapshot if there is
none. A shutdown checkpoint needs nothing before it.

Only headers are looked at: this is committed WAL, whose checksums the safekeepers have seen.
Source: LogStandbySnapshot, ProcArrayApplyRecoveryInfo, xlog_redo; xl_running_xacts in standbydefs.h.

Not here: reading WAL (`excimer.compute.replica_start`), the files of a start (`wal_prefix`).
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

import msgspec

from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, align_lsn, record_start
from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.checkpoint_state import ClusterSettings
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.wal_record import RECORD_HEADER_SIZE_BYTES, Rmgr
from excimer.pgformat.wal_segment import (
    CONTINUES_RECORD,
    OVERWRITES_RECORD,
    InvalidWalError,
    PageHeader,
    unpack_page_header,
)

_SWITCH: Final = 0x40
_SHUTDOWN_CHECKPOINT: Final = 0x00
_PARAMETER_CHANGE: Final = 0x60
_LOCK: Final = 0x00
_RUNNING_XACTS: Final = 0x10
_LONG_DATA: Final = 254

_CONTROL_FIELDS: Final = {
    "max_prepared_transactions": "max_prepared_xacts",
    "max_locks_per_transaction": "max_locks_per_xact",
}
"""Settings whose copies have other names."""

_HEADER = struct.Struct("<IIQBB2xI")
_RUNNING = struct.Struct("<ii?3xIII")
_PAGE_HEADER_BYTES_MAX: Final = 40


PrimaryLimits = Mapping[str, int]
"""Settings of a primary, by name, than which its standbys must not have less."""


class StandbyStart(NamedTuple):
    lsn: Lsn
    """Start of the first record that is to be replayed."""
    previous_lsn: Lsn
    """Start of the record before it."""
    oldest_active_xid: int
    """No transaction that runs at the snapshot is older; 0: no older one than the next that begins."""
    is_sure: bool
    """All LOCK records that belong to the snapshot have been seen."""
    limits: PrimaryLimits
    """The greatest that the WAL asks for; empty: it says nothing of them."""


class _Found(NamedTuple):
    lsn: int
    previous_lsn: int
    rmgr: int
    info: int
    data: bytes
    """Main data of the kinds that are looked into; else empty."""


def find_standby_start(
    wal: bytes, start_lsn: Lsn, pg_version: int, segment_size_bytes: int, *, is_record_end: bool
) -> StandbyStart | None:
    """The last place in `wal`, which ends with a record, where a standby can begin; None: there is none.

    `wal` begins at `start_lsn`: behind a record (`is_record_end`: nothing before matters), or where a page
    begins. Raises `InvalidWalError`.
    """
    first_lock: _Found | None = None
    best: StandbyStart | None = None
    is_whole = is_record_end
    limits: dict[str, int] = {}
    for found in _Walk(wal, start_lsn, pg_version, segment_size_bytes, is_record_end).records():
        kind = found.rmgr, found.info & 0xF0
        if kind == (Rmgr.STANDBY, _LOCK):
            first_lock = first_lock or found
        elif kind == (Rmgr.XLOG, _PARAMETER_CHANGE):
            asked = limits_of(ClusterSettings.unpack(found.data))
            limits = {name: max(value, limits.get(name, 0)) for name, value in asked.items()}
        elif kind == (Rmgr.XLOG, _SHUTDOWN_CHECKPOINT):
            best = StandbyStart(Lsn(found.lsn), Lsn(found.previous_lsn), 0, True, {})
            first_lock, is_whole = None, True
        elif kind == (Rmgr.STANDBY, _RUNNING_XACTS):
            begin = first_lock or found
            oldest_xid = _RUNNING.unpack_from(found.data)[4]
            best = StandbyStart(Lsn(begin.lsn), Lsn(begin.previous_lsn), oldest_xid, is_whole, {})
            first_lock, is_whole = None, True
    return None if best is None else best._replace(limits=limits)


def limits_of(settings: ClusterSettings) -> PrimaryLimits:
    return {
        "max_connections": settings.max_connections,
        "max_worker_processes": settings.max_worker_processes,
        "max_wal_senders": settings.max_wal_senders,
        "max_prepared_transactions": settings.max_prepared_xacts,
        "max_locks_per_transaction": settings.max_locks_per_xact,
    }


def raised_limits(control: ControlFile, limits: PrimaryLimits) -> ControlFile:
    """A control file whose copies of settings are at least as great."""
    own = limits_of(ClusterSettings.from_control_file(control))
    return msgspec.structs.replace(
        control,
        **{_CONTROL_FIELDS.get(name, name): max(value, limits.get(name, 0)) for name, value in own.items()},
    )


def next_xid_or(oldest_active_xid: int, checkpoint: CheckPoint) -> int:
    """What a checkpoint at the start says is its oldest transaction: a real one, in any case."""
    return oldest_active_xid or checkpoint.next_xid & 0xFFFFFFFF


class _Walk:
    """Goes from record to record over page headers."""

    def __init__(
        self, wal: bytes, start_lsn: int, pg_version: int, segment: int, is_record_end: bool
    ) -> None:
        self._wal = wal
        self._start_lsn = start_lsn
        self._end_lsn = start_lsn + len(wal)
        self._pg_version = pg_version
        self._segment = segment
        self._is_record_end = is_record_end

    def records(self) -> Iterator[_Found]:
        lsn = self._start_lsn if self._is_record_end else self._first_record()
        while True:
            lsn = record_start(lsn, self._segment) if lsn % WAL_PAGE_SIZE_BYTES == 0 else lsn
            if lsn + 8 > self._end_lsn:
                return
            header = self._bytes(lsn, RECORD_HEADER_SIZE_BYTES)
            if len(header) < RECORD_HEADER_SIZE_BYTES:
                return
            size, _, previous_lsn, info, rmgr, _ = _HEADER.unpack(header)
            if size < RECORD_HEADER_SIZE_BYTES:
                raise InvalidWalError(lsn, f"record length {size} is not possible")
            yield _Found(lsn, previous_lsn, rmgr, info, self._main_data(lsn, size, rmgr, info & 0xF0))
            lsn = self._advance(lsn, align_lsn(size))
            if rmgr == Rmgr.XLOG and info & 0xF0 == _SWITCH:
                lsn += -lsn % self._segment

    def _main_data(self, lsn: int, size: int, rmgr: int, kind: int) -> bytes:
        """Of a record without blocks: behind the header and the length of the data."""
        is_wanted = (rmgr == Rmgr.STANDBY and kind == _RUNNING_XACTS) or (
            rmgr == Rmgr.XLOG and kind == _PARAMETER_CHANGE
        )
        if not is_wanted:
            return b""
        body = self._bytes(lsn, min(size, WAL_PAGE_SIZE_BYTES))[RECORD_HEADER_SIZE_BYTES:]
        return body[5:] if body[0] == _LONG_DATA else body[2:]

    def _first_record(self) -> int:
        """Behind what continues on the first page from the one before."""
        header = self._page_header(self._start_lsn)
        begin = record_start(self._start_lsn, self._segment)
        if not header.info & CONTINUES_RECORD:
            return begin
        return self._advance(begin, align_lsn(header.remaining_bytes))

    def _page_header(self, lsn: int) -> PageHeader:
        at = lsn - self._start_lsn
        data = self._wal[at : at + _PAGE_HEADER_BYTES_MAX]
        return unpack_page_header(data, lsn, self._pg_version, self._segment)

    def _advance(self, lsn: int, size: int) -> int:
        """The end of `size` bytes of one record from `lsn` on; beyond the WAL when it ends before."""
        while True:
            room = WAL_PAGE_SIZE_BYTES - lsn % WAL_PAGE_SIZE_BYTES
            if size <= room:
                return lsn + size
            size -= room
            lsn += room
            if lsn >= self._end_lsn:
                return self._end_lsn
            if self._page_header(lsn).info & OVERWRITES_RECORD:
                return record_start(lsn, self._segment)
            lsn = record_start(lsn, self._segment)

    def _bytes(self, lsn: int, size: int) -> bytes:
        """Of one record, without page headers; less where the WAL ends."""
        parts = []
        while size > 0 and lsn < self._end_lsn:
            if lsn % WAL_PAGE_SIZE_BYTES == 0:
                lsn = record_start(lsn, self._segment)
            taken = min(size, WAL_PAGE_SIZE_BYTES - lsn % WAL_PAGE_SIZE_BYTES, self._end_lsn - lsn)
            if taken <= 0:
                break
            parts.append(self._wal[lsn - self._start_lsn : lsn - self._start_lsn + taken])
            lsn, size = lsn + taken, size - taken
        return b"".join(parts)
