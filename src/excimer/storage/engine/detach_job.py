"""Carries out a `DetachPlan`: brings the ancestors' layers under the branch's own prefix.

Copies are made by the object store itself; only deltas that straddle a branch point pass through this
process. Nothing refers to a copy until the manifest that makes the branch a root is durable, and
names hold their content's checksum: after a crash at any step the same is done again over what is
there. Reads and ingest go on all the time, and so do compaction and GC of the ancestors; a layer that
vanishes while it is wanted was replaced, and the plan is made again.

Not here: which layers (`excimer.storage.plan.detach`), the exchange and the siblings
(`excimer.storage.engine.ancestor_detachment`).
"""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from excimer.base.errors import RetryableError
from excimer.base.keys import MAX_KEY, MIN_KEY
from excimer.base.lsn import Lsn
from excimer.io.object_store import ObjectExistsError, ObjectMissingError
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.layer_writing import upload_layer, write_values_delta
from excimer.storage.engine.partial_copy import LayerMissingError
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.layer_block import unpack_block
from excimer.storage.format.manifest import LayerDescription, Manifest
from excimer.storage.format.values import Value
from excimer.storage.plan.detach import (
    AncestorHistory,
    DetachPlan,
    ForeignLayer,
    detached_manifest,
    plan_detach,
)

COPIES_AT_ONCE = 8
PLANS_MAX = 10
"""More often than this the ancestors' layers do not change while they are copied, or something is wrong."""

ANCESTOR_WAIT_S = 10.0
"""How long an ancestor may take to receive its WAL up to the branch point again after a restart."""

ForeignName = tuple[str, str]
"""Timeline and layer."""


class DetachDisturbedError(RetryableError):
    """The ancestors' layers changed faster than they could be copied."""


class DetachJob:
    """Detaches one branch. `prepare` copies and takes long; `manifest` is quick and says if that suffices."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._copied: set[ForeignName] = set()
        self._trimmed: dict[ForeignName, LayerDescription | None] = {}

    async def prepare(self) -> None:
        """All layers that the branch needs lie under its prefix. Raises `LsnTimeoutError`,
        `DetachDisturbedError`, `ObjectStoreError`, OSError, `CorruptionError`.
        """
        missing: ObjectMissingError | LayerMissingError | None = None
        for _ in range(PLANS_MAX):
            await self._flush_ancestors()
            try:
                return await self._carry_out(self._plan())
            except (ObjectMissingError, LayerMissingError) as error:  # most often replaced meanwhile
                missing = error
        raise DetachDisturbedError(
            f"timeline {self._timeline.timeline_id} cannot be detached now, its ancestors' layers change "
            f"or are lost: {missing}"
        )

    def manifest(self) -> Manifest | None:
        """The branch as a root, as of its newest manifest; None if `prepare` must go on."""
        plan = self._plan()
        copied = {_name(layer) for layer in plan.copied}
        trimmed = [_name(layer) for layer in plan.trimmed]
        if not copied <= self._copied or not set(trimmed) <= self._trimmed.keys():
            return None
        written = [layer for name in trimmed if (layer := self._trimmed[name]) is not None]
        return detached_manifest(self._timeline.manifest, plan, written)

    def _plan(self) -> DetachPlan:
        line = [AncestorHistory(at.manifest, end_lsn) for at, end_lsn in _ancestors(self._timeline)]
        return plan_detach(self._timeline.manifest, line)

    async def _flush_ancestors(self) -> None:
        for ancestor, end_lsn in _ancestors(self._timeline):
            await ancestor.wait_for_lsn(end_lsn, ANCESTOR_WAIT_S)
            if ancestor.disk_consistent_lsn < end_lsn:
                await ancestor.flush()

    async def _carry_out(self, plan: DetachPlan) -> None:
        waiting = [layer for layer in plan.copied if _name(layer) not in self._copied]
        for start in range(0, len(waiting), COPIES_AT_ONCE):
            batch = waiting[start : start + COPIES_AT_ONCE]
            await asyncio.gather(*(self._timeline.in_thread(partial(self._copy, layer)) for layer in batch))
        for layer in plan.trimmed:
            if _name(layer) not in self._trimmed:
                await self._timeline.in_thread(partial(self._trim, layer))

    def _copy(self, layer: ForeignLayer) -> None:
        home = self._timeline.home
        source = self._origin(layer).home.object_name(layer.description)
        with suppress(ObjectExistsError):  # the name holds the content's checksum: it is this layer
            home.context.store.copy(source, home.object_name(layer.description))
        self._copied.add(_name(layer))

    def _trim(self, layer: ForeignLayer) -> None:
        home = self._timeline.home
        file = self._origin(layer).stack.files.get(layer.description.name)
        if file is None:
            raise ObjectMissingError(f"layer {layer.description.name} was replaced")
        written = write_values_delta(
            home,
            _values_up_to(file, layer.end_lsn),
            layer.description.start_lsn,
            layer.end_lsn,
            self._timeline.generation,
            level=1,
        )
        if written is not None:
            upload_layer(home, written)
        self._trimmed[_name(layer)] = written

    def _origin(self, layer: ForeignLayer) -> Timeline:
        for ancestor, _ in _ancestors(self._timeline):
            if ancestor.timeline_id == layer.timeline_id:
                return ancestor
        raise DetachDisturbedError(
            f"timeline {self._timeline.timeline_id} has other ancestors now: try again"
        )


def _ancestors(timeline: Timeline) -> Iterator[tuple[Timeline, Lsn]]:
    """From the nearest on, each with the LSN up to which the timeline reads it."""
    ancestry = timeline.stack.ancestry
    end_lsn = timeline.last_record_lsn
    while ancestry is not None:
        end_lsn = min(end_lsn, ancestry.lsn)
        yield ancestry.timeline, end_lsn
        ancestry = ancestry.timeline.stack.ancestry


def _values_up_to(file: DiskLayer, end_lsn: int) -> Iterator[Value]:
    for block in file.blocks(MIN_KEY, MAX_KEY, 0, end_lsn, cached=False):
        for value in unpack_block(block):
            if value.lsn <= end_lsn:
                yield value


def _name(layer: ForeignLayer) -> ForeignName:
    return layer.timeline_id, layer.description.name
