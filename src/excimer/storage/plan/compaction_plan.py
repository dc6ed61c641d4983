"""When to merge flushes, and when to turn deltas that piled up into images, so that reads stay short.

::

    flush, flush, flush, flush     L0: one delta each, over the whole key range
      '-----'---.---'-----'
             merge                 L1: one run of the same LSNs, cut by key
         merge, merge
           '--.--'
            round                  images of all keys that changed since the round before

**Merge.** So many L0 runs as the threshold says become one L1 run, the oldest first and without a
gap: between two of them there is no other delta. The values stay the same, to the last one: history
is kept whole. Older L1 runs that are no larger than what was gathered are merged again as long as one
file holds it all, so that a timeline which is hardly written to does not pile up tiny layers; and, while
a round is being written, also larger ones above it, which would otherwise pile up until it is done.

**Round.** So many L1 runs above the newest images lead to images, at the end LSN of the newest of them,
of each key that changed since the round before. A read then finds a key in the round, or jumps over
all that the round covers (`read_path`). So that rounds do not pile up in turn, a round absorbs the
rounds before it as long as they hold at most ABSORBED_RATIO times the keys it has gathered by then: it
holds their keys too, and covers what they covered. Each round thus has over ABSORBED_RATIO times the
keys of all newer ones, and their number stays logarithmic. A round that reaches the beginning of the
history is *complete*: it holds every key alive.

A round is written in pieces. Each piece is in the manifest before the next is begun, as images that
cover nothing yet but say what the round will cover; the next is planned from there, after a crash too.
The last makes all of them cover it.

Nothing is removed but what was merged: deltas below a round and absorbed rounds still serve older LSNs
until GC cuts the history off.

Not here: doing it (`excimer.storage.engine.compactor`), slowing ingest (`ingest_throttle`).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from excimer.base.keys import MIN_KEY
from excimer.base.lsn import Lsn
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.layer_map import LayerMap, LayerRun, PlacedLayer

MERGED_RUNS_MAX = 16
"""A merge of more would hold up all else for too long."""

WAITING_LAYERS_MAX = 8
"""Runs above a round that is being written are merged again up to so many layers, lest they pile up."""

ABSORBED_RATIO = 2
"""Each round has over twice the keys of all that are newer: they grow threefold. Measured with updates all
over 20,000 pages: 1 writes 2.0 images for a changed page and 3 visits more; 2 writes 2.8, 4 writes 3.6."""

IMAGE_SIZE_ESTIMATE_BYTES = 2048
"""Of a page, compressed."""


@dataclass(frozen=True)
class CompactionLimits:
    merge_threshold: int
    """So many L0 runs are merged."""
    merged_layer_size_bytes: int
    """Size at which an L1 layer ends."""
    image_threshold: int
    """So many L1 runs above the newest images lead to a round."""


@dataclass(frozen=True)
class MergePlan:
    runs: tuple[LayerRun, ...]
    """Oldest first."""

    @property
    def start_lsn(self) -> int:
        return self.runs[0].start_lsn

    @property
    def end_lsn(self) -> int:
        return self.runs[-1].end_lsn

    @property
    def descriptions(self) -> tuple[LayerDescription, ...]:
        return tuple(layer for run in self.runs for layer in run.descriptions)


@dataclass(frozen=True)
class RoundPlan:
    """The next piece of a round."""

    lsn: Lsn
    """Images are made as of this."""
    covers_after_lsn: int
    """Of every key that changed after it; 0: of every key alive; `lsn` itself: of some, for others are
    damaged, and the round will cover nothing."""
    sources: tuple[LayerRun, ...]
    """The layers that hold the changed keys. Not needed for a complete round."""
    start_key: bytes = MIN_KEY
    """Images of keys before it are there already."""
    pieces: tuple[LayerDescription, ...] = ()
    """The layers of the round that are there already."""

    @property
    def low_lsn(self) -> int:
        """What the sources hold at or below it is of no interest."""
        return self.covers_after_lsn if self.covers_after_lsn < self.lsn else 0


def plan_merge(
    layer_map: LayerMap, limits: CompactionLimits, damaged: Collection[str] = ()
) -> MergePlan | None:
    """The merge that is due, or None. `damaged`: names of layers that cannot be merged."""
    runs = layer_map.delta_runs[::-1]
    whole = [
        run.is_level_zero and not any(layer.name in damaged for layer in run.descriptions) for run in runs
    ]
    if sum(whole) < limits.merge_threshold:
        return None
    first = whole.index(True)
    chosen: list[LayerRun] = []
    for run, is_whole in zip(runs[first : first + MERGED_RUNS_MAX], whole[first:], strict=False):
        if not is_whole or (chosen and run.start_lsn < chosen[-1].end_lsn):
            break
        chosen.append(run)
    size = sum(run.size_bytes for run in chosen)
    round_lsn = _unfinished_lsn(layer_map)
    for run in reversed(runs[:first]):
        if any(layer.name in damaged for layer in run.descriptions):
            break
        waits_for_round = round_lsn is not None and run.start_lsn >= round_lsn
        size_max = limits.merged_layer_size_bytes * (WAITING_LAYERS_MAX if waits_for_round else 1)
        if run.size_bytes > size or run.size_bytes + size > size_max:
            break
        chosen.insert(0, run)
        size += run.size_bytes
    return MergePlan(tuple(chosen))


def plan_round(
    layer_map: LayerMap,
    limits: CompactionLimits,
    *,
    start_lsn: int,
    oldest_lsn: int,
    inherited_size_bytes: int,
) -> RoundPlan | None:
    """The piece of a round that is due, or None.

    `start_lsn`: where the timeline's own history starts (a branch point, or an import); `oldest_lsn`:
    what lies before cannot be read any more; `inherited_size_bytes`: what a branch reads from its
    ancestors, 0 without one. A round that was begun is returned even if it can no longer be finished.
    """
    begun = _unfinished_round(layer_map)
    if begun is not None:
        return begun
    newest_image_lsn = layer_map.image_runs[0].end_lsn if layer_map.image_runs else 0
    merged = [run for run in layer_map.delta_runs if not run.is_level_zero and run.end_lsn > newest_image_lsn]
    if not merged or len(merged) < limits.image_threshold or merged[0].end_lsn < oldest_lsn:
        return None
    lsn = merged[0].end_lsn
    covered_lsn, gathered = lsn, []
    for covered_lsn, sources, absorbable in _rounds_below(layer_map, lsn, start_lsn):
        gathered += sources
        key_count = sum(run.key_count for run in gathered)
        if absorbable is None:
            if inherited_size_bytes <= key_count * IMAGE_SIZE_ESTIMATE_BYTES:
                covered_lsn = 0
        elif absorbable.key_count > ABSORBED_RATIO * key_count:
            break
        else:
            gathered.append(absorbable)
            covered_lsn = absorbable.covers_after_lsn or 0
    return RoundPlan(Lsn(lsn), covered_lsn, _once(gathered))


def _unfinished_lsn(layer_map: LayerMap) -> int | None:
    for run in layer_map.image_runs:
        if run.covers_after_lsn is None and _pieces(run):
            return run.end_lsn
    return None


def _pieces(run: LayerRun) -> list[PlacedLayer]:
    return [layer for layer in run.layers if layer.description.round_after_lsn is not None]


def _unfinished_round(layer_map: LayerMap) -> RoundPlan | None:
    pieces = next((found for run in layer_map.image_runs if (found := _pieces(run))), None)
    if pieces is None:
        return None
    lsn = pieces[0].end_lsn
    covers_after_lsn = pieces[0].description.round_after_lsn or 0
    gathered: list[LayerRun] = []
    for below_lsn, sources, absorbable in _rounds_below(layer_map, lsn, covers_after_lsn):
        gathered += sources
        if below_lsn <= covers_after_lsn or absorbable is None:
            break
        gathered.append(absorbable)
    last_key = max(layer.last_key for layer in pieces)
    return RoundPlan(
        Lsn(lsn),
        covers_after_lsn,
        _once(gathered),
        start_key=_next_key(last_key),
        pieces=tuple(layer.description for layer in pieces),
    )


def _rounds_below(
    layer_map: LayerMap, lsn: int, start_lsn: int
) -> Iterator[tuple[int, list[LayerRun], LayerRun | None]]:
    """From `lsn` downward as a read walks: an LSN, the deltas above it, the round that stands at it.

    The last has no round, and is the start of the timeline's own history.
    """
    upper_lsn, limit_lsn = lsn, lsn - 1
    while True:
        images = layer_map.try_images_at_or_below(limit_lsn)
        while images is not None and images.covers_after_lsn is None:
            images = layer_map.try_images_at_or_below(images.end_lsn - 1)
        below_lsn = start_lsn if images is None else images.end_lsn
        yield below_lsn, list(layer_map.deltas_between(below_lsn, upper_lsn)), images
        if images is None or not images.covers_after_lsn:
            return
        upper_lsn = limit_lsn = images.covers_after_lsn


def _once(runs: list[LayerRun]) -> tuple[LayerRun, ...]:
    """A delta that stands on both sides of a round is gathered twice."""
    return tuple({id(run): run for run in runs}.values())


def _next_key(key: bytes) -> bytes:
    return (int.from_bytes(key, "big") + 1).to_bytes(len(key), "big")
