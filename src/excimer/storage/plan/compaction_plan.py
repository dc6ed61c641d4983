"""When to turn piled-up delta layers into image layers, so that reads stay short.

After `deltas_max` deltas above the newest images a *round* writes, at the end LSN of the newest, an
image of each key that changed since the round before. A read then finds a key in the round, or jumps
over all that the round covers (`read_path`).

So that rounds do not pile up in turn, a round absorbs the rounds before it as long as they are no
larger than what it has gathered by then: it holds their keys too, and covers what they covered. Rounds
that a read visits thus grow in size from each to the next, and their number stays logarithmic; and a
page is written again only when at least as much has changed around it. A round that reaches the
beginning of the history is *complete*: it holds every key alive.

Nothing is removed: deltas and absorbed rounds still serve older LSNs until GC cuts the history off.

Not here: the images themselves (`excimer.storage.engine.compaction_job`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from excimer.base.lsn import Lsn
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.layer_map import LayerMap, PlacedLayer


@dataclass(frozen=True)
class CompactionPlan:
    lsn: Lsn
    """Images are made as of this."""
    covers_after_lsn: int
    """Of every key that changed after it; 0: of every key alive."""
    sources: tuple[LayerDescription, ...]
    """The layers that hold the changed keys. Not needed for a complete round."""


def plan_compaction(
    layer_map: LayerMap, *, start_lsn: int, deltas_max: int, inherited_size_bytes: int
) -> CompactionPlan | None:
    """The round that is due, or None.

    `start_lsn`: where the timeline's own history starts (a branch point, or an import);
    `inherited_size_bytes`: what a branch reads from its ancestors, 0 without one.
    """
    newest_image_lsn = max((layer.end_lsn for layer in layer_map.layers if layer.is_image), default=0)
    deltas = [layer for layer in layer_map.layers if not layer.is_image]
    if sum(layer.end_lsn > newest_image_lsn for layer in deltas) < deltas_max:
        return None
    rounds = _rounds(layer_map.layers)
    covered_lsn = max(rounds, default=start_lsn)
    sources = [layer for layer in deltas if layer.end_lsn > covered_lsn]
    while covered_lsn in rounds and _size(rounds[covered_lsn]) <= _size(sources):
        absorbed = rounds[covered_lsn]
        sources += absorbed
        covered_lsn = absorbed[0].covers_after_lsn or 0
    if covered_lsn == start_lsn and covered_lsn not in rounds and inherited_size_bytes <= _size(sources):
        covered_lsn = 0
    return CompactionPlan(
        lsn=Lsn(max(layer.end_lsn for layer in deltas)),
        covers_after_lsn=covered_lsn,
        sources=tuple(layer.description for layer in sources),
    )


def _rounds(layers: Sequence[PlacedLayer]) -> dict[int, list[PlacedLayer]]:
    """By LSN, the image layers that cover something; those with gaps only help reads along."""
    rounds: dict[int, list[PlacedLayer]] = {}
    for layer in layers:
        if layer.is_image and layer.covers_after_lsn is not None:
            rounds.setdefault(layer.end_lsn, []).append(layer)
    return rounds


def _size(layers: Iterable[PlacedLayer]) -> int:
    return sum(layer.description.size_bytes for layer in layers)
