"""Which WAL of a timeline nobody needs any more: what is decided from, and the decision (D2).

::

    removed |<------------------- kept ------------------------------------------------------->
            first of:  durable in object storage      (the pageserver says it)
                       horizon: all members have it   (the proposer says it; they repair each other;
                                                       at most `member_size_bytes` behind durable)
                       the slowest reader's position  (at most `reader_size_bytes` behind durable)
                       this safekeeper's commit LSN   (where its next start begins to read)

Whole segments go, oldest first. A reader that has gone keeps its position for a while, because it comes again
where it was.

A safekeeper that lags further than that skips what is gone (`consensus`). Without a compute nobody brings
it up, so after a while nothing is kept for it.

Not here: removing files (`timeline`, `wal_storage`); who may say what is durable (`timeline_door`).
"""

from dataclasses import dataclass
from typing import NamedTuple

from excimer.base.clock import Monotonic
from excimer.base.lsn import Lsn

READER_RETURN_S = 60.0
"""How long WAL is kept for a reader that is gone."""


WRITER_RETURN_S = 60.0
"""How long after the last proposer WAL is kept for safekeepers that lag."""


class WalLimits(NamedTuple):
    """How far behind what is durable in object storage WAL is kept at most."""

    reader_size_bytes: int
    member_size_bytes: int
    """For safekeepers that lack it."""


class WalNeeds(NamedTuple):
    """What the WAL of one timeline is needed for; each below is needed by nobody for that reason."""

    durable_lsn: Lsn
    horizon_lsn: Lsn
    commit_lsn: Lsn
    reader_lsns: tuple[Lsn, ...] = ()
    has_writer: bool = True
    """A proposer is connected, or was a moment ago."""

    def member_floor_lsn(self, limits: WalLimits) -> Lsn:
        """Below, no WAL is kept for safekeepers that lag."""
        kept_size_bytes = limits.member_size_bytes if self.has_writer else 0
        return Lsn(max(self.horizon_lsn, self.durable_lsn - kept_size_bytes))


class Floor(NamedTuple):
    lsn: Lsn
    """WAL below may go."""
    reason: str
    """What keeps it from being higher: ``object_storage``, ``safekeeper``, ``reader`` or ``commit``."""


def plan_floor(needs: WalNeeds, limits: WalLimits) -> Floor:
    """The lowest of what is needed; of equal ones the first named."""
    slowest_lsn = min(needs.reader_lsns, default=needs.durable_lsn)
    return min(
        Floor(needs.durable_lsn, "object_storage"),
        Floor(needs.member_floor_lsn(limits), "safekeeper"),
        Floor(Lsn(max(slowest_lsn, needs.durable_lsn - limits.reader_size_bytes)), "reader"),
        Floor(needs.commit_lsn, "commit"),
        key=lambda floor: floor.lsn,
    )


@dataclass(slots=True)
class ReaderPosition:
    """A connected reader's: WAL below it need not be sent to it again."""

    lsn: Lsn


class ReaderPositions:
    """Of one timeline. Belongs to the event loop."""

    def __init__(self) -> None:
        self._present: list[ReaderPosition] = []
        self._gone: list[tuple[Lsn, Monotonic]] = []

    def enter(self, lsn: Lsn) -> ReaderPosition:
        position = ReaderPosition(lsn)
        self._present.append(position)
        return position

    def leave(self, position: ReaderPosition, now: Monotonic) -> None:
        self._present = [each for each in self._present if each is not position]
        self._gone.append((position.lsn, Monotonic(now + READER_RETURN_S)))

    def lsns(self, now: Monotonic) -> tuple[Lsn, ...]:
        """Of those that are there, and of those that may come again."""
        self._gone = [(lsn, until) for lsn, until in self._gone if until > now]
        return (*(each.lsn for each in self._present), *(lsn for lsn, _ in self._gone))
