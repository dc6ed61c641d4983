"""Garbage collection as pure decisions: which layers no retained LSN needs, what to write so that more go.

**Mark.** A layer stays if a read at a retained LSN would visit it. Above the cutoff everything is
retained, so every layer that ends above it stays. Below, the walk of `read_path.plan_read` over all keys is
simulated from the cutoff, from wherever images above it jump to, and from each held point. Two walks that
meet at images go on alike, so each images' LSN is passed once, however many points are held::

      LSN |  delta                         stays: above the cutoff
          +--- cutoff ------------------   walk begins: delta, images at 60 (of all keys): ends
          |  delta      (60, 80]           stays
       60 |  complete images               stay
          |  delta      (40, 60]           goes
       40 |  x held (a branch) ---------   walk begins: deltas, images at 10: ends
          |  delta      (20, 40]           stays
          |  delta      (10, 20]           stays
       10 |  complete images               stay
          |  delta      (0, 10]            goes

**Bottom-most images.** Images of all keys at the cutoff end the walk from there: all that is older and not
held by a point goes. They are worth writing when what goes outweighs them (`find_bottom_round`).

**Surplus images.** Above the cutoff the deltas are whole, so images there only shorten reads. Those that
neither the newest readers nor held points come by are dropped beyond a budget (`surplus_images`).

Not here: doing it (`excimer.storage.engine.garbage_collector`), what is retained (`retention`).
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from excimer.base.lsn import MAX_LSN, Lsn
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.compaction_plan import IMAGE_SIZE_ESTIMATE_BYTES, RoundPlan
from excimer.storage.plan.layer_map import LayerMap, LayerRun
from excimer.storage.plan.retention import RetainedLsns

WORTH_RATIO: Final = 1.5
"""Bottom-most images are written when so many times their size goes for them. At 1, everything would be
written again for every page that changed; this leaves at most half of the live size as garbage."""

SURPLUS_SHARE: Final = 0.25
"""So much of the size of all live pages may surplus images take."""


@dataclass(frozen=True)
class GcPlan:
    removable: tuple[LayerDescription, ...]

    @property
    def size_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self.removable)


@dataclass(frozen=True)
class BottomRound:
    """Images that let older layers go."""

    plan: RoundPlan
    gain_bytes: int
    """Size of the layers that would go."""

    def is_worth_it(self, live_keys: int, image_size_bytes: float = IMAGE_SIZE_ESTIMATE_BYTES) -> bool:
        """When so many keys are alive at the cutoff, and an image takes so much on average."""
        keys = live_keys
        if self.plan.covers_after_lsn:
            keys = min(keys, sum(run.key_count for run in self.plan.sources))
        return self.gain_bytes > WORTH_RATIO * keys * image_size_bytes


def plan_gc(layer_map: LayerMap, retained: RetainedLsns) -> GcPlan:
    """What no read at a retained LSN visits, oldest first, and surplus images."""
    surplus = surplus_images(layer_map, retained)
    kept_map = layer_map.changed(removed=surplus)
    return GcPlan((*removable_layers(kept_map, retained), *surplus))


def removable_layers(layer_map: LayerMap, retained: RetainedLsns) -> list[LayerDescription]:
    """What no read at a retained LSN visits, oldest first."""
    cutoff_lsn = retained.cutoff_lsn
    walks = _Walks(layer_map)
    for run in layer_map.image_runs:
        if run.end_lsn > cutoff_lsn and run.covers_after_lsn:  # 0 and None: nowhere below the cutoff
            walks.begin(min(run.covers_after_lsn, cutoff_lsn))
    for lsn in (cutoff_lsn, *retained.points):
        walks.begin(lsn)
    visited = _Intervals(walks.delta_intervals)
    return [
        layer.description
        for layer in reversed(layer_map.layers)
        if layer.end_lsn <= cutoff_lsn
        and not (
            layer.end_lsn in walks.image_lsns
            if layer.is_image
            else visited.overlap(layer.start_lsn, layer.end_lsn)
        )
    ]


def find_bottom_round(layer_map: LayerMap, retained: RetainedLsns, *, start_lsn: int) -> BottomRound | None:
    """Images of all keys at the cutoff; of a branch, of all that changed after its branch point. None if
    nothing would go for them.

    `start_lsn`: where the timeline's own history starts, 0 for a root.
    """
    lsn = retained.cutoff_lsn
    if any(run.end_lsn == lsn and _reaches(run, start_lsn) for run in layer_map.image_runs):
        return None
    sources = _walk_runs(layer_map, lsn)
    covers_after_lsn = 0 if any(run.covers_after_lsn == 0 for run in sources) else start_lsn
    ideal = layer_map.changed(added=[_imagined_round(lsn, covers_after_lsn)])
    gain = _size(removable_layers(ideal, retained)) - _size(removable_layers(layer_map, retained))
    if gain <= 0:
        return None
    return BottomRound(RoundPlan(Lsn(lsn), covers_after_lsn, tuple(sources)), gain)


def image_size_bytes(layer_map: LayerMap) -> float | None:
    """What an image of a page takes on average, compressed; None where there are no images of all keys."""
    for run in layer_map.image_runs:
        if run.covers_after_lsn == 0:
            return run.size_bytes / max(1, run.key_count)
    return None


def surplus_images(layer_map: LayerMap, retained: RetainedLsns) -> list[LayerDescription]:
    """Images above the cutoff that can be spared: reads of rarely asked LSNs then take longer."""
    live_size = _complete_size(layer_map)
    if live_size is None:
        return []
    walks = _Walks(layer_map)
    for lsn in (MAX_LSN, *retained.points_above):
        walks.begin(lsn)
    spare = [
        run
        for run in layer_map.image_runs
        if run.end_lsn > retained.cutoff_lsn
        and run.end_lsn not in walks.image_lsns
        and all(layer.description.round_after_lsn is None for layer in run.layers)
    ]
    excess = sum(run.size_bytes for run in spare) - int(live_size * SURPLUS_SHARE)
    surplus: list[LayerDescription] = []
    while spare and excess > 0:
        run = spare.pop(_closest(spare))
        surplus += run.descriptions
        excess -= run.size_bytes
    return surplus


def _closest(runs: Sequence[LayerRun]) -> int:
    """Which one has its neighbours closest together; at the ends there is none, and the oldest is taken."""
    gaps = {at: runs[at - 1].end_lsn - runs[at + 1].end_lsn for at in range(1, len(runs) - 1)}
    return min(gaps, key=lambda at: gaps[at]) if gaps else len(runs) - 1


class _Walks:
    """Walks of reads over all keys: where they pass images, and between which LSNs they look into deltas."""

    def __init__(self, layer_map: LayerMap) -> None:
        self.image_lsns: set[int] = set()
        self.delta_intervals: list[tuple[int, int]] = []
        """low < LSN <= high."""
        self._map = layer_map

    def begin(self, lsn: int) -> None:
        """As `read_path.plan_read` from `lsn`, up to where an earlier walk has been."""
        upper_lsn = limit_lsn = lsn
        while (images := self._map.try_images_at_or_below(limit_lsn)) is not None:
            image_lsn, covers = images.end_lsn, images.covers_after_lsn
            self.delta_intervals.append((image_lsn, upper_lsn))
            if image_lsn in self.image_lsns:
                return
            self.image_lsns.add(image_lsn)
            if covers == 0:
                return
            if covers is None:
                upper_lsn, limit_lsn = image_lsn, image_lsn - 1
            else:
                upper_lsn = limit_lsn = covers
        self.delta_intervals.append((0, upper_lsn))


class _Intervals:
    """Half-open LSN intervals, joined where they touch."""

    def __init__(self, intervals: Iterable[tuple[int, int]]) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        for low, high in sorted(interval for interval in intervals if interval[0] < interval[1]):
            if self._highs and low <= self._highs[-1]:
                self._highs[-1] = max(self._highs[-1], high)
            else:
                self._lows.append(low)
                self._highs.append(high)

    def overlap(self, low: int, high: int) -> bool:
        """Whether one of them has anything in common with low < LSN <= high."""
        at = bisect_right(self._lows, high - 1) - 1
        return at >= 0 and self._highs[at] > low


def _walk_runs(layer_map: LayerMap, lsn: int) -> list[LayerRun]:
    """The runs that a read of all keys at `lsn` visits."""
    walks = _Walks(layer_map)
    walks.begin(lsn)
    visited = _Intervals(walks.delta_intervals)
    deltas = [run for run in layer_map.delta_runs if visited.overlap(run.start_lsn, run.end_lsn)]
    return deltas + [run for run in layer_map.image_runs if run.end_lsn in walks.image_lsns]


def _complete_size(layer_map: LayerMap) -> int | None:
    """Of the newest images of all keys; None if there are none."""
    return next((run.size_bytes for run in layer_map.image_runs if run.covers_after_lsn == 0), None)


def _reaches(run: LayerRun, start_lsn: int) -> bool:
    return run.covers_after_lsn is not None and run.covers_after_lsn <= start_lsn


def _imagined_round(lsn: int, covers_after_lsn: int) -> LayerDescription:
    """Images of all keys, that take no room."""
    return LayerDescription(
        kind=LayerKind.IMAGE,
        start_lsn=lsn,
        end_lsn=lsn,
        first_key="",
        last_key="",
        generation=0,
        fingerprint=0,
        size_bytes=0,
        index_offset=0,
        value_count=0,
        covers_after_lsn=covers_after_lsn,
    )


def _size(layers: Iterable[LayerDescription]) -> int:
    return sum(layer.size_bytes for layer in layers)
