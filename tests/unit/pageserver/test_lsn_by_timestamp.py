"""Search for the LSN of a moment, against a linear search."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.clock import unix_to_timestamptz
from excimer.base.lsn import Lsn, record_end, record_start
from excimer.pageserver.lsn_by_timestamp import (
    Answer,
    TimestampOutsideHistoryError,
    find_lsn_at_timestamp,
)

SEGMENT = 1 << 20
START = Lsn(SEGMENT)


def reader(commits: list[tuple[int, int]]):  # type: ignore[no-untyped-def]
    def commit_time(lsn: Lsn) -> int | None:
        return max((time for at, time in commits if at <= lsn), default=None)

    return commit_time


@given(
    st.lists(
        st.tuples(st.integers(1, 9000).map(lambda n: n * 8), st.integers(0, 50)), min_size=1, max_size=20
    ),
    st.integers(-5, 60),
)
def test_search_agrees_with_looking_at_every_commit(steps: list[tuple[int, int]], timestamp: int) -> None:
    commits, lsn, time = [(int(START), 0)], int(START), 0
    for step, pause in steps:
        lsn, time = record_end(record_start(lsn, SEGMENT) + step, SEGMENT), time + pause
        if lsn > commits[-1][0]:
            commits.append((lsn, time))
    end = Lsn(commits[-1][0] + 64)
    if timestamp < 0:
        with pytest.raises(TimestampOutsideHistoryError):
            find_lsn_at_timestamp(reader(commits), START, end, timestamp, SEGMENT)
        return
    found = find_lsn_at_timestamp(reader(commits), START, end, timestamp, SEGMENT)
    assert START <= found.lsn <= end
    included = {at for at, time in commits if at <= found.lsn}
    assert included == {at for at, time in commits if time <= timestamp}
    if found.answer is Answer.BETWEEN:
        assert record_end(found.lsn, SEGMENT) == found.lsn
    else:
        assert found.lsn == end


def test_a_moment_before_the_first_known_commit_is_refused() -> None:
    with pytest.raises(TimestampOutsideHistoryError, match="before the history"):
        find_lsn_at_timestamp(reader([(int(START) + 800, 7)]), START, Lsn(START + 900), 3, SEGMENT)


def test_it_says_where_the_history_begins_so_that_it_can_be_asked_for() -> None:
    begin = 60_000_001  # a microsecond after the minute
    commits = reader([(int(START), begin), (int(START) + 800, begin + 5_000_000)])
    with pytest.raises(TimestampOutsideHistoryError, match="begins at 2000-01-01T00:01:01Z") as told:
        find_lsn_at_timestamp(commits, START, Lsn(START + 900), 3, SEGMENT)
    said = datetime.fromisoformat(str(told.value).split()[-1])
    found = find_lsn_at_timestamp(
        commits, START, Lsn(START + 900), unix_to_timestamptz(said.timestamp()), SEGMENT
    )
    assert START <= found.lsn < START + 800


@given(st.integers(1, 2**40).map(lambda n: n * 8))
def test_record_end_undoes_record_start(lsn: int) -> None:
    end = record_end(lsn, SEGMENT)
    assert end <= lsn
    assert record_end(end, SEGMENT) == end
    assert record_end(record_start(end, SEGMENT), SEGMENT) == end


def test_record_end_at_headers() -> None:
    assert record_end(SEGMENT + 40, SEGMENT) == SEGMENT
    assert record_end(SEGMENT + 48, SEGMENT) == SEGMENT + 48
    assert record_end(SEGMENT + 8192 + 24, SEGMENT) == SEGMENT + 8192
    assert record_end(SEGMENT + 8192 + 39, SEGMENT) == SEGMENT + 8192 + 32
