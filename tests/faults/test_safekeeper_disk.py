"""Every disk call of a safekeeper fails once: nothing acknowledged is lost, and it goes on afterwards."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from excimer.base.errors import ExcimerError
from excimer.base.lsn import Lsn
from excimer.safekeeper.disk import Disk
from excimer.wire.safekeeping import AppendResponse, Term, VoteRequest, VoteResponse
from tests.kit.acceptor_driver import SEGMENT_SIZE_BYTES, START, Driver, create_timeline, opened
from tests.kit.append_stream import StreamDriver
from tests.kit.wal_builder import WalBuilder


class FaultyDisk(Disk):
    """Fails its N-th call with the given error."""

    def __init__(self, fail_at: int, error: int) -> None:
        self.calls = 0
        self.has_failed = False
        self._fail_at = fail_at
        self._error = error

    def fail_from_now(self, call: int) -> None:
        """The `call`-th from here on fails."""
        self._fail_at = self.calls + call

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self._fail_at:
            self.has_failed = True
            raise OSError(self._error, "injected")

    def pwrite(self, fd: int, data: bytes, offset: int) -> None:
        self._call()
        super().pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        self._call()
        super().fdatasync(fd)

    def replace_file(self, path: Path, data: bytes) -> None:
        self._call()
        super().replace_file(path, data)

    def remove(self, path: Path) -> None:
        self._call()
        super().remove(path)


def build_wal() -> WalBuilder:
    builder = WalBuilder(START, 18, SEGMENT_SIZE_BYTES)
    while len(builder.stream) < SEGMENT_SIZE_BYTES + 40_000:
        builder.add(10, 0x10, b"x" * 1900)
    return builder


def run(directory: Path, disk: Disk, wal: bytes, kind: type[Driver] = Driver) -> Lsn:
    """A stubborn proposer: reconnects after each failure. What was acknowledged at most."""
    acknowledged = START
    with opened(directory, disk) as timeline:
        while acknowledged < START + len(wal):
            try:
                driver = kind(timeline)
                begin_lsn = driver.win()
                assert begin_lsn >= acknowledged - 2100, "acknowledged WAL is gone"
                while begin_lsn < START + len(wal):
                    part = wal[begin_lsn - START :][:100_000]
                    (answer,) = driver.append(begin_lsn, part)
                    assert isinstance(answer, AppendResponse)
                    acknowledged = begin_lsn = answer.flush_lsn
            except (ExcimerError, OSError):
                assert isinstance(disk, FaultyDisk)
                assert disk.has_failed
    return acknowledged


def count_calls(work: Callable[[Disk], object]) -> int:
    disk = FaultyDisk(0, 0)
    work(disk)
    return disk.calls


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("kind", [Driver, StreamDriver], ids=["handled", "on the append path"])
def test_each_disk_call_may_fail_once(tmp_path: Path, error: int, kind: type[Driver]) -> None:
    builder = build_wal()
    wal = bytes(builder.stream)
    directory = tmp_path / "clean" / "timeline"
    create_timeline(directory)
    total = count_calls(lambda disk: run(directory, disk, wal, kind))
    assert total > 20
    for fail_at in range(1, total + 1):
        directory = tmp_path / f"{fail_at}" / "timeline"
        create_timeline(directory)
        disk = FaultyDisk(fail_at, error)
        try:
            run(directory, disk, wal, kind)
        except (ExcimerError, OSError):
            assert disk.calls == fail_at, "only opening a timeline may raise, and only at once"
            run(directory, Disk(), wal)
        with opened(directory) as timeline:
            assert timeline.flush_lsn == builder.lsn
            assert timeline.read_wal(START, Lsn(builder.lsn)) == wal


@pytest.mark.parametrize("kind", [Driver, StreamDriver], ids=["handled", "on the append path"])
def test_the_same_proposer_goes_on_after_each_failed_write_or_sync(
    tmp_path: Path, kind: type[Driver]
) -> None:
    """No election repairs anything here: what was written but not synced must not count as known."""
    builder = build_wal()
    wal = bytes(builder.stream)[:60_000]
    for fail_at in range(1, 21):
        directory = tmp_path / f"{fail_at}" / "timeline"
        create_timeline(directory)
        disk = FaultyDisk(0, errno.EIO)
        with opened(directory, disk) as timeline:
            driver = kind(timeline)
            begin_lsn = driver.win()
            disk.fail_from_now(fail_at)
            failures = 0
            while begin_lsn < START + len(wal):
                try:
                    (answer,) = driver.append(begin_lsn, wal[begin_lsn - START :][:5000])
                    assert isinstance(answer, AppendResponse)
                    assert answer.flush_lsn > begin_lsn, "WAL that was never synced is taken for known"
                    begin_lsn = answer.flush_lsn
                except (ExcimerError, OSError):
                    failures += 1
                    assert failures == 1, "it does not recover"
                    begin_lsn = driver.rejoin()
            assert disk.has_failed
            assert timeline.read_wal(START, Lsn(START + len(wal))) == wal


class RenamingDisk(Disk):
    """While `is_failing`, a replaced file bears its new content, but the directory's sync fails."""

    def __init__(self) -> None:
        self.is_failing = False
        self.durable: bytes | None = None

    def replace_file(self, path: Path, data: bytes) -> None:
        super().replace_file(path, data)
        if self.is_failing:
            raise OSError(errno.EIO, "injected")
        self.durable = data


def test_a_promise_that_may_not_be_durable_is_written_again_before_it_is_spoken(tmp_path: Path) -> None:
    directory = tmp_path / "timeline"
    create_timeline(directory)
    disk = RenamingDisk()
    with opened(directory, disk) as timeline:
        driver = Driver(timeline)
        vote = VoteRequest(Term(9), driver.id)
        disk.is_failing = True
        with pytest.raises(OSError, match="injected"):
            driver.say(vote)
        with pytest.raises(OSError, match="injected"):
            driver.say(vote)
        disk.is_failing = False
        disk.durable = None
        (answer,) = driver.say(vote)
        assert isinstance(answer, VoteResponse)
        assert answer.granted
        assert disk.durable is not None, "the vote rests on a file that was never synced (C2)"
        assert disk.durable == (directory / "control").read_bytes()


def test_a_promise_found_at_start_is_written_again_before_it_is_spoken(tmp_path: Path) -> None:
    directory = tmp_path / "timeline"
    create_timeline(directory)
    with opened(directory) as timeline:
        Driver(timeline).say(VoteRequest(Term(9), Driver(timeline).id))
    disk = RenamingDisk()
    with opened(directory, disk) as timeline:
        assert timeline.term == 9
        assert disk.durable == (directory / "control").read_bytes()
