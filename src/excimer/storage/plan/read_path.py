"""The order in which a read visits layers: from the newest values to the oldest.

For keys [first, last] and values with low < LSN <= high. An image at LSN X stands between the
values above X and those at or below it: a delta that straddles X is visited twice, its newer part
before the image and its older part after. A complete set of images ends the walk, for nothing
older matters then.

::

      high ------------------------------------------------------
            delta (80, 100]   -> visit 1: (80, 100]
            image at 70       -> visit 3
            delta (60, 80]    -> visit 2: (70, 80], visit 4: (60, 70]
      low  ------------------------------------------------------
"""

from typing import NamedTuple

from excimer.storage.plan.layer_map import LayerMap, PlacedLayer


class Visit(NamedTuple):
    """Take from this layer the values with low_lsn < LSN <= high_lsn."""

    layer: PlacedLayer
    low_lsn: int
    high_lsn: int


class ReadPlan(NamedTuple):
    visits: list[Visit]
    continues_in_ancestor: bool
    """Keys not found by then are looked for in the ancestor, if there is one."""


def plan_read(
    layer_map: LayerMap, first_key: bytes, last_key: bytes, low_lsn: int, high_lsn: int
) -> ReadPlan:
    """Newest first, at most one value of a key and LSN is offered twice, none is left out."""
    images = []
    deltas = []
    complete_lsn = -1
    for layer in layer_map.layers:
        if layer.is_image:
            if low_lsn < layer.end_lsn <= high_lsn:
                if layer.complete:
                    complete_lsn = max(complete_lsn, layer.end_lsn)
                if layer.first_key <= last_key and layer.last_key >= first_key:
                    images.append(layer)
        elif (
            layer.start_lsn < high_lsn
            and layer.end_lsn > low_lsn
            and layer.first_key <= last_key
            and layer.last_key >= first_key
        ):
            deltas.append(layer)
    floor_lsn = max(low_lsn, complete_lsn)
    images = [layer for layer in images if layer.end_lsn >= complete_lsn]
    visits = [Visit(layer, layer.end_lsn - 1, layer.end_lsn) for layer in images]
    cuts = sorted({layer.end_lsn for layer in images}, reverse=True)
    for layer in deltas:
        visits += _cut(layer, max(layer.start_lsn, floor_lsn), min(layer.end_lsn, high_lsn), cuts)
    visits.sort(key=lambda visit: (-visit.high_lsn, not visit.layer.is_image))
    return ReadPlan(visits, complete_lsn < 0)


def _cut(layer: PlacedLayer, low_lsn: int, high_lsn: int, cuts: list[int]) -> list[Visit]:
    """The delta's LSN range in pieces, cut at the images' LSNs."""
    pieces = []
    for cut in cuts:
        if low_lsn < cut < high_lsn:
            pieces.append(Visit(layer, cut, high_lsn))
            high_lsn = cut
    if low_lsn < high_lsn:
        pieces.append(Visit(layer, low_lsn, high_lsn))
    return pieces
