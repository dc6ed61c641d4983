"""How much WAL a compute may make while others cannot follow: decided from positions and time, no I/O.

::

    written ---- queue ----> committed ------- lag -------> ingested
             (safekeepers)                 (pageserver)

*Bulk writers* are slowed by tickets, a byte of WAL each, that libhydrate takes for whatever a process makes
above a small allowance (`csrc/libhydrate/throttle.c`). Tickets are given at the rate at which safekeepers
commit, times a factor that falls with the queue, and at the rate at which the pageserver ingests, times one
that falls with the lag, whichever is less. So the queue, behind which each small commit waits, stays short,
and the lag settles where writers are as fast as ingest. What is above these is held by two more stages, in
eighths of the most lag M::

    0 ----- 1 ------------------------ 6 ------- 7 --------- 8
    | twice | of the ingest rate ... 0 | bulk    | commits   | nobody writes
    |                                  | stops   | wait      | to pg_wal

*Commits* wait for their confirmation, without a lock: that holds thousands of small writers. *pg_wal* is
not written beyond the limit: that holds who makes WAL without a system call; its wait stops every writer.
Readers wait for none of these, unless they need room in PostgreSQL's own WAL buffers while the last one
holds.

A pageserver that ingests nothing stops its computes' writers after M, and no commit is refused for it (B1).
A record that is longer than M passes: while everything committed is ingested, the limit follows what
safekeepers take.

Not here: asking the pageserver, telling libhydrate and the proposer (`backpressure`).
"""

import math
from typing import Final, NamedTuple

from excimer.base.lsn import MAX_LSN, Lsn

EIGHTHS_FREE: Final = 1
EIGHTHS_BULK_STOP: Final = 6
EIGHTHS_COMMIT: Final = 7
QUEUE_FREE_S: Final = 0.01
QUEUE_STOP_S: Final = 0.06
"""How long a commit may wait for the bulk WAL before it, at the rate of the safekeepers."""
QUEUE_FREE_BYTES_MIN: Final = 512 << 10
QUEUE_STOP_BYTES_MIN: Final = 1 << 20
FACTOR_MAX: Final = 2.0
RATE_BYTES_PER_S_FIRST: Final = 64 << 20
RATE_BYTES_PER_S_MIN: Final = 8 << 20
"""Of what is learned: whoever stood still must come back to speed soon. The factor falls to 0 as ever."""
RATE_MEMORY_S: Final = 1.5
"""Ingest goes by chunks, and halts for some hundred milliseconds when compaction is behind."""
UNUSED_S_MAX: Final = 0.05
"""Tickets that nobody took are kept for so long, ..."""
UNUSED_BYTES_QUIET: Final = 8 << 20
"""... and so many while nobody writes: a first load need not wait for the next look."""
UNLIMITED: Final = (1 << 64) - 1


class Positions(NamedTuple):
    """What the manager sees at one moment."""

    written_lsn: Lsn
    """How far PostgreSQL has written WAL."""
    received_lsn: Lsn
    """How far the proposer has that."""
    commit_lsn: Lsn
    ingested_lsn: Lsn
    """How far the pageserver is, as far as is known."""
    bulk_bytes: int
    """Tickets that processes have taken, ever."""


class Limits(NamedTuple):
    """What is allowed until the next look."""

    allowed_bytes: int
    """Tickets for bulk WAL, ever; `UNLIMITED`."""
    confirm_lsn: Lsn
    """Commits up to here are confirmed."""
    wal_limit_lsn: Lsn
    """Nothing is written to pg_wal beyond."""


NO_LIMITS: Final = Limits(UNLIMITED, MAX_LSN, MAX_LSN)


class LearnedRate:
    """How fast somebody can follow, in bytes per second."""

    def __init__(self, lsn: Lsn) -> None:
        self._lsn = lsn
        self._was_behind = False
        self._seen = float(RATE_BYTES_PER_S_FIRST)

    @property
    def bytes_per_s(self) -> float:
        return max(self._seen, RATE_BYTES_PER_S_MIN)

    def learn(self, passed_s: float, lsn: Lsn, *, is_behind: bool) -> None:
        """`lsn` is reached now. What was followed while nothing waited says only that so much is possible."""
        if passed_s > 0:
            now = (lsn - self._lsn) / passed_s
            if self._was_behind or now > self._seen:
                self._seen += (1 - math.exp(-passed_s / RATE_MEMORY_S)) * (now - self._seen)
        self._lsn, self._was_behind = lsn, is_behind


class BackpressurePlan:
    """`step` at each look, some fifty times a second while WAL moves."""

    def __init__(self, lag_bytes_max: int, now_s: float, start_lsn: Lsn) -> None:
        """From `start_lsn` on, which is ingested. `lag_bytes_max` 0: no limits, ever."""
        self._lag_bytes_max = lag_bytes_max
        self._now_s = now_s
        self._allowed_bytes = 0
        self.commit_rate = LearnedRate(start_lsn)
        self.ingest_rate = LearnedRate(start_lsn)

    def step(self, now_s: float, at: Positions) -> Limits:
        if not self._lag_bytes_max:
            return NO_LIMITS
        passed_s = max(0.0, now_s - self._now_s)
        self._now_s = now_s
        self.commit_rate.learn(passed_s, at.commit_lsn, is_behind=at.received_lsn > at.commit_lsn)
        self.ingest_rate.learn(passed_s, at.ingested_lsn, is_behind=at.commit_lsn > at.ingested_lsn)
        rate = min(self._queue_rate(at), self._lag_rate(at))
        is_quiet = at.written_lsn <= min(at.commit_lsn, at.ingested_lsn)
        unused = UNUSED_BYTES_QUIET if is_quiet else int(rate * UNUSED_S_MAX)
        more = self._allowed_bytes + int(rate * passed_s)
        self._allowed_bytes = at.bulk_bytes + unused if is_quiet else min(more, at.bulk_bytes + unused)
        follows = at.received_lsn if at.ingested_lsn >= at.commit_lsn else at.ingested_lsn
        return Limits(
            self._allowed_bytes,
            Lsn(at.ingested_lsn + EIGHTHS_COMMIT * (self._lag_bytes_max // 8)),
            Lsn(max(follows, at.ingested_lsn) + self._lag_bytes_max),
        )

    def _queue_rate(self, at: Positions) -> float:
        rate = self.commit_rate.bytes_per_s
        free = max(QUEUE_FREE_BYTES_MIN, QUEUE_FREE_S * rate)
        stop = max(QUEUE_STOP_BYTES_MIN, QUEUE_STOP_S * rate)
        return rate * _factor(at.written_lsn - at.commit_lsn, free, stop)

    def _lag_rate(self, at: Positions) -> float:
        """With what is written and not committed yet: it will all have to be ingested."""
        eighth = self._lag_bytes_max / 8
        behind = max(at.written_lsn, at.commit_lsn) - at.ingested_lsn
        return self.ingest_rate.bytes_per_s * _factor(
            behind, EIGHTHS_FREE * eighth, EIGHTHS_BULK_STOP * eighth
        )


def _factor(behind: float, free: float, stop: float) -> float:
    """From `FACTOR_MAX` at `free` down to 0 at `stop`."""
    return FACTOR_MAX * min(1.0, max(0.0, (stop - behind) / (stop - free)))
