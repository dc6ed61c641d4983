"""All layers of one timeline at one moment: what a read walks, as an immutable value.

    open (memory, being written) -> frozen (memory, newest last) -> disk

A writer replaces the whole stack; a reader takes it once and is then undisturbed by flushes. The
ancestor is a part of it: when a branch is detached, layers come and the ancestor goes in one step.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from excimer._native.memory_layer import MemoryLayer
from excimer.base.lsn import Lsn
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.manifest_store import timeline_prefix
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.layer_map import LayerMap

if TYPE_CHECKING:
    from excimer.storage.engine.timeline import Timeline


@dataclass(frozen=True)
class FrozenLayer:
    """A memory layer that takes no more values, and where WAL stood when it was frozen."""

    memory: MemoryLayer
    end_lsn: int
    prev_record_lsn: int


@dataclass(frozen=True)
class WalPosition:
    """The last record put: where it starts and ends. Replaced as a whole, so that it is always a pair."""

    prev_record_lsn: Lsn
    last_record_lsn: Lsn


@dataclass(frozen=True)
class Ancestry:
    """The timeline that a branch goes on from, and the branch point: nothing above it is read (S2)."""

    timeline: "Timeline"
    lsn: Lsn


@dataclass(frozen=True)
class LayerStack:
    open: MemoryLayer
    frozen: tuple[FrozenLayer, ...]
    """Oldest first."""
    disk: LayerMap
    files: dict[str, DiskLayer]
    """By layer name; one for each layer of `disk`."""
    ancestry: Ancestry | None = None
    """None: the history begins here."""

    @property
    def memory_layers(self) -> list[MemoryLayer]:
        """Newest first."""
        return [self.open, *(frozen.memory for frozen in reversed(self.frozen))]

    @property
    def disk_end_lsn(self) -> int:
        """No value on disk is newer."""
        return self.disk.layers[0].end_lsn if self.disk.layers else 0

    def with_frozen_open(self, end_lsn: int, prev_record_lsn: int) -> "LayerStack":
        """The open layer frozen, and a new one opened behind it."""
        self.open.freeze()
        frozen = FrozenLayer(self.open, end_lsn, prev_record_lsn)
        return replace(self, open=MemoryLayer(end_lsn), frozen=(*self.frozen, frozen))

    def with_disk(
        self, disk: LayerMap, added: dict[str, DiskLayer], flushed: FrozenLayer | None
    ) -> "LayerStack":
        """Another set of layers on disk, and a frozen one dropped whose values are now there."""
        names = {description.name for description in disk.descriptions}
        files = {name: file for name, file in (self.files | added).items() if name in names}
        frozen = tuple(layer for layer in self.frozen if layer is not flushed)
        return replace(self, frozen=frozen, disk=disk, files=files)


@dataclass(frozen=True)
class LayerHome:
    """Where a timeline's layers lie."""

    context: StorageContext
    tenant_id: str
    timeline_id: str

    @property
    def local_dir(self) -> Path:
        return self.context.local_dir / timeline_prefix(self.tenant_id, self.timeline_id) / "layers"

    def object_name(self, description: LayerDescription) -> str:
        return f"{timeline_prefix(self.tenant_id, self.timeline_id)}/layers/{description.name}"

    def local_path(self, description: LayerDescription) -> Path:
        return self.local_dir / description.name

    def disk_layer(self, description: LayerDescription) -> DiskLayer:
        return DiskLayer(
            self.context, description, self.local_path(description), self.object_name(description)
        )
