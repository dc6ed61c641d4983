"""The LSN at a moment: the newest one at which no commit later than a timestamp has happened yet.

Every commit record leaves its time under the key COMMIT_TIME, so the newest value at an LSN is the
time of the last commit before it. Times grow with LSNs but for the small disorder of concurrent
commits, which record their time shortly before they take their place in the WAL: the answer is
exact for commits further apart than that. A binary search over LSNs reads some forty values.

Not here: waiting for WAL, what to do with the LSN.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn, record_end


class TimestampOutsideHistoryError(RefusedError):
    """The moment is before what the timeline remembers, or has not come yet."""


class Answer(StrEnum):
    BETWEEN = "between"
    """Commits lie before and after."""
    NEWEST = "newest"
    """No commit is known after the moment: the newest LSN there is."""


class LsnAtTimestamp(NamedTuple):
    lsn: Lsn
    answer: Answer


def find_lsn_at_timestamp(
    commit_time: Callable[[Lsn], int | None],
    start_lsn: Lsn,
    end_lsn: Lsn,
    timestamptz: int,
    wal_segment_size_bytes: int,
) -> LsnAtTimestamp:
    """Searches the LSNs from `start_lsn` to `end_lsn`, both readable.

    `commit_time` reads the time of the last commit at or below an LSN (PostgreSQL's microseconds since
    2000), None if there is none. Raises `TimestampOutsideHistoryError` when the last commit before
    `start_lsn` is already later, or unknown and so possibly later, than the moment.
    """
    last = commit_time(end_lsn)
    if last is not None and last <= timestamptz:
        return LsnAtTimestamp(end_lsn, Answer.NEWEST)
    first = commit_time(start_lsn)
    if first is None or first > timestamptz:
        raise TimestampOutsideHistoryError("the timestamp is before the history that this timeline keeps")
    included, later = int(start_lsn), int(end_lsn)
    while later - included > 1:
        middle = (included + later) // 2
        time = commit_time(Lsn(middle))
        if time is not None and time > timestamptz:
            later = middle
        else:
            included = middle
    cut = record_end(later - 1, wal_segment_size_bytes)
    return LsnAtTimestamp(max(start_lsn, cut), Answer.BETWEEN)
