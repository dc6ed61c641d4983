"""What keeps WAL; whole segments go when nothing does, durably in order and not missed after a crash."""

import errno
from pathlib import Path

import pytest

from excimer.base.clock import Monotonic
from excimer.base.errors import RetryableError
from excimer.base.lsn import Lsn
from excimer.safekeeper.control_file import read_control_file
from excimer.safekeeper.disk import Disk
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.safekeeper.wal_retention import (
    READER_RETURN_S,
    WRITER_RETURN_S,
    Floor,
    ReaderPositions,
    WalLimits,
    WalNeeds,
    plan_floor,
)
from excimer.safekeeper.wal_storage import WalMissingError
from excimer.wire.safekeeping import AppendResponse, CommitAnnounce, ReadWalRequest, SkipWal, WalChunk
from tests.kit.acceptor_driver import (
    CONNECTION,
    SEGMENT_SIZE_BYTES,
    START,
    Driver,
    close,
    create_timeline,
    opened,
)
from tests.kit.wal_builder import WalBuilder

NOW = Monotonic(100.0)
LIMITS = WalLimits(reader_size_bytes=1000, member_size_bytes=2000)


def needs(durable: int, horizon: int, commit: int, *readers: int) -> WalNeeds:
    return WalNeeds(Lsn(durable), Lsn(horizon), Lsn(commit), tuple(Lsn(reader) for reader in readers))


@pytest.mark.parametrize(
    ("wanted", "floor"),
    [
        (needs(5000, 6000, 7000), Floor(Lsn(5000), "object_storage")),
        (needs(5000, 4000, 7000), Floor(Lsn(4000), "safekeeper")),
        (needs(5000, 3000, 7000), Floor(Lsn(3000), "safekeeper")),
        (needs(5000, 2999, 7000), Floor(Lsn(3000), "safekeeper")),
        (needs(5000, 100, 7000)._replace(has_writer=False), Floor(Lsn(5000), "object_storage")),
        (needs(5000, 6000, 3000), Floor(Lsn(3000), "commit")),
        (needs(5000, 6000, 7000, 4500, 4800), Floor(Lsn(4500), "reader")),
        (needs(5000, 6000, 7000, 100), Floor(Lsn(4000), "reader")),
        (needs(5000, 6000, 7000, 6500), Floor(Lsn(5000), "object_storage")),
        (needs(0, 6000, 7000), Floor(Lsn(0), "object_storage")),
    ],
)
def test_the_lowest_need_keeps_wal_and_is_named(wanted: WalNeeds, floor: Floor) -> None:
    assert plan_floor(wanted, LIMITS) == floor


def test_a_reader_that_is_gone_keeps_its_place_for_a_while() -> None:
    readers = ReaderPositions()
    first, second = readers.enter(Lsn(100)), readers.enter(Lsn(200))
    first.lsn = Lsn(150)
    readers.leave(first, NOW)
    assert sorted(readers.lsns(Monotonic(NOW + READER_RETURN_S - 1))) == [150, 200]
    assert readers.lsns(Monotonic(NOW + READER_RETURN_S)) == (200,)
    readers.leave(second, NOW)


def build_wal(segment_count: int) -> WalBuilder:
    builder = WalBuilder(START, 18, SEGMENT_SIZE_BYTES)
    while len(builder.stream) < segment_count * SEGMENT_SIZE_BYTES:
        builder.add(10, 0x10, b"x" * 1900)
    return builder


