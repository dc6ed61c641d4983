"""The LSN at a moment: the newest one at which no commit later than a timestamp has happened yet.

Every commit record leaves its time under the key COMMIT_TIME, so the newest value at an LSN is the
time of the last commit before it. Times grow with LSNs but for the small disorder of concurrent
commits, which record their time shortly before they take their place in the WAL: the answer is
exact for commits further apart than that. A binary search over LSNs reads some forty values.

Not here: waiting for WAL, what to do with the LSN.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

from excimer.base.clock import POSTGRES_EPOCH_UNIX_S
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
        raise TimestampOutsideHistoryError(
            "the timestamp is before the history that this timeline keeps"
            + ("" if first is None else f", which begins at {_text_of(first)}")
        )
    later = _first_later(commit_time, start_lsn, end_lsn, timestamptz)
    cut = record_end(later - 1, wal_segment_size_bytes)
    return LsnAtTimestamp(max(start_lsn, cut), Answer.BETWEEN)


def _text_of(timestamptz: int) -> str:
    """Rounded up to a second, so that it can be given back as it stands."""
    whole = POSTGRES_EPOCH_UNIX_S - (-timestamptz // 1_000_000)
    return datetime.fromtimestamp(whole, UTC).isoformat().replace("+00:00", "Z")


class WindowStart(NamedTuple):
    lsn: Lsn
    """Where the timeline stood when the window began."""
    next_commit: int | None
    """When the first commit after it happened (timestamptz); None if there is none."""


def find_window_start(
    commit_time: Callable[[Lsn], int | None], start_lsn: Lsn, end_lsn: Lsn, timestamptz: int
) -> WindowStart:
    """What has to be kept to show every state since a moment: from the answer on.

    Unlike above, what is before the first commit that is known counts as older than any moment: it shows
    what that commit found. Where no commit is known nothing is given up.
    """
    last = commit_time(end_lsn)
    if last is None:
        return WindowStart(start_lsn, None)
    if last <= timestamptz:
        return WindowStart(end_lsn, None)
    first = commit_time(start_lsn)
    if first is not None and first > timestamptz:
        return WindowStart(start_lsn, first)
    later = _first_later(commit_time, start_lsn, end_lsn, timestamptz)
    return WindowStart(Lsn(later - 1), commit_time(Lsn(later)))


def _first_later(
    commit_time: Callable[[Lsn], int | None], start_lsn: Lsn, end_lsn: Lsn, timestamptz: int
) -> int:
    """The end of the first commit later than a moment, which lies between the two."""
    included, later = int(start_lsn), int(end_lsn)
    while later - included > 1:
        middle = (included + later) // 2
        time = commit_time(Lsn(middle))
        if time is not None and time > timestamptz:
            later = middle
        else:
            included = middle
    return later
