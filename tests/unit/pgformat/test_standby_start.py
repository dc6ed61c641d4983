"""Where in WAL a standby can begin, built record by record over pages and segments."""

import struct

import pytest

from excimer.base.lsn import Lsn
from excimer.pgformat.standby_start import StandbyStart, find_standby_start
from excimer.pgformat.wal_record import Rmgr
from tests.kit.wal_builder import WalBuilder

START = Lsn(0x1000028)
SEGMENT = 1 << 20
RUNNING, LOCK = 0x10, 0x00
SHUTDOWN, PARAMETER_CHANGE = 0x00, 0x60


def running(oldest: int, xids: int = 3) -> bytes:
    return struct.pack("<ii?3xIII", xids, 0, False, 900, oldest, 899) + bytes(4 * xids)


def filler(wal: WalBuilder, size: int = 400) -> None:
    wal.add(Rmgr.HEAP, 0, bytes(size))


def find(wal: WalBuilder, *, skipped: int = 0) -> StandbyStart | None:
    begin = Lsn(wal.start_lsn + skipped)
    stream = bytes(wal.stream[skipped:])
    return find_standby_start(stream, begin, 18, SEGMENT, is_record_end=not skipped)


def test_it_begins_at_the_locks_of_the_last_snapshot() -> None:
    wal = WalBuilder(START, segment_size_bytes=SEGMENT)
    wal.add(Rmgr.STANDBY, LOCK, bytes(12))
    wal.add(Rmgr.STANDBY, RUNNING, running(700))
    filler(wal)
    before = wal.add(Rmgr.HEAP, 0, bytes(50))
    first_lock = len(wal.starts)
    wal.add(Rmgr.STANDBY, LOCK, bytes(12))
    filler(wal)
    wal.add(Rmgr.STANDBY, LOCK, bytes(24))
    wal.add(Rmgr.STANDBY, RUNNING, running(800))
    filler(wal)
    wal.add(Rmgr.STANDBY, LOCK, bytes(12))
    found = find(wal)
    assert found == StandbyStart(wal.starts[first_lock], wal.starts[first_lock - 1], 800, True, {})
    assert found.lsn == before


def test_without_locks_it_is_the_snapshot_and_a_shutdown_needs_nothing_before() -> None:
    wal = WalBuilder(START, segment_size_bytes=SEGMENT)
    filler(wal)
    wal.add(Rmgr.STANDBY, RUNNING, running(800))
    assert (found := find(wal)) is not None
    assert found.lsn == wal.starts[1]
    wal.add(Rmgr.STANDBY, LOCK, bytes(12))
    wal.add(Rmgr.XLOG, SHUTDOWN, bytes(88))
    filler(wal)
    assert find(wal) == StandbyStart(wal.starts[3], wal.starts[2], 0, True, {})


@pytest.mark.parametrize("xids", [0, 1, 70, 3000])
def test_records_over_pages_and_segments_are_walked_from_the_middle(xids: int) -> None:
    """`xids`: snapshots of one page, with short and long lengths, and of several pages."""
    wal = WalBuilder(START, segment_size_bytes=SEGMENT)
    while wal.lsn < START + 3 * SEGMENT:
        filler(wal, 30_000 if wal.lsn % 3 else 700)
    wal.add(Rmgr.STANDBY, RUNNING, running(800, xids))
    expected = wal.starts[-1]
    filler(wal, 9000)
    whole = find(wal)
    assert whole is not None
    assert (whole.lsn, whole.oldest_active_xid) == (expected, 800)
    page = (START // 8192 + 200) * 8192 - START
    for skipped in (page, page + 8192, page + 5 * 8192):
        assert find(wal, skipped=skipped) == whole._replace(is_sure=False)


def test_locks_before_what_was_read_may_be_missing() -> None:
    wal = WalBuilder(START, segment_size_bytes=SEGMENT)
    while wal.lsn < 0x1008000:
        filler(wal)
    skipped = 0x1004000 - START
    assert find(wal, skipped=skipped) is None
    wal.add(Rmgr.STANDBY, RUNNING, running(800))
    assert (found := find(wal, skipped=skipped)) is not None
    assert not found.is_sure
    filler(wal)
    wal.add(Rmgr.STANDBY, RUNNING, running(801))
    assert (found := find(wal, skipped=skipped)) is not None
    assert found.is_sure


def test_a_primary_that_got_more_room_is_heard_of() -> None:
    wal = WalBuilder(START, segment_size_bytes=SEGMENT)
    wal.add(Rmgr.XLOG, SHUTDOWN, bytes(88))
    for connections, locks in ((300, 64), (200, 128)):
        wal.add(Rmgr.XLOG, PARAMETER_CHANGE, struct.pack("<iiiiii??", connections, 8, 10, 0, locks, 1, 0, 0))
    assert (found := find(wal)) is not None
    assert dict(found.limits) == {
        "max_connections": 300,
        "max_worker_processes": 8,
        "max_wal_senders": 10,
        "max_prepared_transactions": 0,
        "max_locks_per_transaction": 128,
    }
