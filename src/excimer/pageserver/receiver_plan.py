"""From which safekeeper a timeline takes its WAL: decided from what is known of each.

::

    DISCONNECTED --choose_source--> CONNECTED --lost, refused--> back-off of that source, choose again
                                        |
                                        +--stalled while another has more--> the same

Every safekeeper serves the same committed WAL, so any will do; the one with the highest commit LSN
has most to give. A source that failed is left alone for a while, longer each time, unless there is
no other.

A commit LSN that somebody claims is a hint: it counts as far as a majority of the members claim as much, and
what was not delivered in time is not waited for again. So neither one safekeeper nor one message can make a
timeline prefer a source for ever, or wait for WAL that does not exist; that costs a look, once.

Not here: sockets and time (`wal_receiver`); which safekeepers a timeline should have (the controller's).
"""

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from excimer.base.address import Address
from excimer.base.clock import Monotonic
from excimer.base.ids import NodeId
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
    """What it claims, but no more than a majority claims; 0 while nothing is known."""
    durable_lsn: Lsn = INVALID_LSN
    """What it was heard to know of object storage."""
    claimed_lsn: Lsn = INVALID_LSN
    """What it claims itself: a reason to look, and nothing else."""


class Failure(NamedTuple):
    """How often a source has failed in a row, and until when it is left alone."""

    times: int
    until: Monotonic


def confirmed_sources(
    members: Mapping[NodeId, Address], claims: Mapping[NodeId, Lsn], durable: Mapping[NodeId, Lsn]
) -> list[Source]:
    """All members, each with what it claims up to what a majority of them claims. Other claims are nobody's.

    While a majority is silent nothing is confirmed, and every member is as good as unknown.
    """
    heard = sorted((claims[member] for member in members if member in claims), reverse=True)
    needed = len(members) // 2 + 1
    confirmed_lsn = heard[needed - 1] if len(heard) >= needed else INVALID_LSN
    return [
        Source(
            address,
            Lsn(min(claims.get(member, INVALID_LSN), confirmed_lsn)),
            durable.get(member, INVALID_LSN),
            claims.get(member, INVALID_LSN),
        )
        for member, address in members.items()
    ]


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
    disbelieved_lsn: Lsn = INVALID_LSN,
) -> Source | None:
    """The source to connect to now: most WAL first, then fewest failures; None when all must rest.

    With `idle_lsn`, up to which all WAL is here and durable, only one that has more, or may have, or claims
    more than `disbelieved_lsn`, which nobody has delivered.
    """
    rested = [
        source
        for source in sources
        if (source.address not in failures or failures[source.address].until <= now)
        and (
            idle_lsn is None
            or is_ahead(source, idle_lsn)
            or source.claimed_lsn > max(idle_lsn, disbelieved_lsn)
        )
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


def is_idle(sources: Iterable[Source], received_lsn: Lsn, last_received: Monotonic, now: Monotonic) -> bool:
    """Whether the connection may go, if all is durable: all is here, and for a while there was no more."""
    return now - last_received >= IDLE_S and not any(is_ahead(source, received_lsn) for source in sources)


def wait_s(failures: Mapping[Address, Failure], now: Monotonic) -> float | None:
    """How long to wait for news when there is no source now: until one has rested; None for ever."""
    rests = [failure.until - now for failure in failures.values() if failure.until > now]
    return min(rests, default=None)


def is_stalled(
    sources: Iterable[Source],
    silent: Container[Address],
    received_lsn: int,
    last_received: Monotonic,
    now: Monotonic,
) -> bool:
    """Whether nothing has come for too long although a source has more that is not among the `silent`.

    These are the current one, and those that were left for the same reason since WAL came last: a claim
    that all of them fail to deliver is not followed round and round.
    """
    if now - last_received < STALL_TIMEOUT_S:
        return False
    return any(source.commit_lsn > received_lsn for source in sources if source.address not in silent)
