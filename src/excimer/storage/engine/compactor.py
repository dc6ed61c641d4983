"""One timeline's compaction, step by step: plans from the layer map, does a step, commits it.

A step is a whole merge or a piece of a round of images. It starts from nothing but what the manifest says
and ends with a manifest, or leaves no trace: so a crash, an error or a restart between any two
operations is followed by the same plan, or by a better one if more has been flushed meanwhile.

Compactions take turns: CONTEXT.compaction_slots of them at a time in a process, each using one thread at a
time, and each step is short, so that readers find threads and redo workers free.

Not here: what to do (`excimer.storage.plan.compaction_plan`), merging (`merge_job`), making images
(`image_round_job`), when to try (`Timeline.run`).
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import msgspec

from excimer.base.errors import CorruptionError
from excimer.base.lsn import Lsn
from excimer.storage.engine.engine_counters import WrittenBy
from excimer.storage.engine.image_round_job import RoundSource, write_round_piece
from excimer.storage.engine.layer_writing import upload_layer
from excimer.storage.engine.leftovers import Leftovers
from excimer.storage.engine.merge_job import MergeJob
from excimer.storage.engine.timeline_commits import TimelineCommits
from excimer.storage.format.layer_file import DamagedLayerError
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.format.tenant_settings import TenantSettings
from excimer.storage.plan.compaction_plan import (
    CompactionLimits,
    MergePlan,
    RoundPlan,
    plan_merge,
    plan_round,
)
from excimer.storage.plan.ingest_throttle import ThrottleLimits, plan_put_delay_s

_log = logging.getLogger(__name__)


class CompactedTimeline(RoundSource, Protocol):
    @property
    def oldest_lsn(self) -> Lsn: ...
    @property
    def ancestor_lsn(self) -> Lsn: ...
    @property
    def settings(self) -> TenantSettings: ...
    @property
    def inherited_size_bytes(self) -> int: ...
    @property
    def commits(self) -> TimelineCommits: ...
    @property
    def leftovers(self) -> Leftovers: ...


class Compactor:
    def __init__(self, timeline: CompactedTimeline) -> None:
        self._timeline = timeline
        self.is_stuck = False
        """The last step met damage: more of the same will not help, and nobody should wait for it."""
        self._damaged: set[str] = set()
        """Layers that a merge has failed on: others are merged around them."""

    def put_delay_s(self, batch_size_bytes: int) -> float:
        """How long ingest should wait before this batch, so that compaction keeps up. Any thread."""
        settings = self._timeline.context.settings
        limits = ThrottleLimits(
            settings.throttle_from_layers, settings.throttle_full_layers, settings.throttle_delay_s_max
        )
        level_zero_count = 0 if self.is_stuck else self._timeline.stack.disk.level_zero_count
        return plan_put_delay_s(level_zero_count, batch_size_bytes, limits)

    async def step(self) -> bool:
        """Does what is most urgent, if anything is due; says whether. Call it again until it says no.

        Raises as reads, flushes and uploads do. One call at a time: hold the timeline's compaction lock.
        """
        async with self._timeline.context.compaction_slots:
            try:
                done = await self._step()
            except CorruptionError:
                self._timeline.check_runs()
                self.is_stuck = True
                raise
        self.is_stuck = False
        return done

    async def _step(self) -> bool:
        timeline, limits = self._timeline, self._limits()
        merge = plan_merge(timeline.stack.disk, limits, self._damaged)
        if merge is not None:
            with timeline.leftovers.suspected_on_failure():
                await self._merge(merge)
            return True
        round_plan = plan_round(
            timeline.stack.disk,
            limits,
            start_lsn=timeline.ancestor_lsn,
            oldest_lsn=timeline.oldest_lsn,
            inherited_size_bytes=timeline.inherited_size_bytes,
        )
        return round_plan is not None and await self.write_piece(round_plan)

    async def write_piece(self, plan: RoundPlan) -> bool:
        """The next piece of a round, committed; false if there was nothing to write.

        Any plan will do, for instance that of a complete round at an older LSN: the rest of it is then
        found in the manifest by the steps that follow. Errors as `step`.
        """
        with self._timeline.leftovers.suspected_on_failure():
            return await self._write_piece(plan)

    async def _write_piece(self, plan: RoundPlan) -> bool:
        timeline = self._timeline
        if plan.lsn < timeline.oldest_lsn:
            _log.info("timeline %s: a round is given up, its LSN is gone", timeline.home.timeline_id)
            await timeline.commits.replace_layers(_as_round(plan.pieces, None, None), plan.pieces)
            return True
        piece = await write_round_piece(timeline, plan)
        await self._upload(piece.layers, WrittenBy.ROUND)
        # A round that covers only what comes after itself covers nothing.
        covered_lsn = plan.covers_after_lsn if piece.is_whole else int(plan.lsn)
        layers = (*plan.pieces, *piece.layers)
        if not piece.is_last:
            described = _as_round(layers, None, covered_lsn)
        else:
            described = _as_round(layers, covered_lsn if covered_lsn < plan.lsn else None, None)
        if not layers:
            return False
        await timeline.commits.replace_layers(described, plan.pieces)
        return True

    async def _merge(self, plan: MergePlan) -> None:
        timeline = self._timeline
        size_bytes = timeline.settings.compaction_target_size_bytes
        job = MergeJob(timeline.home, timeline.stack.files, plan, timeline.generation, size_bytes)
        written: list[LayerDescription] = []
        try:
            while (layer := await timeline.whole_in_thread(job.write_next)) is not None:
                written.append(layer)
                await self._upload([layer], WrittenBy.MERGE)
        except DamagedLayerError:
            if job.damaged_run is not None:
                self._damaged.update(each.name for each in job.damaged_run.descriptions)
            raise
        await timeline.commits.replace_layers(written, plan.descriptions)
        timeline.context.counters.layers_merged(sum(layer.size_bytes for layer in plan.descriptions))

    async def _upload(self, layers: Sequence[LayerDescription], by: WrittenBy) -> None:
        for layer in layers:
            self._timeline.context.counters.layer_written(by, layer.size_bytes)
            await self._timeline.whole_in_thread(partial(upload_layer, self._timeline.home, layer))

    def _limits(self) -> CompactionLimits:
        settings = self._timeline.settings
        return CompactionLimits(
            merge_threshold=settings.compaction_threshold,
            merged_layer_size_bytes=settings.compaction_target_size_bytes,
            image_threshold=settings.image_creation_threshold,
        )


def _as_round(
    layers: Sequence[LayerDescription], covers_after_lsn: int | None, round_after_lsn: int | None
) -> list[LayerDescription]:
    return [
        msgspec.structs.replace(layer, covers_after_lsn=covers_after_lsn, round_after_lsn=round_after_lsn)
        for layer in layers
    ]
