"""What a timeline durably consists of, and every change of it: a manifest, then what reads go by.

::

    layers (file, object) -> manifest -> layer stack -> dropped layers to the deletion queue

Each step is durable before the next, so that a crash between any two leaves the old state or the new.
Changes happen one at a time: each takes `lock`, makes its manifest from the newest one, and writes it in
a thread that a cancellation waits for.

Not here: which changes are due (`timeline`, `compactor`, `garbage_collector`); where manifests lie
(`manifest_store`).
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import msgspec

from excimer.base.lsn import Lsn
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.deletion_queue import DeletionQueue
from excimer.storage.engine.engine_counters import WrittenBy
from excimer.storage.engine.image_sorter import ImageSorter
from excimer.storage.engine.layer_stack import Ancestry, FrozenLayer, LayerHome, LayerStack
from excimer.storage.engine.layer_writing import is_here, upload_layer, write_delta
from excimer.storage.engine.manifest_store import ManifestStore
from excimer.storage.format.manifest import LayerDescription, Manifest
from excimer.storage.plan.layer_map import LayerMap
from excimer.storage.plan.retention import Retention

_Result = TypeVar("_Result")


class CommittedTimeline(Protocol):
    context: StorageContext
    home: LayerHome
    generation: int
    stack: LayerStack
    manifest: Manifest
    retention: Retention
    deletions: DeletionQueue

    def check_runs(self) -> None: ...
    def adopt(self, manifest: Manifest, change: Callable[[LayerStack], LayerStack], /) -> None: ...
    async def whole_in_thread(self, function: Callable[[], _Result], /) -> _Result: ...


class TimelineCommits:
    def __init__(self, timeline: CommittedTimeline, manifests: ManifestStore) -> None:
        self._timeline = timeline
        self._manifests = manifests
        self._loop = asyncio.get_running_loop()
        self._written: tuple[FrozenLayer, LayerDescription] | None = None
        self.lock = asyncio.Lock()

    async def import_images(self, images: Iterable[tuple[bytes, bytes]]) -> None:
        """The content of a new timeline as of its `disk_consistent_lsn`: every key and its whole value.

        Any order; memory is bounded (`ImageSorter`). Writes the timeline's first manifest: before that it
        does not exist, whatever happens. Raises `ObjectStoreError`, OSError, ValueError.
        """
        async with self.lock:
            await self._timeline.whole_in_thread(partial(self._import_images, images))

    async def write_first_manifest(self) -> None:
        """Makes a new branch exist."""
        async with self.lock:
            await self._commit(self._timeline.manifest)

    async def mark_deleted(self) -> None:
        """From here on the timeline counts as deleted, whatever is still there of it."""
        async with self.lock:
            await self._commit(msgspec.structs.replace(self._timeline.manifest, deleted=True))

    async def rewrite(self, change: Callable[[Manifest], Manifest | None], ancestry: Ancestry | None) -> bool:
        """`change` makes the next manifest of the newest; its layers and ancestor take the place of the
        old in one step. False if it answers None.
        """
        async with self.lock:
            self._timeline.check_runs()
            manifest = change(self._timeline.manifest)
            if manifest is not None:
                await self._timeline.whole_in_thread(partial(self._rewrite, manifest, ancestry))
        return manifest is not None

    async def replace_layers(
        self, added: Sequence[LayerDescription], removed: Sequence[LayerDescription]
    ) -> None:
        """Uploaded layers come and others go with one manifest; one in both is described anew.

        Errors as `Timeline.flush`. Hold the compaction lock.
        """
        async with self.lock:
            self._timeline.check_runs()
            commit = partial(self.commit_layers, added=added, removed=removed)
            await self._timeline.whole_in_thread(lambda: commit(self._timeline.manifest))

    @property
    def is_sure_of_newest(self) -> bool:
        """As of `ManifestStore`."""
        return self._manifests.is_sure_of_newest

    async def repeat_newest(self) -> None:
        """Writes the newest manifest once more, so that it is ours. Hold the lock. Errors as a flush."""
        await self._commit(self._timeline.manifest)

    async def advance_oldest_lsn(self, lsn: Lsn) -> None:
        """Reads below it are refused when this returns, and after a restart. Errors as `Timeline.flush`."""
        async with self.lock:
            self._timeline.check_runs()
            await self._commit(msgspec.structs.replace(self._timeline.manifest, oldest_lsn=lsn))

    def flush(self, frozen: FrozenLayer) -> None:
        """File, object, manifest, and only then the exchange. Blocks; hold the lock.

        A try that failed is repeated with the file that it has written.
        """
        timeline = self._timeline
        added: list[LayerDescription] = []
        if frozen.memory.value_count:
            written = self._written
            if written is None or written[0] is not frozen or not is_here(timeline.home, written[1]):
                written = self._written = (frozen, write_delta(timeline.home, frozen, timeline.generation))
                timeline.context.counters.layer_written(WrittenBy.FLUSH, written[1].size_bytes)
            upload_layer(timeline.home, written[1])
            added.append(written[1])
        manifest = msgspec.structs.replace(
            timeline.manifest, disk_consistent_lsn=frozen.end_lsn, prev_record_lsn=frozen.prev_record_lsn
        )
        self.commit_layers(manifest, added, flushed=frozen)
        self._written = None

    def commit_layers(
        self,
        manifest: Manifest,
        added: Sequence[LayerDescription],
        *,
        removed: Sequence[LayerDescription] = (),
        flushed: FrozenLayer | None = None,
    ) -> None:
        """Makes uploaded layers part of the timeline, and others not: a durable manifest, then the layer
        stack; then what was removed is deleted in the background. A layer in both is described anew.

        Blocks. Hold the lock, and to remove something the compaction lock.
        """
        timeline = self._timeline
        before = timeline.stack
        files = {
            layer.name: timeline.home.disk_layer(layer) for layer in added if layer.name not in before.files
        }
        disk = before.disk.changed(added=added, removed=removed)
        leased_lsns = timeline.retention.leases_below_cutoff(self._loop.time())
        manifest = msgspec.structs.replace(manifest, layers=disk.descriptions, leased_lsns=leased_lsns)
        self._manifests.write(manifest)
        timeline.adopt(manifest, lambda stack: stack.with_disk(disk, files, flushed))
        for file in files.values():
            file.note_local()
        self._give_up_layers(before)

    async def _commit(self, manifest: Manifest) -> None:
        await self._timeline.whole_in_thread(partial(self.commit_layers, manifest, []))

    def _import_images(self, images: Iterable[tuple[bytes, bytes]]) -> None:
        timeline = self._timeline
        lsn = timeline.manifest.disk_consistent_lsn
        sorter = ImageSorter(timeline.home, lsn, timeline.generation, keep_local=True)
        try:
            for key, data in images:
                sorter.add(key, data)
            self.commit_layers(timeline.manifest, sorter.finish())
        finally:
            sorter.discard()

    def _rewrite(self, manifest: Manifest, ancestry: Ancestry | None) -> None:
        timeline = self._timeline
        before = timeline.stack
        disk = LayerMap.from_descriptions(manifest.layers)
        added = {
            layer.name: timeline.home.disk_layer(layer)
            for layer in manifest.layers
            if layer.name not in before.files
        }
        self._manifests.write(manifest)
        timeline.adopt(manifest, lambda stack: replace(stack.with_disk(disk, added, None), ancestry=ancestry))
        self._give_up_layers(before)

    def _give_up_layers(self, before: LayerStack) -> None:
        """Deletes in the background what a commit has dropped."""
        timeline = self._timeline
        timeline.deletions.superseded(before.disk)
        timeline.deletions.add(
            file for name, file in before.files.items() if name not in timeline.stack.files
        )
