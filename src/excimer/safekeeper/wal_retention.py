"""Which WAL of a timeline nobody needs any more: what is decided from, and the decision (D2).

::

    removed |<------------------- kept ------------------------------------------------------->
            first of:  durable in object storage      (the pageserver says it)
                       horizon: all members have it   (the proposer says it; they repair each other)
                       the slowest reader's position  (at most `reader_wal_size_bytes_max` behind durable)
                       this safekeeper's commit LSN   (where its next start begins to read)

Whole segments go, oldest first. A reader that has gone keeps its position for a while, because it comes again
where it was.

Not here: removing files (`timeline`, `wal_storage`); who may say what is durable (`timeline_door`).
"""

from dataclasses import dataclass
from typing import NamedTuple

from excimer.base.clock import Monotonic
from excimer.base.lsn import Lsn

READER_RETURN_S = 60.0
"""How long WAL is kept for a reader that is gone."""


class WalNeeds(NamedTuple):
    """What the WAL of one timeline is needed for; each below is needed by nobody for that reason."""

    durable_lsn: Lsn
    horizon_lsn: Lsn
    commit_lsn: Lsn
    reader_lsns: tuple[Lsn, ...] = ()


class Floor(NamedTuple):
    lsn: Lsn
    """WAL below may go."""
    reason: str
    """What keeps it from being higher: ``object_storage``, ``safekeeper``, ``reader`` or ``commit``."""


def plan_floor(needs: WalNeeds, reader_wal_size_bytes_max: int) -> Floor:
    """The lowest of what is needed; of equal ones the first named."""
    slowest_lsn = min(needs.reader_lsns, default=needs.durable_lsn)
    return min(
        Floor(needs.durable_lsn, "object_storage"),
        Floor(needs.horizon_lsn, "safekeeper"),
        Floor(Lsn(max(slowest_lsn, needs.durable_lsn - reader_wal_size_bytes_max)), "reader"),
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
