"""Removes WAL that nobody needs any more, of all timelines, a second after that became so.

Not here: what is needed (`wal_retention`), how it is removed (`timeline`).
"""

import asyncio
from collections import Counter

from excimer.base.clock import Clock
from excimer.base.ids import TimelineId
from excimer.safekeeper.metrics import SafekeeperMetrics
from excimer.safekeeper.registry import TimelineRegistry
from excimer.safekeeper.settings import SafekeeperSettings
from excimer.safekeeper.timeline import SafekeeperTimeline
from excimer.safekeeper.wal_retention import Floor, WalLimits, WalNeeds, plan_floor
from excimer.service.health import Health
from excimer.service.logs import get_logger

REMOVE_INTERVAL_S = 1.0
WARN_AT = 0.5
"""Part of the limit for safekeepers that lag from which on it is said."""
REASONS = ("object_storage", "safekeeper", "reader", "commit")

log = get_logger(__name__)


class WalRemover:
    def __init__(
        self,
        timelines: TimelineRegistry,
        settings: SafekeeperSettings,
        clock: Clock,
        metrics: SafekeeperMetrics,
        health: Health,
    ) -> None:
        self._timelines = timelines
        self._limits = WalLimits(
            reader_size_bytes=settings.reader_wal_max_mib << 20,
            member_size_bytes=settings.lagging_safekeeper_wal_max_mib << 20,
        )
        self._health = health
        self._clock = clock
        self._metrics = metrics
        self._sizes: dict[TimelineId, tuple[tuple[int, int], int]] = {}
        """What the segments take, and where the WAL ended and began when they were looked at."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.step()
            await asyncio.sleep(REMOVE_INTERVAL_S)

    def floor(self, timeline: SafekeeperTimeline) -> Floor:
        """Below which nobody needs the timeline's WAL, and why it is not higher."""
        return plan_floor(timeline.wal_needs(self._clock.monotonic()), self._limits)

    async def step(self) -> None:
        """One look at all timelines."""
        kept: Counter[str] = Counter()
        lagging: list[tuple[int, TimelineId]] = []
        for timeline in self._timelines.all():
            needs = timeline.wal_needs(self._clock.monotonic())
            floor = plan_floor(needs, self._limits)
            if self._lags_far(needs):
                lagging.append((needs.durable_lsn - needs.horizon_lsn, timeline.identity.timeline_id))
            kept[floor.reason] += max(0, timeline.commit_lsn - floor.lsn)
            if timeline.has_removable_wal(floor):
                await self._remove(timeline, floor)
        for reason in REASONS:
            self._metrics.kept_bytes.labels(reason).set(kept[reason])
        self._health.warn("safekeeper that lags", self._describe(lagging))
        self._metrics.stored_bytes.set(
            await asyncio.to_thread(self._stored_size_bytes, self._timelines.all())
        )

    def _lags_far(self, needs: WalNeeds) -> bool:
        """Whether another safekeeper is about to lose its place, or has lost it."""
        lag_size_bytes = needs.durable_lsn - needs.horizon_lsn
        return needs.has_writer and lag_size_bytes > self._limits.member_size_bytes * WARN_AT

    def _describe(self, lagging: list[tuple[int, TimelineId]]) -> str | None:
        if not lagging:
            return None
        size_bytes, timeline_id = max(lagging)
        limit_mib = self._limits.member_size_bytes >> 20
        return (
            f"another safekeeper lacks {size_bytes >> 20} MiB of WAL of timeline {timeline_id}"
            f"{f' and some of {len(lagging) - 1} more' if len(lagging) > 1 else ''}: start it; beyond "
            f"{limit_mib} MiB (lagging_safekeeper_wal_max_mib) the rest goes, and it will skip that"
        )

    def _stored_size_bytes(self, timelines: list[SafekeeperTimeline]) -> int:
        """Looks only at directories in which segments may have come or gone. Blocks."""
        sizes: dict[TimelineId, tuple[tuple[int, int], int]] = {}
        for timeline in timelines:
            timeline_id = timeline.identity.timeline_id
            step = timeline.flush_lsn // (timeline.identity.wal_segment_size_bytes // 4)
            seen = step, timeline.wal_start_lsn
            before = self._sizes.get(timeline_id)
            is_same = before is not None and before[0] == seen
            sizes[timeline_id] = before if before and is_same else (seen, timeline.stored_size_bytes)
        self._sizes = sizes
        return sum(size_bytes for _, size_bytes in sizes.values())

    async def _remove(self, timeline: SafekeeperTimeline, floor: Floor) -> None:
        """A disk that refuses is asked again at the next look."""
        try:
            self._metrics.removed_bytes.inc(await asyncio.to_thread(timeline.remove_wal, floor))
        except OSError as error:
            log.warning("WAL not removed", timeline_id=timeline.identity.timeline_id, error=error)
