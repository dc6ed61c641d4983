"""A timeline on a real disk: what is acknowledged, what a crash leaves, what a truncation removes."""

from itertools import pairwise
from pathlib import Path

import pytest

from excimer.base.lsn import Lsn
from excimer.pgformat.wal_segment import InvalidWalError, segment_name
from excimer.safekeeper.recovery import CommittedWalLostError
from excimer.safekeeper.timeline import TimelineClosedError
from excimer.safekeeper.wal_storage import WalMissingError
from excimer.wire.safekeeping import (
    AppendRejected,
    AppendRequest,
    AppendResponse,
    Term,
    VoteRequest,
    VoteResponse,
)
from tests.kit.acceptor_driver import SEGMENT_SIZE_BYTES, START, Driver, close, create_timeline, opened
from tests.kit.wal_builder import WalBuilder


def build_wal(size_bytes: int, filling: int = 1, count_max: int = 100_000) -> WalBuilder:
    builder = WalBuilder(START, 18, SEGMENT_SIZE_BYTES)
    while len(builder.stream) < size_bytes and len(builder.ends) < count_max:
        builder.add(10, 0x10, bytes([filling]) * (100 + len(builder.ends) * 37 % 2000))
    return builder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    created = tmp_path / "tenant" / "timeline"
    create_timeline(created)
    return created


def segment(directory: Path, number: int) -> Path:
    return directory / segment_name(1, number, SEGMENT_SIZE_BYTES)


def test_wal_is_acknowledged_once_stored_and_found_again_after_a_crash(directory: Path) -> None:
    builder = build_wal(3 * SEGMENT_SIZE_BYTES)
    wal = bytes(builder.stream)
    with opened(directory) as timeline:
        driver = Driver(timeline)
        assert driver.win() == START
        for offset in range(0, len(wal), 50_000):
            (answer,) = driver.append(Lsn(START + offset), wal[offset : offset + 50_000])
            assert isinstance(answer, AppendResponse)
            assert answer.flush_lsn == min(builder.lsn, START + offset + 50_000)
        assert driver.append(Lsn(builder.lsn + 8), b"x") == [AppendRejected(driver.term, Lsn(builder.lsn))]
        driver.commit(builder.ends[-3])
        assert timeline.commit_lsn == builder.ends[-3]
    with opened(directory) as timeline:
        assert timeline.flush_lsn == builder.lsn
        assert timeline.read_wal(START, Lsn(builder.lsn)) == wal
        assert not any(timeline.read_wal(timeline.first_lsn(), START))
        with pytest.raises(WalMissingError):
            timeline.read_wal(Lsn(START - SEGMENT_SIZE_BYTES), START)


def test_a_torn_tail_is_cut_to_the_last_whole_record(directory: Path) -> None:
    builder = build_wal(SEGMENT_SIZE_BYTES * 2)
    with opened(directory) as timeline:
        Driver(timeline).win()
        Driver(timeline).append(START, bytes(builder.stream))
    torn = builder.ends[-40]
    number, offset = divmod(torn + 30, SEGMENT_SIZE_BYTES)  # inside the record that begins at `torn`
    with segment(directory, number).open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 16)
    with opened(directory) as timeline:
        assert timeline.flush_lsn == torn
        assert not any(segment(directory, number).read_bytes()[torn % SEGMENT_SIZE_BYTES :])
        assert Driver(timeline).win() == torn


def test_committed_wal_that_is_gone_is_damage_not_a_torn_tail(directory: Path) -> None:
    builder = build_wal(SEGMENT_SIZE_BYTES // 2)
    with opened(directory) as timeline:
        Driver(timeline).win()
        driver = Driver(timeline)
        driver.append(START, bytes(builder.stream))
        driver.commit(builder.ends[-1])
        close(timeline)
        with pytest.raises(TimelineClosedError):
            driver.commit(builder.ends[-1])
    segment(directory, START // SEGMENT_SIZE_BYTES).unlink()
    with pytest.raises(CommittedWalLostError, match="rebuild"), opened(directory):
        pass


def test_a_divergent_tail_is_removed_so_that_no_crash_brings_it_back(directory: Path) -> None:
    """The new term's records have the sizes of the old one's: a leftover would fit behind them."""
    mine = build_wal(SEGMENT_SIZE_BYTES * 2, filling=1)
    theirs = build_wal(SEGMENT_SIZE_BYTES * 2, filling=2)
    keep = mine.ends[5]
    assert mine.ends == theirs.ends
    with opened(directory) as timeline:
        driver = Driver(timeline)
        driver.win()
        driver.append(START, bytes(mine.stream))
        second = Driver(timeline, 2)
        second.term = Term(driver.term + 1)
        (vote,) = second.say(VoteRequest(second.term, second.id))
        assert isinstance(vote, VoteResponse)
        second.adopt(vote, keep)
        assert timeline.flush_lsn == keep
        assert not segment(directory, START // SEGMENT_SIZE_BYTES + 2).exists()
        replaced = bytes(theirs.stream)[keep - START : theirs.ends[9] - START]
        second.append(keep, replaced)
        answer = driver.append(theirs.ends[9], b"")
        assert isinstance(answer[0], AppendResponse)
        assert answer[0].term == second.term  # the first one is fenced (C1)
    with opened(directory) as timeline:
        assert timeline.flush_lsn == theirs.ends[9]
        wal = timeline.read_wal(START, theirs.ends[9])
        assert wal == bytes(mine.stream)[: keep - START] + replaced


def test_bytes_that_are_no_wal_are_not_stored(directory: Path) -> None:
    builder = build_wal(10_000)
    with opened(directory) as timeline:
        driver = Driver(timeline)
        driver.win()
        driver.append(START, bytes(builder.stream))
        with pytest.raises(InvalidWalError):
            driver.append(Lsn(builder.lsn), b"\xff" * 500)
        assert timeline.flush_lsn == builder.lsn
        builder.add(10, 0x10, b"more")
        (answer,) = driver.append(Lsn(builder.ends[-2]), bytes(builder.stream)[builder.ends[-2] - START :])
        assert isinstance(answer, AppendResponse)
        assert answer.flush_lsn == builder.lsn


def test_several_appends_share_one_sync_and_one_answer(directory: Path) -> None:
    builder = build_wal(20_000)
    wal = bytes(builder.stream)
    with opened(directory) as timeline:
        driver = Driver(timeline)
        driver.win()
        cuts = [*range(0, len(wal), 1000), len(wal)]
        appends = [
            AppendRequest(driver.term, Lsn(START + low), Lsn(0), Lsn(0), wal[low:high])
            for low, high in pairwise(cuts)
        ]
        answers = driver.say(*appends)
        assert answers == [AppendResponse(driver.term, Lsn(builder.lsn), START)]
