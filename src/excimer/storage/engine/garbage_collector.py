"""One timeline's garbage collection: a cutoff is announced and made durable, what nobody retains goes (S3).

In this order, each step safe to be the last one:

1. the cutoff is announced: no branch or lease comes to hold anything below it (`plan.retention`);
2. a manifest says so: reads below it are refused, now and after a restart;
3. images of all keys at the cutoff are written if they pay, piece by piece, as the compactor writes any;
4. a manifest no longer names the layers that no retained LSN needs;
5. they are deleted (`deletion_queue`).

While it is not known who holds what (`Retention.find_standstill`), none of it is done: not even a cutoff
moves.

No lock is held against branching: a branch that is being made at this moment holds its point already, or
comes to hear that the cutoff has passed it.

Not here: which layers (`excimer.storage.plan.gc_plan`), when to collect and where time began (the host).
"""

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from excimer.base.errors import ConflictError, RetryableError
from excimer.base.lsn import Lsn, record_end
from excimer.storage.engine.compactor import CompactedTimeline, Compactor
from excimer.storage.engine.image_round_job import estimate_live_keys
from excimer.storage.engine.layer_stack import LayerStack
from excimer.storage.format.manifest import Manifest
from excimer.storage.plan.compaction_plan import IMAGE_SIZE_ESTIMATE_BYTES
from excimer.storage.plan.gc_plan import BottomRound, find_bottom_round, image_size_bytes, plan_gc
from excimer.storage.plan.retention import RetainedLsns, Retention, plan_cutoff

_log = logging.getLogger(__name__)


class GcTooEarlyError(RetryableError):
    """Leases that others hold may not have been renewed yet since the tenant was attached."""

    def __init__(self, timeline_id: str, wait_s: float) -> None:
        super().__init__(
            f"timeline {timeline_id} was attached a moment ago: garbage is collected in {wait_s:.0f} s, when "
            "everyone who holds a lease has had time to renew it"
        )
        self.wait_s = wait_s


class GcStandsStillError(ConflictError):
    """What history is needed is not known: none of it may go."""

    def __init__(self, timeline_id: str, reason: str) -> None:
        super().__init__(f"garbage collection of timeline {timeline_id} stands still: {reason}")


@dataclass(frozen=True)
class GcOutcome:
    cutoff_lsn: Lsn
    held_points: int
    """Below the cutoff: branch points and leases."""
    layers_removed: int
    removed_bytes: int
    has_written_images: bool


class CollectedTimeline(CompactedTimeline, Protocol):
    retention: Retention
    compaction_lock: asyncio.Lock
    wal_segment_size_bytes: int

    @property
    def manifest(self) -> Manifest: ...
    @property
    def last_record_lsn(self) -> Lsn: ...
    @property
    def disk_consistent_lsn(self) -> Lsn: ...
    async def compact(self) -> bool: ...


