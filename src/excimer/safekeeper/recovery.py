"""Finds where a timeline's WAL ends after any crash: at its last whole record.

A crash leaves a tail that may be written in part, or out of order, with zeros behind. From a known
record boundary (the commit LSN of the control file) records are read and checked, each by its
checksum and by its pointer to the one before; the first that is not whole ends the WAL. What was
found is written again and synced before it counts, since it may so far have been in the page
cache only.

Not here: cutting the rest off (the acceptor's first effect, `TruncateWal`).
"""

from excimer._native.wal_scanner import WalScanner
from excimer.base.errors import CorruptionError
from excimer.base.lsn import Lsn, format_lsn
from excimer.pgformat.wal_segment import InvalidWalError
from excimer.safekeeper.wal_storage import WalMissingError, WalStorage
from excimer.wire.safekeeping import TimelineIdentity

_SCAN_SIZE_BYTES = 1 << 20


class CommittedWalLostError(CorruptionError):
    """A file with committed WAL is gone: this copy of the timeline must not be used."""


def new_scanner(identity: TimelineIdentity, start_lsn: Lsn) -> WalScanner:
    return WalScanner(start_lsn, identity.pg_version, identity.wal_segment_size_bytes)


def check_committed(storage: WalStorage, identity: TimelineIdentity, start_lsn: Lsn, commit_lsn: Lsn) -> None:
    """Every segment that holds committed WAL must be there. Raises `CommittedWalLostError`."""
    size_bytes = identity.wal_segment_size_bytes
    for number in range(start_lsn // size_bytes, -(-commit_lsn // size_bytes)):
        path = storage.path_of(number)
        if start_lsn < commit_lsn and not (path.exists() and path.stat().st_size == size_bytes):
            raise CommittedWalLostError(
                f"{path} is missing or cut short, but WAL is committed up to {format_lsn(commit_lsn)}: "
                "rebuild this safekeeper from its peers, under a new id"
            )


def find_end_of_wal(storage: WalStorage, identity: TimelineIdentity, start_lsn: Lsn, limit_lsn: Lsn) -> Lsn:
    """End of the last whole record between the boundary `start_lsn` and `limit_lsn`. Blocks."""
    scanner = new_scanner(identity, start_lsn)
    segment_size_bytes = identity.wal_segment_size_bytes
    lsn = start_lsn
    while lsn < limit_lsn:
        segment_end_lsn = lsn - lsn % segment_size_bytes + segment_size_bytes
        end_lsn = Lsn(min(lsn + _SCAN_SIZE_BYTES, segment_end_lsn, limit_lsn))
        try:
            scanner.feed(storage.read(lsn, end_lsn))
        except (InvalidWalError, WalMissingError):
            break
        lsn = end_lsn
    return scanner.last_record_end
