"""What libhydrate does to makers of WAL: bulk writers wait, pg_wal has a limit, a full disk is no error."""

import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import Lsn
from excimer.compute.arena import UNLIMITED
from tests.kit.hydrate_driver import Driver, LazyDirectory, tags, wait_until

PATH = "base/5/1000"
SEGMENT = "pg_wal/000000010000000000000003"
SEGMENT_START = 3 << 24
MIB = 1 << 20


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[LazyDirectory]:
    directory = LazyDirectory(tmp_path)
    (directory.data_dir / "pg_wal").mkdir()
    yield directory
    directory.close()


@pytest.fixture
def driver(lazy: LazyDirectory) -> Driver:
    return lazy.driver()


def waits(driver: Driver, command: str) -> None:
    driver.begin(command)
    with pytest.raises(queue.Empty):
        driver.answer(0.3)


def test_who_makes_much_wal_waits_until_it_is_allowed(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    lazy.arena.throttle(0, UNLIMITED)
    driver.call(f"made_wal {4 * MIB}")
    waits(driver, f"pread {fd} 0 1")
    taken = lazy.arena.bulk_bytes()
    assert 4 * MIB - 256 * 1024 <= taken <= 4 * MIB
    lazy.arena.throttle(taken - 1, UNLIMITED)
    with pytest.raises(queue.Empty):
        driver.answer(0.3)
    lazy.arena.throttle(taken, UNLIMITED)
    assert driver.answer().startswith("ok")
    assert lazy.arena.statistics().bulk_waits == 1
    assert lazy.arena.statistics().bulk_wait_ns > 300_000_000
    assert driver.read(fd, 1) == tags(PATH, 1, 2)


def test_who_makes_little_never_waits(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    lazy.arena.throttle(0, UNLIMITED)
    for _ in range(3):
        driver.call(f"made_wal {60 * 1024}")
        assert driver.read(fd, 0) == tags(PATH, 0, 1)
    assert lazy.arena.bulk_bytes() == 0


@pytest.mark.parametrize("state", ["holds_lock 1", "critical 1", "interrupt 1"])
def test_nobody_waits_who_holds_what_others_need(lazy: LazyDirectory, driver: Driver, state: str) -> None:
    """Nor who has to answer somebody. What is owed is waited for at the next call."""
    fd = driver.open(PATH)
    lazy.arena.throttle(0, UNLIMITED)
    driver.call(f"made_wal {4 * MIB}")
    driver.call(state)
    assert driver.read(fd, 0) == tags(PATH, 0, 1)
    driver.call(state.replace("1", "0"))
    waits(driver, f"pread {fd} 0 1")
    lazy.arena.throttle(UNLIMITED, UNLIMITED)
    assert driver.answer().startswith("ok")


def test_wal_is_not_written_beyond_its_limit(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(SEGMENT, "wc")
    lazy.arena.throttle(UNLIMITED, SEGMENT_START + 2 * BLOCK_SIZE_BYTES)
    assert driver.call(f"pwrite {fd} 0 2 7").startswith("ok")
    assert lazy.arena.written_lsn() == SEGMENT_START + 2 * BLOCK_SIZE_BYTES
    waits(driver, f"pwrite {fd} 2 1 7")
    lazy.arena.throttle(UNLIMITED, SEGMENT_START + 3 * BLOCK_SIZE_BYTES)
    assert driver.answer() == f"ok {BLOCK_SIZE_BYTES}"
    assert lazy.arena.statistics().wal_waits == 1
    other = driver.open("base/5/1001")
    assert driver.call(f"pwrite {other} 100 1 7").startswith("ok")
    assert lazy.arena.written_lsn() == SEGMENT_START + 3 * BLOCK_SIZE_BYTES


def test_a_descriptor_that_was_wal_is_not_wal_for_ever(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(SEGMENT, "wc")
    driver.call(f"close {fd}")
    assert driver.open("base/5/1002") == fd
    lazy.arena.throttle(UNLIMITED, 0)
    assert driver.call(f"pwrite {fd} 0 1 7").startswith("ok")


@pytest.mark.parametrize(
    ("path", "in_critical_section"), [(SEGMENT, 0), ("pg_wal/xlogtemp.17", 0), (PATH, 1)]
)
def test_what_must_not_fail_waits_for_room(
    lazy: LazyDirectory, driver: Driver, path: str, in_critical_section: int
) -> None:
    """The write comes whole in the end, although the disk took a part of it first."""
    fd = driver.open(path, "wc")
    driver.call(f"critical {in_critical_section}")
    driver.call("room 10000")
    waits(driver, f"pwrite {fd} 0 3 7")
    wait_until(lambda: lazy.arena.waiting_for_room() == 1)
    (lazy.data_dir / "room").touch()
    assert driver.answer() == f"ok {3 * BLOCK_SIZE_BYTES}"
    assert (lazy.data_dir / path).read_bytes()[: 3 * BLOCK_SIZE_BYTES] == (7).to_bytes(8, "little") * 3 * 1024
    assert lazy.arena.statistics().room_waits == 1
    assert lazy.arena.waiting_for_room() == 0
    wait_until(lambda: len(driver.errors) >= 2)
    assert "no space left for" in driver.errors[0]
    assert str(lazy.data_dir) in driver.errors[0]
    assert "again, after" in driver.errors[1]


def test_whatever_may_fail_does(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(PATH)
    driver.call("room 0")
    started = time.monotonic()
    assert driver.call(f"pwrite {fd} 0 1 7") == "error ENOSPC"
    assert time.monotonic() - started < 5
    assert lazy.arena.statistics().room_waits == 0


HISTORY_FILE = "pg_wal/000000010000000000000003.00000028.backup"


def test_a_base_backup_ends_when_the_quorum_has_its_wal(lazy: LazyDirectory, driver: Driver) -> None:
    fd = driver.open(SEGMENT, "wc")
    driver.call(f"pwrite {fd} 0 2 7")
    end_lsn = lazy.arena.written_lsn()
    assert driver.call(f"make {HISTORY_FILE}") == "ok 0", "where nobody asks a quorum, nobody waits"
    lazy.arena.set_quorum(Lsn(end_lsn - 1))
    for path in ("pg_wal/00000002.history", f"{HISTORY_FILE}.other", "base/5/x.backup"):
        assert driver.call(f"make {path}") == "ok 0"
    waits(driver, f"make {HISTORY_FILE}")
    lazy.arena.set_quorum(end_lsn)
    assert driver.answer() == "ok 0"
    lazy.arena.set_quorum(Lsn(end_lsn - 1))
    driver.call("cancel_flag 1")
    assert driver.call(f"make {HISTORY_FILE}").startswith("error")


def test_what_lies_below_the_start_is_sent_to_nobody(tmp_path: Path) -> None:
    """A start's prefix would stand in an archive as if it were the branch's WAL. Who decodes reads on."""
    lazy = LazyDirectory(tmp_path, wal_start_lsn=Lsn(SEGMENT_START + 5 * BLOCK_SIZE_BYTES + 40))
    try:
        (lazy.data_dir / "pg_wal").mkdir()
        driver = lazy.driver()
        written = driver.open(SEGMENT, "wc")
        driver.call(f"pwrite {written} 0 16 7")
        fd = driver.open(SEGMENT, "r")
        for walsender, database, block, count, is_sent in (
            (0, 0, 0, 16, True),
            (1, 0, 0, 16, False),
            (1, 0, 5, 1, False),
            (1, 0, 6, 10, True),
            (1, 1, 5, 1, True),
            (1, 1, 5, 2, False),
        ):
            driver.call(f"walsender {walsender} {database}")
            answer = driver.call(f"pread {fd} {block} {count}")
            assert answer.startswith("ok") == is_sent, (walsender, database, block, count)
        driver.call("walsender 1 0")
        assert driver.call(f"pread {driver.open(PATH)} 0 1").startswith("ok")
    finally:
        lazy.close()


@pytest.mark.parametrize("walsender", ["0 0", "1 1"])
def test_wal_is_decoded_when_the_quorum_has_it(lazy: LazyDirectory, driver: Driver, walsender: str) -> None:
    """By a function of a session, and by a walsender; of a page that is not full, what is flushed counts."""
    driver.call(f"pwrite {driver.open(SEGMENT, 'wc')} 0 3 7")
    driver.call("slot 1")
    driver.call(f"walsender {walsender}")
    fd = driver.open(SEGMENT, "r")
    assert driver.read(fd, 2), "where nobody asks a quorum, nobody waits"
    lazy.arena.set_quorum(Lsn(SEGMENT_START + BLOCK_SIZE_BYTES))
    assert driver.read(fd, 0)
    waits(driver, f"pread {fd} 1 1")
    lazy.arena.set_quorum(Lsn(SEGMENT_START + 2 * BLOCK_SIZE_BYTES))
    assert driver.answer().startswith("ok")
    waits(driver, f"pread {fd} 2 1")
    lazy.arena.set_quorum(Lsn(SEGMENT_START + 3 * BLOCK_SIZE_BYTES))
    assert driver.answer().startswith("ok")
    end_lsn = SEGMENT_START + 3 * BLOCK_SIZE_BYTES + 40
    driver.call(f"flushed {end_lsn}")
    waits(driver, f"pread {fd} 3 1")
    lazy.arena.set_quorum(Lsn(end_lsn))
    assert driver.answer().startswith(("ok", "short")), "the rest of the page is no WAL yet"
    lazy.arena.set_quorum(Lsn(SEGMENT_START))
    driver.call("cancel_flag 1")
    assert driver.call(f"pread {fd} 0 1").startswith("error")


def test_who_brings_the_quorum_its_wal_does_not_wait_for_it(lazy: LazyDirectory, driver: Driver) -> None:
    driver.call(f"pwrite {driver.open(SEGMENT, 'wc')} 0 3 7")
    lazy.arena.set_quorum(Lsn(SEGMENT_START))
    fd = driver.open(SEGMENT, "r")
    for slot, walsender in ((1, "1 0"), (0, "0 0")):
        driver.call(f"slot {slot}")
        driver.call(f"walsender {walsender}")
        assert driver.call(f"pread {fd} 0 3").startswith("ok")
