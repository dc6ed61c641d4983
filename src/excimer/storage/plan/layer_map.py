"""Which layers a timeline has, as an immutable value: a change makes a new map.

Layers of the same LSNs lie side by side in key order and make up a *run*: one flush, one merge cut
by key, one round of images. A map of ten thousand layers has perhaps a hundred runs, and both a run
at an LSN and a layer at a key are found by bisection, so that planning a read costs what it visits
and not what there is.

::

      LSN ^   | L0                                  |   run of one layer
          |   | L0                                  |
          |   | L1  a..f | L1  g..p | L1  q..z      |   run of three
          |   | image a..k   | image k..z           |
          +---------------------------------------------> key

Not here: the order in which a read visits them (`read_path`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Self

from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription


class PlacedLayer:
    """A layer's description with its keys as bytes, ready to be compared."""

    __slots__ = (
        "covers_after_lsn",
        "description",
        "end_lsn",
        "first_key",
        "is_image",
        "last_key",
        "start_lsn",
    )

    def __init__(self, description: LayerDescription) -> None:
        self.description = description
        self.is_image = description.kind is LayerKind.IMAGE
        self.covers_after_lsn = description.covers_after_lsn
        self.start_lsn = description.start_lsn
        self.end_lsn = description.end_lsn
        self.first_key = bytes.fromhex(description.first_key)
        self.last_key = bytes.fromhex(description.last_key)


class LayerRun:
    """Layers of one kind and the same LSNs, by first key. Images also cover the same."""

    __slots__ = ("_first_keys", "_last_keys", "covers_after_lsn", "end_lsn", "layers", "start_lsn")

    def __init__(self, layers: Iterable[PlacedLayer]) -> None:
        self.layers = tuple(sorted(layers, key=lambda layer: (layer.first_key, layer.last_key)))
        first = self.layers[0]
        self.start_lsn = first.start_lsn
        self.end_lsn = first.end_lsn
        self.covers_after_lsn = first.covers_after_lsn
        self._first_keys = [layer.first_key for layer in self.layers]
        self._last_keys = list(accumulate((layer.last_key for layer in self.layers), max))

    @property
    def is_level_zero(self) -> bool:
        return any(layer.description.level == 0 for layer in self.layers)

    @property
    def size_bytes(self) -> int:
        return sum(layer.description.size_bytes for layer in self.layers)

    @property
    def key_count(self) -> int:
        """Distinct keys, at most."""
        return sum(layer.description.key_count or layer.description.value_count for layer in self.layers)

    @property
    def descriptions(self) -> tuple[LayerDescription, ...]:
        return tuple(layer.description for layer in self.layers)

    def overlapping(self, first_key: bytes, last_key: bytes) -> list[PlacedLayer]:
        """Those that may hold keys in [first, last], in key order."""
        found = []
        at = bisect_right(self._first_keys, last_key) - 1
        while at >= 0 and self._last_keys[at] >= first_key:
            if self.layers[at].last_key >= first_key:
                found.append(self.layers[at])
            at -= 1
        found.reverse()
        return found


class LayerMap:
    """The layers on disk of one timeline, newest end LSN first."""

    def __init__(self, layers: Iterable[PlacedLayer] = ()) -> None:
        self.layers = tuple(sorted(layers, key=lambda layer: -layer.end_lsn))
        self.delta_runs = _runs(layer for layer in self.layers if not layer.is_image)
        """Newest first. Their LSNs do not overlap."""
        self.level_zero_count = sum(run.is_level_zero for run in self.delta_runs)
        self.image_runs = _runs(layer for layer in self.layers if layer.is_image)
        """Newest first; at one LSN first the one that covers most."""
        self._delta_starts = [-lsn for lsn in accumulate((run.start_lsn for run in self.delta_runs), min)]
        self._image_lsns = [-run.end_lsn for run in self.image_runs]

    @classmethod
    def from_descriptions(cls, descriptions: Iterable[LayerDescription]) -> Self:
        return cls(PlacedLayer(description) for description in descriptions)

    @property
    def descriptions(self) -> tuple[LayerDescription, ...]:
        return tuple(layer.description for layer in self.layers)

    def changed(
        self, *, added: Iterable[LayerDescription] = (), removed: Iterable[LayerDescription] = ()
    ) -> "LayerMap":
        """Without `removed`, then with `added`: a layer in both is described anew."""
        gone = {description.name for description in removed}
        kept = [layer for layer in self.layers if layer.description.name not in gone]
        return LayerMap([*kept, *(PlacedLayer(description) for description in added)])

    def deltas_between(self, low_lsn: int, high_lsn: int) -> Iterator[LayerRun]:
        """Runs that may hold values with low < LSN <= high, newest first."""
        if low_lsn >= high_lsn:
            return
        for at in range(bisect_right(self._delta_starts, -high_lsn), len(self.delta_runs)):
            run = self.delta_runs[at]
            if run.end_lsn <= low_lsn:
                return
            if run.start_lsn < high_lsn:
                yield run

    def try_images_at_or_below(self, lsn: int) -> LayerRun | None:
        """The newest images that a read at `lsn` may use."""
        at = bisect_left(self._image_lsns, -lsn)
        return self.image_runs[at] if at < len(self.image_runs) else None


def _runs(layers: Iterable[PlacedLayer]) -> Sequence[LayerRun]:
    groups: dict[tuple[int, int, int], list[PlacedLayer]] = {}
    for layer in layers:
        covers = layer.covers_after_lsn
        # Those that cover nothing come last among images of one LSN: no read then needs them.
        place = (-layer.end_lsn, -layer.start_lsn, layer.end_lsn if covers is None else covers)
        groups.setdefault(place, []).append(layer)
    return tuple(LayerRun(groups[place]) for place in sorted(groups))