class GarbageCollector:
    def __init__(self, timeline: CollectedTimeline, compactor: Compactor) -> None:
        self._timeline = timeline
        self._compactor = compactor
        self._collecting = asyncio.Lock()
        self._is_damaged = False
        """Images at a cutoff could not be made whole: more of them would be no better."""

    async def collect(self, time_lsn: Lsn) -> GcOutcome:
        """`time_lsn`: where the timeline stood when the retained window of time begins.

        Raises `GcStandsStillError`, `GcTooEarlyError`, and as flushes, reads and uploads do; call it again
        then.
        """
        async with self._collecting:
            self._check_branches_known()
            self._check_leases_renewed()
            cutoff_lsn = await self._advance(time_lsn)
            has_written = await self._write_bottom_images()
            removed, retained = await self._remove()
        outcome = GcOutcome(cutoff_lsn, len(retained.points), *removed, has_written)
        self._timeline.context.counters.garbage_collected(outcome.removed_bytes)
        if outcome.layers_removed:
            _log.info(
                "timeline %s: collected %d layers, %d bytes",
                self._timeline.home.timeline_id,
                outcome.layers_removed,
                outcome.removed_bytes,
            )
        return outcome

    def _check_branches_known(self) -> None:
        reason = self._timeline.retention.find_standstill()
        if reason is not None:
            raise GcStandsStillError(self._timeline.home.timeline_id, reason)

    def _check_leases_renewed(self) -> None:
        timeline = self._timeline
        wait_s = timeline.retention.gc_wait_s(_now_s(), timeline.settings.lsn_lease_length_s)
        if wait_s > 0:
            raise GcTooEarlyError(timeline.home.timeline_id, wait_s)

    async def _advance(self, time_lsn: Lsn) -> Lsn:
        timeline = self._timeline
        async with timeline.compaction_lock:
            cutoff_lsn = plan_cutoff(
                time_lsn=time_lsn,
                last_record_lsn=timeline.last_record_lsn,
                gc_horizon_bytes=timeline.settings.gc_horizon_bytes,
                disk_consistent_lsn=timeline.disk_consistent_lsn,
                held_lsn=timeline.retention.held_onwards(_now_s()),
            )
            timeline.retention.raise_cutoff(record_end(cutoff_lsn, timeline.wal_segment_size_bytes))
            announced_lsn = timeline.retention.cutoff_lsn
            if announced_lsn > timeline.manifest.oldest_lsn:
                await timeline.commits.advance_oldest_lsn(announced_lsn)
            return announced_lsn

    async def _write_bottom_images(self) -> bool:
        """Whether it has. Merges and flushes go on between the pieces."""
        timeline = self._timeline
        await self._finish_round()
        async with timeline.compaction_lock:
            bottom = await timeline.in_thread(partial(self._worthwhile_round, self._retained()))
            if bottom is None or self._is_damaged:
                return False
            async with timeline.context.compaction_slots:
                await self._compactor.write_piece(bottom.plan)
        await self._finish_round()
        self._is_damaged = not any(
            run.end_lsn == bottom.plan.lsn and run.covers_after_lsn is not None
            for run in timeline.stack.disk.image_runs
        )
        return True

    async def _finish_round(self) -> None:
        while self._has_unfinished_round() and await self._timeline.compact():
            pass

    def _has_unfinished_round(self) -> bool:
        layers = self._timeline.manifest.layers
        return any(layer.round_after_lsn is not None for layer in layers)

    def _worthwhile_round(self, retained: RetainedLsns) -> BottomRound | None:
        timeline = self._timeline
        if self._has_unfinished_round():
            return None
        bottom = find_bottom_round(timeline.stack.disk, retained, start_lsn=timeline.ancestor_lsn)
        if bottom is None:
            return None
        live_keys = estimate_live_keys(timeline, retained.cutoff_lsn)
        return bottom if bottom.is_worth_it(live_keys, self._image_size_bytes()) else None

    def _image_size_bytes(self) -> float:
        """On average, as in the nearest images of all keys, an ancestor's perhaps."""
        stack: LayerStack | None = self._timeline.stack
        while stack is not None:
            size = image_size_bytes(stack.disk)
            if size is not None:
                return size
            stack = None if stack.ancestry is None else stack.ancestry.timeline.stack
        return IMAGE_SIZE_ESTIMATE_BYTES

    async def _remove(self) -> tuple[tuple[int, int], RetainedLsns]:
        timeline = self._timeline
        async with timeline.compaction_lock:
            retained = self._retained()
            plan = await timeline.in_thread(partial(plan_gc, timeline.stack.disk, retained))
            if plan.removable:
                await timeline.commits.replace_layers([], plan.removable)
        return (len(plan.removable), plan.size_bytes), retained

    def _retained(self) -> RetainedLsns:
        """Nothing counts as passed that no durable manifest calls so."""
        retained = self._timeline.retention.retained(_now_s())
        durable_lsn = Lsn(self._timeline.manifest.oldest_lsn)
        return retained._replace(cutoff_lsn=min(retained.cutoff_lsn, durable_lsn))


def _now_s() -> float:
    return asyncio.get_running_loop().time()
