"""A timeline in the making, from outside: images of a cluster first, then the WAL that follows them.

::

    begin: manifest, *importing* -> images, as they come -> layers -> WAL through `timeline` -> finish
                                                                                             |
    the timeline exists, complete, from its oldest readable LSN on  <- manifest without the mark

The mark is what makes it all or nothing: whoever attaches the tenant and finds it removes the objects
(`TenantStorage.attach`), because whoever was importing is gone. It is written before anything else is, so
that nothing can be left that no manifest leads to. An older generation that is still importing makes no
timeline in the end: what it makes is marked deleted (`timeline_removal`).

The files of a running cluster are copied while they change. Their images count as of the LSN at which WAL
begins, and WAL brings every page that changed meanwhile to one state; that is reached at
`readable_lsn`, and nothing below it can ever be read.

Not here: reading clusters and WAL (`excimer.pageserver.cluster_import`).
"""

import asyncio
from collections.abc import Callable
from functools import partial

import msgspec

from excimer.base.lsn import Lsn
from excimer.storage.engine.image_sorter import ImageSorter
from excimer.storage.engine.timeline import Timeline

FLUSH_AT = 0.5
"""Of the open layer's limit: so full it is flushed between two chunks of WAL."""


class TimelineImport:
    """Made by `TenantStorage.begin_import`; ends with `TenantStorage.finish_import` or `abort_import`."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        """Not the tenant's yet: takes WAL, and is read by ingest only."""
        self._sorter: ImageSorter | None = ImageSorter(
            timeline.home, timeline.manifest.disk_consistent_lsn, timeline.generation, keep_local=False
        )

    async def begin(self) -> None:
        """Durable on return. Raises `ObjectStoreError`, `FencedError`."""
        await self.timeline.commits.write_first_manifest()

    def add_image(self, key: bytes, data: bytes) -> None:
        """See `ImageSorter.add`. Blocks; one thread at a time."""
        if self._sorter is None:
            raise ValueError("images come before WAL")
        self._sorter.add(key, data)

    async def finish_images(self) -> None:
        """From here on `timeline` may be read at its LSN. Raises ValueError, OSError, `ObjectStoreError`."""
        sorter, self._sorter = self._sorter, None
        if sorter is None:
            raise ValueError("the images are finished already")
        try:
            layers = await self.timeline.whole_in_thread(sorter.finish)
        finally:
            await self.timeline.in_thread(sorter.discard)
        await self.timeline.commits.replace_layers(layers, [])

    async def make_room(self) -> None:
        """Flushes when much WAL waits in memory; for between chunks. Raises `ObjectStoreError`, OSError."""
        stack = self.timeline.stack
        limit = self.timeline.context.settings.flush_size_bytes * FLUSH_AT
        if stack.frozen or stack.open.size_bytes > limit:
            await self.timeline.flush()

    async def complete(self, readable_lsn: Lsn) -> None:
        """Makes the timeline exist, readable from `readable_lsn` on. Raises `ObjectStoreError`, OSError."""
        timeline = self.timeline
        if not timeline.manifest.oldest_lsn <= readable_lsn <= timeline.last_record_lsn:
            raise ValueError("the timeline must be readable somewhere")
        await timeline.flush()
        timeline.retention.raise_cutoff(readable_lsn)
        await timeline.commits.rewrite(
            lambda manifest: msgspec.structs.replace(
                manifest, importing_generation=0, oldest_lsn=readable_lsn
            ),
            None,
        )

    async def close(self, remove_objects: Callable[[], None]) -> None:
        """Gives up: nothing of it is left, if object storage answers. Raises `ObjectStoreError`."""
        if self._sorter is not None:
            await self.timeline.in_thread(self._sorter.discard)
        await self.timeline.close()
        await asyncio.shield(self.timeline.in_thread(partial(remove_objects)))
