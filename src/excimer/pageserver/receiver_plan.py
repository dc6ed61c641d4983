"""From which safekeeper a timeline takes its WAL: decided from what is known of each.

::

    DISCONNECTED --choose_source--> CONNECTED --lost, refused--> back-off of that source, choose again
                                        |
                                        +--stalled while another has more--> the same

Every safekeeper serves the same committed WAL, so any will do; the one with the highest commit LSN
has most to give. A source that failed is left alone for a while, longer each time, unless there is
no other.

Not here: sockets and time (`wal_receiver`); which safekeepers a timeline should have.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from excimer.base.address import Address
from excimer.base.clock import Monotonic
from excimer.base.lsn import INVALID_LSN, Lsn

STALL_TIMEOUT_S = 3.0
"""A source that sends nothing for so long is left if another is known to have more."""
IDLE_S = 20.0
"""An idle timeline gives up its connection: there may be thousands, and news comes through the broker."""
BACKOFF_S_MIN = 0.2
BACKOFF_S_MAX = 2.0
"""Short, because computes wait for the pageserver when all safekeepers come back together."""


class Source(NamedTuple):
    address: Address
    commit_lsn: Lsn
    """The newest that was heard; 0 for an address from the settings, of which nothing is known."""
    durable_lsn: Lsn = INVALID_LSN
    """What it was heard to know of object storage."""


class Failure(NamedTuple):
    """How often a source has failed in a row, and until when it is left alone."""

    times: int
    until: Monotonic


def next_failure(last: Failure | None, now: Monotonic) -> Failure:
    """The back-off doubles with each failure in a row."""
    times = 1 if last is None else last.times + 1
    delay_s = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2.0 ** min(times - 1, 30))
    return Failure(times, Monotonic(now + delay_s))


def choose_source(
    sources: Iterable[Source],
    failures: Mapping[Address, Failure],
    now: Monotonic,
    idle_lsn: Lsn | None = None,
) -> Source | None:
    """The source to connect to now: most WAL first, then fewest failures; None when all must rest.

    With `idle_lsn`, up to which all WAL is here and durable, only one that has more, or may have.
    """
    rested = [
        source
        for source in sources
        if (source.address not in failures or failures[source.address].until <= now)
        and (idle_lsn is None or is_ahead(source, idle_lsn))
    ]
    return min(
        rested,
        key=lambda source: (
            -source.commit_lsn,
            failures[source.address].times if source.address in failures else 0,
            source.address,
        ),
        default=None,
    )


def is_ahead(source: Source, lsn: Lsn) -> bool:
    """Whether the source has, or for all we know may have, WAL above `lsn`."""
    return source.commit_lsn > lsn or source.commit_lsn == INVALID_LSN


def is_idle(
    sources: Iterable[Source], received_lsn: Lsn, durable_lsn: Lsn, last_received: Monotonic, now: Monotonic
) -> bool:
    """Whether the connection may go: all WAL is here and durable, and for a while there was no more."""
    return (
        now - last_received >= IDLE_S
        and durable_lsn >= received_lsn
        and not any(is_ahead(source, received_lsn) for source in sources)
    )


def wait_s(failures: Mapping[Address, Failure], now: Monotonic) -> float | None:
    """How long to wait for news when there is no source now: until one has rested; None for ever."""
    rests = [failure.until - now for failure in failures.values() if failure.until > now]
    return min(rests, default=None)


def is_stalled(
    sources: Iterable[Source], current: Address, received_lsn: int, last_received: Monotonic, now: Monotonic
) -> bool:
    """Whether `current` has sent nothing for too long although another source has more."""
    if now - last_received < STALL_TIMEOUT_S:
        return False
    return any(source.commit_lsn > received_lsn for source in sources if source.address != current)
