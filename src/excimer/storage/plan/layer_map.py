"""Which layers a timeline has, as an immutable value: a change makes a new map.

Not here: the order in which a read visits them (`read_path`).
"""

from collections.abc import Iterable
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


class LayerMap:
    """The layers on disk of one timeline, newest end LSN first."""

    def __init__(self, layers: Iterable[PlacedLayer] = ()) -> None:
        self.layers = tuple(sorted(layers, key=lambda layer: -layer.end_lsn))

    @classmethod
    def from_descriptions(cls, descriptions: Iterable[LayerDescription]) -> Self:
        return cls(PlacedLayer(description) for description in descriptions)

    @property
    def descriptions(self) -> tuple[LayerDescription, ...]:
        return tuple(layer.description for layer in self.layers)

    def changed(
        self, *, added: Iterable[LayerDescription] = (), removed: Iterable[LayerDescription] = ()
    ) -> "LayerMap":
        gone = {description.name for description in removed}
        kept = [layer for layer in self.layers if layer.description.name not in gone]
        return LayerMap([*kept, *(PlacedLayer(description) for description in added)])
