"""How a branch becomes a root: which layers of its ancestors it needs as its own, as a pure decision.

A read of a branch walks its own layers and then, at or below the branch point L, its ancestor's;
below the ancestor's own branch point those of the next one, and so on. A root that holds all these
layers, each cut off where the branch stopped reading it, answers every read with the same bytes::

    ancestor   |--delta--|--delta-----|    copied       delta at or below L, image at or below L
                              L            trimmed      delta that straddles L: its values up to L
                               \\           left behind  everything above L
    branch                      |--delta--|

Rounds stay sound: the branch's own reach down to L or to 0, the ancestor's to its own branch point
or to 0, so that laid upon one another they are as nested or disjoint as before. Pieces of a round that
an ancestor has not finished stay behind: they would only help reads along.

What is adopted counts as level 1: it is never merged with the branch's own level 0.

Not here: copying (`excimer.storage.engine.detach_job`).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import Detachment, LayerDescription, Manifest


class AncestorHistory(NamedTuple):
    """One ancestor, and the LSN up to which the branch reads it."""

    manifest: Manifest
    end_lsn: int


class ForeignLayer(NamedTuple):
    """A layer of an ancestor's that the branch needs."""

    timeline_id: str
    description: LayerDescription
    end_lsn: int
    """Its values above this are not needed."""

    @property
    def is_straddling(self) -> bool:
        return self.description.kind is LayerKind.DELTA and self.description.end_lsn > self.end_lsn


class DetachPlan(NamedTuple):
    copied: tuple[ForeignLayer, ...]
    """Whole, byte for byte, under the same name."""
    trimmed: tuple[ForeignLayer, ...]
    """Written anew with what is at or below their `end_lsn`."""
    oldest_lsn: int
    """From here on the branch can be read, as before; below it at the points that are held."""


def plan_detach(branch: Manifest, ancestors: Sequence[AncestorHistory]) -> DetachPlan:
    """`ancestors`: from the nearest on."""
    foreign = [
        ForeignLayer(manifest.timeline_id, layer, end_lsn)
        for manifest, end_lsn in ancestors
        for layer in manifest.layers
        if _is_needed(layer, end_lsn)
    ]
    oldest_lsn = branch.oldest_lsn
    for manifest, end_lsn in ancestors:
        if oldest_lsn <= end_lsn:  # else what lies between is collected already
            oldest_lsn = min(end_lsn, manifest.oldest_lsn)
    return DetachPlan(
        copied=tuple(layer for layer in foreign if not layer.is_straddling),
        trimmed=tuple(layer for layer in foreign if layer.is_straddling),
        oldest_lsn=oldest_lsn,
    )


def detached_manifest(branch: Manifest, plan: DetachPlan, trimmed: Iterable[LayerDescription]) -> Manifest:
    """The branch as a root, with the layers that were copied and `trimmed`, as they were written."""
    copied = [msgspec.structs.replace(layer.description, level=1) for layer in plan.copied]
    return msgspec.structs.replace(
        branch,
        ancestor_timeline_id=None,
        ancestor_lsn=0,
        oldest_lsn=plan.oldest_lsn,
        layers=(*branch.layers, *copied, *trimmed),
        detachment=Detachment(
            ancestor_timeline_id=branch.ancestor_timeline_id or "", ancestor_lsn=branch.ancestor_lsn
        ),
    )


class Branch(Protocol):
    """A timeline, live or archived, as far as reparenting needs to know it."""

    @property
    def timeline_id(self) -> str: ...
    @property
    def ancestor_timeline_id(self) -> str | None: ...
    @property
    def ancestor_lsn(self) -> int: ...


def is_reparented(sibling: Branch, detached: Manifest) -> bool:
    """Whether a timeline is to become a branch of the detached one."""
    left = detached.detachment
    return (
        left is not None
        and sibling.ancestor_timeline_id == left.ancestor_timeline_id
        and sibling.timeline_id != detached.timeline_id
        and sibling.ancestor_lsn <= left.ancestor_lsn
    )


def _is_needed(layer: LayerDescription, end_lsn: int) -> bool:
    if layer.kind is LayerKind.IMAGE:
        return layer.end_lsn <= end_lsn and layer.round_after_lsn is None
    return layer.start_lsn < end_lsn
