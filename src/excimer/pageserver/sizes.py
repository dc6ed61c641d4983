"""Sizes of a tenant and its timelines: what users see, what disks and object storage hold, what is billed.

A *logical* size is that of all relations at an LSN. It is summed over the relations' sizes when somebody
asks, and kept: at a past LSN for ever, for it no longer changes, at the head until WAL comes, and then
for as long as the asker says an older figure will do. Nobody asks: it costs nothing.

Not here: the synthetic size's formula (`excimer.storage.plan.tenant_size`).
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from excimer.base.ids import TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, KeyKind, kind_range
from excimer.base.lsn import Lsn
from excimer.pageserver.model import DamagedTimeline, TenantSizes, TimelineSizes
from excimer.storage.engine.errors import LsnTooOldError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.relation_size import size_blocks
from excimer.storage.plan.tenant_size import TimelineHistory, plan_points, sizes_wanted, synthetic_size

PAST_SIZES_MAX = 256
"""Remembered per timeline: more LSNs than this are seldom held below a cutoff."""

TRIES_MAX = 3

LIST_AGE_S = 10.0
"""How old the sizes in a list of all timelines may be."""


@dataclass(frozen=True, slots=True)
class HeadSize:
    lsn: Lsn
    size_bytes: int
    read_at_s: float


class LogicalSizes:
    """Of one timeline."""

    def __init__(
        self, store: Timeline, now_s: Callable[[], float], tell: Callable[[int], object] = lambda _: None
    ) -> None:
        """`tell` hears of each size that was computed for the head."""
        self._store = store
        self._now_s = now_s
        self._tell = tell
        self._past: dict[Lsn, int] = {}
        self.newest: HeadSize | None = None
        """The last that was computed for the head; None before anybody asked."""

    async def at_head(self, max_age_s: float = 0.0) -> int:
        """At the newest LSN, or at one that was the newest `max_age_s` ago."""
        lsn, known = self._store.last_record_lsn, self.newest
        if known is not None and (known.lsn == lsn or self._now_s() - known.read_at_s < max_age_s):
            return known.size_bytes
        size = await asyncio.to_thread(read_logical_size, self._store, lsn)
        self.newest = HeadSize(lsn, size, self._now_s())
        self._tell(size)
        return size

    async def at(self, lsn: Lsn) -> int:
        """At an LSN that is readable. Raises as reads do."""
        if lsn not in self._past:
            size = await asyncio.to_thread(read_logical_size, self._store, lsn)
            if len(self._past) >= PAST_SIZES_MAX:
                self._past.clear()
            self._past[lsn] = size
        return self._past[lsn]


def read_logical_size(store: Timeline, lsn: Lsn) -> int:
    """Blocks of all relations and forks, in bytes. Blocks."""
    sizes = store.scan(*kind_range(KeyKind.RELATION_SIZE), lsn)
    return sum(size_blocks(value) for _, value in sizes) * BLOCK_SIZE_BYTES


def remote_size_bytes(store: Timeline) -> int:
    """What the timeline's own layers take in object storage."""
    return sum(layer.size_bytes for layer in store.stack.disk.descriptions)


def resident_size_bytes(store: Timeline) -> int:
    """What of them lies on the local disk."""
    return sum(store.context.local_disk.size_of(file) for file in store.stack.files.values())


async def tenant_sizes(
    storage: TenantStorage, logical: Mapping[TimelineId, LogicalSizes], now_s: float
) -> TenantSizes:
    """All sizes of a tenant. Raises as reads do."""
    synthetic_size_bytes = await _synthetic_size_now(storage, logical, now_s)
    timelines = [
        TimelineSizes(
            timeline_id=timeline_id,
            logical_size_bytes=await sizes.at_head(LIST_AGE_S),
            resident_size_bytes=resident_size_bytes(storage.timelines[timeline_id]),
            remote_size_bytes=remote_size_bytes(storage.timelines[timeline_id]),
        )
        for timeline_id, sizes in logical.items()
        if timeline_id in storage.timelines
    ]
    timelines += [
        TimelineSizes(
            timeline_id=archived.timeline_id,
            logical_size_bytes=None,
            resident_size_bytes=0,
            remote_size_bytes=archived.size_bytes,
        )
        for archived in storage.archived.values()
    ]
    return TenantSizes(
        synthetic_size_bytes=synthetic_size_bytes,
        archived_size_bytes=sum(each.size_bytes for each in storage.archived.values()),
        timelines=sorted(timelines, key=lambda sizes: sizes.timeline_id),
        damaged=[
            DamagedTimeline(timeline_id=each.timeline_id, reason=each.reason)
            for each in storage.damaged.values()
        ],
    )


async def _synthetic_size_now(
    storage: TenantStorage, logical: Mapping[TimelineId, LogicalSizes], now_s: float
) -> int:
    for _ in range(TRIES_MAX - 1):
        with suppress(LsnTooOldError):  # garbage collection has passed a cutoff that was just read
            return await _synthetic_size(storage, logical, now_s)
    return await _synthetic_size(storage, logical, now_s)


async def _synthetic_size(
    storage: TenantStorage, logical: Mapping[TimelineId, LogicalSizes], now_s: float
) -> int:
    histories = [each for each in _histories(storage, now_s) if each.timeline_id in logical]
    sizes = {
        (history.timeline_id, lsn): await logical[history.timeline_id].at(lsn)
        for history in histories
        for lsn in sizes_wanted(history)
    }
    return synthetic_size(plan_points(histories, sizes)).size_bytes


def _histories(storage: TenantStorage, now_s: float) -> list[TimelineHistory]:
    """Live timelines, each after the one in whose history it begins."""
    found: list[TimelineHistory] = []
    for timeline in _homes_first(storage):
        retained = timeline.retention.retained(now_s)
        start_lsn = timeline.ancestor_lsn
        cutoff_lsn = max(retained.cutoff_lsn, start_lsn)
        begun = {
            lsn for child, lsn in timeline.retention.branch_points().items() if child in storage.timelines
        }
        held = {*retained.points, *timeline.retention.branch_points().values()} - begun
        found.append(
            TimelineHistory(
                timeline_id=timeline.timeline_id,
                home_id=_home_id(timeline),
                start_lsn=start_lsn
                if timeline.ancestor is not None
                else Lsn(min({cutoff_lsn, *held, *begun})),
                cutoff_lsn=Lsn(cutoff_lsn),
                head_lsn=max(timeline.last_record_lsn, Lsn(cutoff_lsn)),
                held=frozenset(held),
                branch_points=frozenset(begun),
            )
        )
    return found


def _home_id(timeline: Timeline) -> TimelineId | None:
    """In whose own history it begins."""
    if timeline.ancestor is None:
        return None
    return timeline.ancestor.home_of(timeline.ancestor_lsn).timeline_id


def _homes_first(storage: TenantStorage) -> list[Timeline]:
    ordered: dict[TimelineId, Timeline] = {}
    for timeline in storage.timelines.values():
        line = []
        at: Timeline | None = timeline
        while at is not None and at.timeline_id not in ordered:
            line.append(at)
            at = at.ancestor
        ordered |= {each.timeline_id: each for each in reversed(line)}
    return list(ordered.values())
