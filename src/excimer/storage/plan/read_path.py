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
    visits: list[Visit] = []
    upper_lsn = high_lsn
    image_limit_lsn = high_lsn
    while (images := layer_map.try_images_at_or_below(image_limit_lsn)) is not None:
        image_lsn = images.end_lsn
        if image_lsn <= low_lsn:
            break
        _visit_deltas(visits, layer_map, (first_key, last_key), image_lsn, upper_lsn)
        for layer in images.overlapping(first_key, last_key):
            visits.append(Visit(layer, image_lsn - 1, image_lsn))
        if images.covers_after_lsn == 0:
            return ReadPlan(visits, False)
        if images.covers_after_lsn is None:
            upper_lsn, image_limit_lsn = image_lsn, image_lsn - 1
        else:
            upper_lsn = image_limit_lsn = images.covers_after_lsn
    _visit_deltas(visits, layer_map, (first_key, last_key), low_lsn, upper_lsn)
    return ReadPlan(visits, True)


def _visit_deltas(
    visits: list[Visit], layer_map: LayerMap, keys: tuple[bytes, bytes], low_lsn: int, high_lsn: int
) -> None:
    """Nothing where `low_lsn` is not below `high_lsn`: a round may cover more than is asked for."""
    for run in layer_map.deltas_between(low_lsn, high_lsn):
        low, high = max(run.start_lsn, low_lsn), min(run.end_lsn, high_lsn)
        for layer in run.overlapping(*keys):
            visits.append(Visit(layer, low, high))