def fill(driver: Driver, builder: WalBuilder, *, horizon_lsn: int) -> None:
    """Appends all, commits all, and says up to where all members have it."""
    wal = bytes(builder.stream)
    begin_lsn = driver.win()
    for offset in range(begin_lsn - START, len(wal), 100_000):
        driver.append(Lsn(START + offset), wal[offset : offset + 100_000])
    driver.say(CommitAnnounce(driver.term, builder.ends[-1], Lsn(horizon_lsn)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    created = tmp_path / "tenant" / "timeline"
    create_timeline(created)
    return created


def segments(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("0*"))


def test_segments_below_the_floor_go_and_what_is_above_stays_readable(directory: Path) -> None:
    builder = build_wal(6)
    end_lsn = builder.ends[-1]
    with opened(directory) as timeline:
        driver = Driver(timeline)
        fill(driver, builder, horizon_lsn=end_lsn)
        before = segments(directory)
        timeline.confirm_durable(Lsn(START + 3 * SEGMENT_SIZE_BYTES))
        floor = plan_floor(timeline.wal_needs(NOW), LIMITS)
        assert floor == Floor(Lsn(START + 3 * SEGMENT_SIZE_BYTES), "object_storage")
        assert timeline.has_removable_wal(floor)
        assert timeline.remove_wal(floor) == 3 * SEGMENT_SIZE_BYTES
        assert not timeline.has_removable_wal(floor)
        assert segments(directory) == before[3:]
        first_lsn = timeline.first_lsn()
        assert first_lsn == (START // SEGMENT_SIZE_BYTES + 3) * SEGMENT_SIZE_BYTES
        assert timeline.read_wal(first_lsn, end_lsn) == bytes(builder.stream)[first_lsn - START :]
        with pytest.raises(WalMissingError, match="not stored here"):
            timeline.read_wal(START, end_lsn)
        (answer,) = driver.say(ReadWalRequest(driver.term, START, end_lsn))
        assert answer == WalChunk(driver.term, first_lsn, b"")
    with opened(directory) as timeline:
        assert timeline.first_lsn() == first_lsn
        assert timeline.flush_lsn == builder.lsn
        assert timeline.durable_lsn == START + 3 * SEGMENT_SIZE_BYTES
        assert Driver(timeline).win() == builder.lsn


def test_wal_that_another_safekeeper_lacks_stays(directory: Path) -> None:
    builder = build_wal(4)
    with opened(directory) as timeline:
        fill(Driver(timeline), builder, horizon_lsn=START)
        timeline.confirm_durable(builder.ends[-1])
        floor = plan_floor(timeline.wal_needs(NOW), LIMITS._replace(member_size_bytes=1 << 30))
        assert floor == Floor(START, "safekeeper")
        timeline.remove_wal(floor)
        assert timeline.read_wal(START, builder.ends[-1]) == bytes(builder.stream)


class DiskOfFewCalls(Disk):
    """Refuses all removals, or all replaced files, once it is told to."""

    def __init__(self) -> None:
        self.refused = ""

    def remove(self, path: Path) -> None:
        if self.refused == "second removal":
            self.refused = "removal"
        elif self.refused == "removal":
            raise OSError(errno.EIO, "injected")
        super().remove(path)

    def replace_file(self, path: Path, data: bytes) -> None:
        if self.refused == "control file":
            raise OSError(errno.EIO, "injected")
        super().replace_file(path, data)


@pytest.mark.parametrize("refused", ["control file", "removal", "second removal"])
@pytest.mark.parametrize("crashes", [False, True])
def test_a_removal_that_is_broken_off_is_done_again(directory: Path, refused: str, crashes: bool) -> None:
    builder = build_wal(5)
    disk = DiskOfFewCalls()
    floor = Floor(builder.ends[-1], "object_storage")
    with opened(directory, disk) as timeline:
        fill(Driver(timeline), builder, horizon_lsn=builder.ends[-1])
        disk.refused = refused
        with pytest.raises(OSError, match="injected"):
            timeline.remove_wal(floor)
        assert len(segments(directory)) >= (3 if refused == "second removal" else 4)
        disk.refused = ""
        if not crashes:
            assert timeline.has_removable_wal(floor)
            timeline.remove_wal(floor)
    with opened(directory) as timeline:
        assert timeline.flush_lsn == builder.lsn
        assert timeline.has_removable_wal(floor)
        timeline.remove_wal(floor)
        assert len(segments(directory)) <= 2
        assert read_control_file(directory).wal_start_lsn == timeline.first_lsn()


def test_a_donor_reads_from_where_its_wal_begins(directory: Path) -> None:
    builder = build_wal(3)
    with opened(directory) as timeline:
        driver = Driver(timeline)
        fill(driver, builder, horizon_lsn=builder.ends[-1])
        timeline.remove_wal(Floor(Lsn(START + SEGMENT_SIZE_BYTES), "object_storage"))
        first_lsn = timeline.first_lsn()
        (answer,) = driver.say(ReadWalRequest(driver.term, first_lsn, Lsn(first_lsn + 100)))
        assert isinstance(answer, WalChunk)
        assert answer.wal == bytes(builder.stream)[first_lsn - START :][:100]


def skipping(directory: Path, builder: WalBuilder) -> tuple[Lsn, Lsn]:
    """Where WAL that a safekeeper has ends, in the second segment, and where it is to go on, in the fifth."""
    held = next(end for end in builder.ends if end > START + 1.3 * SEGMENT_SIZE_BYTES)
    resumed = next(end for end in builder.ends if end > START + 4.4 * SEGMENT_SIZE_BYTES)
    with opened(directory) as timeline:
        driver = Driver(timeline)
        begin_lsn = driver.win()
        wal = bytes(builder.stream)[: held - START]
        for offset in range(begin_lsn - START, len(wal), 100_000):
            driver.append(Lsn(START + offset), wal[offset : offset + 100_000])
        driver.commit(held)
        close(timeline)
    return held, resumed


def test_wal_that_nobody_has_any_more_is_skipped(directory: Path) -> None:
    builder = build_wal(6)
    wal, end_lsn = bytes(builder.stream), builder.ends[-1]
    held_lsn, resumed_lsn = skipping(directory, builder)
    with opened(directory) as timeline:
        driver = Driver(timeline)
        driver.win()
        skip = SkipWal(driver.term, resumed_lsn)
        assert driver.say(skip) == [AppendResponse(driver.term, held_lsn, held_lsn)], "not known as durable"
        timeline.confirm_durable(resumed_lsn)
        answer = AppendResponse(driver.term, resumed_lsn, resumed_lsn)
        assert driver.say(skip) == [answer]
        assert driver.say(skip) == [answer], "again is harmless"
        assert segments(directory) == []
        assert (timeline.first_lsn(), timeline.commit_lsn) == (resumed_lsn, resumed_lsn)
    with opened(directory) as timeline:
        assert timeline.flush_lsn == resumed_lsn, "also when it ended before any WAL came"
        driver = Driver(timeline)
        assert driver.win() == resumed_lsn
        driver.append(resumed_lsn, wal[resumed_lsn - START :])
        driver.commit(end_lsn)
        (refused,) = driver.say(ReadWalRequest(driver.term, held_lsn, resumed_lsn))
        assert refused == WalChunk(driver.term, resumed_lsn, b"")
        close(timeline)
    with opened(directory) as timeline:
        assert (timeline.first_lsn(), timeline.commit_lsn) == (resumed_lsn, end_lsn)
        assert timeline.read_wal(resumed_lsn, end_lsn) == wal[resumed_lsn - START : end_lsn - START]
        assert timeline.remove_wal(Floor(end_lsn, "object_storage")) > 0


@pytest.mark.parametrize("refused", ["control file", "removal", "second removal"])
@pytest.mark.parametrize("crashes", [False, True])
def test_a_skip_that_is_broken_off_is_not_done_or_done_again(
    directory: Path, refused: str, crashes: bool
) -> None:
    builder = build_wal(6)
    held_lsn, resumed_lsn = skipping(directory, builder)
    disk = DiskOfFewCalls()
    expected = held_lsn if refused == "control file" else resumed_lsn
    with opened(directory, disk) as timeline:
        driver = Driver(timeline)
        driver.win()
        timeline.confirm_durable(resumed_lsn)
        disk.refused = refused
        with pytest.raises((OSError, RetryableError), match=r"injected|cannot store WAL"):
            driver.say(SkipWal(driver.term, resumed_lsn))
        disk.refused = ""
        if not crashes:
            assert driver.win() == expected
            check_goes_on(timeline, driver, builder, expected)
    if crashes:
        with opened(directory) as timeline:
            driver = Driver(timeline)
            assert driver.win() == expected
            check_goes_on(timeline, driver, builder, expected)


def check_goes_on(timeline: SafekeeperTimeline, driver: Driver, builder: WalBuilder, lsn: Lsn) -> None:
    wal, end_lsn = bytes(builder.stream), builder.ends[-1]
    driver.append(lsn, wal[lsn - START :])
    driver.commit(end_lsn)
    assert timeline.read_wal(lsn, end_lsn) == wal[lsn - START : end_lsn - START]


def test_without_a_proposer_wal_is_not_kept_for_a_safekeeper_that_lags(directory: Path) -> None:
    builder = build_wal(4)
    end_lsn = builder.ends[-1]
    limits = WalLimits(reader_size_bytes=1 << 30, member_size_bytes=1 << 30)
    with opened(directory) as timeline:
        fill(Driver(timeline), builder, horizon_lsn=START)
        timeline.confirm_durable(end_lsn)
        later = Monotonic(NOW + 10 * WRITER_RETURN_S)
        assert plan_floor(timeline.wal_needs(NOW), limits) == Floor(START, "safekeeper")
        assert plan_floor(timeline.wal_needs(later), limits) == Floor(START, "safekeeper"), "it is connected"
        timeline.disconnected(CONNECTION)
        just_left = Monotonic(later + WRITER_RETURN_S - 1)
        assert plan_floor(timeline.wal_needs(just_left), limits) == Floor(START, "safekeeper")
        gone = Monotonic(later + WRITER_RETURN_S)
        assert plan_floor(timeline.wal_needs(gone), limits) == Floor(end_lsn, "object_storage")
