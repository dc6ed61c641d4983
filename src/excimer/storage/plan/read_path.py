"""The order in which a read visits layers: from the newest values to the oldest.

For keys [first, last] and values with low < LSN <= high. An image at LSN X stands between the
values above X and those at or below it: a delta that straddles X is visited twice, its newer part
before the image and its older part after. Images that cover everything changed after an LSN Y let
the walk jump from X to Y: a key that is not among them has not changed between. Images that cover
all from 0 end it, for nothing older matters then, in this timeline or its ancestors.

::

      high -----------------------------------------------------------------
            delta (80, 100]              -> visit 1: (80, 100]
            delta (60, 80]               -> visit 2: (70, 80]
            image at 70, covers after 50 -> visit 3
            delta (50, 60]                  (jumped over, as is (60, 70] of the other)
            delta (30, 50]               -> visit 4: (30, 50]
      low  -----------------------------------------------------------------
"""

from collections.abc import Iterable
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
    """Newest first; no value is offered twice, and none left out that may be a key's newest."""
    near = [layer for layer in layer_map.layers if layer.start_lsn <= high_lsn and layer.end_lsn > low_lsn]
    deltas = [layer for layer in near if not layer.is_image and _overlaps(layer, first_key, last_key)]
    images: dict[int, list[PlacedLayer]] = {}
    for layer in near:
        if layer.is_image:
            images.setdefault(layer.end_lsn, []).append(layer)
    visits: list[Visit] = []
    upper_lsn = high_lsn
    for image_lsn in sorted(images, reverse=True):
        if image_lsn > upper_lsn:
            continue  # jumped over
        visits += _visits_between(deltas, image_lsn, upper_lsn)
        layers = images[image_lsn]
        visits += [
            Visit(layer, image_lsn - 1, image_lsn)
            for layer in layers
            if _overlaps(layer, first_key, last_key)
        ]
        covers_after_lsn = layers[0].covers_after_lsn
        if covers_after_lsn == 0:
            return ReadPlan(visits, False)
        upper_lsn = image_lsn if covers_after_lsn is None else covers_after_lsn
    return ReadPlan(visits + _visits_between(deltas, low_lsn, upper_lsn), True)


def _visits_between(deltas: Iterable[PlacedLayer], low_lsn: int, high_lsn: int) -> list[Visit]:
    pieces = [
        Visit(layer, max(layer.start_lsn, low_lsn), min(layer.end_lsn, high_lsn))
        for layer in deltas
        if max(layer.start_lsn, low_lsn) < min(layer.end_lsn, high_lsn)
    ]
    return sorted(pieces, key=lambda visit: -visit.high_lsn)


def _overlaps(layer: PlacedLayer, first_key: bytes, last_key: bytes) -> bool:
    return layer.first_key <= last_key and layer.last_key >= first_key
