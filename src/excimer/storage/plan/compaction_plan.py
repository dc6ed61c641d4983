"""When to turn piled-up delta layers into image layers, so that reads stay short.

Every read of a page that is not in the newest images looks into each delta above them. After
`deltas_max` of them a *round* writes, at the end LSN of the newest, an image of each key they changed.
Such a round is incomplete: what it does not hold is looked for below it. When the rounds since the
last complete one have grown as large as that was, the next round is complete: it holds every key
that is alive, and ends all reads. So the images written for one changed page, and the layers a
read visits, both stay within a constant and the number of rounds that fit in one data set.

Nothing is removed: the deltas still serve older LSNs until GC cuts the history off.

Not here: which keys those are and the images themselves (`excimer.storage.engine.compaction_job`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from excimer.base.lsn import Lsn
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.layer_map import LayerMap, PlacedLayer


@dataclass(frozen=True)
class CompactionPlan:
    lsn: Lsn
    """Images are made as of this."""
    deltas: tuple[LayerDescription, ...]
    """Their keys get images, in an incomplete round."""
    complete: bool


def plan_compaction(
    layer_map: LayerMap, *, deltas_max: int, inherited_size_bytes: int
) -> CompactionPlan | None:
    """The round that is due, or None. `inherited_size_bytes`: what a branch reads from its ancestors."""
    layers = layer_map.layers
    last_image_lsn = max((layer.end_lsn for layer in layers if layer.is_image), default=0)
    deltas = [layer for layer in layers if not layer.is_image and layer.end_lsn > last_image_lsn]
    if len(deltas) < deltas_max:
        return None
    complete_lsn = max((layer.end_lsn for layer in layers if layer.complete), default=0)
    rounds_size = _size(layer for layer in layers if layer.is_image and layer.end_lsn > complete_lsn)
    complete_size = _size(layer for layer in layers if layer.complete and layer.end_lsn == complete_lsn)
    return CompactionPlan(
        lsn=Lsn(max(layer.end_lsn for layer in deltas)),
        deltas=tuple(layer.description for layer in deltas),
        complete=rounds_size >= max(complete_size if complete_lsn else inherited_size_bytes, 1),
    )


def _size(layers: Iterable[PlacedLayer]) -> int:
    return sum(layer.description.size_bytes for layer in layers)
