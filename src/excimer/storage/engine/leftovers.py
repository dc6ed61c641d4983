"""Layers of our own generation that no manifest names: what a crash or a failed job left in object storage.

Those of older generations go with the claim of a newer one (`claim`). Our own may be somebody's all the same:
of a job of ours that has not committed yet, or of a manifest that the process before us sent and whose answer
it did not live to see. So layers are removed only

* while no upload of ours is under way: with the locks of `compaction` and `commits` held, and not while
  somebody uploads without them (`left_alone`);
* after this process has written a manifest of its own, with nothing unanswered behind it: from there on
  none of the process before us, whose generation is ours, can come to be the newest;
* when no reader walks an older layer map, and right after a look for manifests of a newer generation, as
  with all deletions (G1, D3).

::

    attached, and the listing has layers that the manifest does not name --+
    a merge, an image round or a detachment failed, or was cancelled ------+--> is_suspected --> sweep
    the deletion queue was full -------------------------------------------+

Nothing is listed as long as nothing is suspected. What a sweep cannot do now it does after a pause.

Not here: layers that a manifest did name (`deletion_queue`).
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar

from excimer.storage.engine.deletion_queue import DeletionQueue
from excimer.storage.engine.layer_stack import LayerHome, LayerStack
from excimer.storage.engine.manifest_store import check_not_overtaken
from excimer.storage.engine.timeline_commits import TimelineCommits
from excimer.storage.format.manifest import Manifest, layer_generation

_log = logging.getLogger(__name__)

BATCH_MAX: Final = 1000
"""Removed while flushes and compaction wait; then it is their turn."""
PAUSE_S_FIRST: Final = 0.05
PAUSE_S_MAX: Final = 10.0

_Result = TypeVar("_Result")


class SweptTimeline(Protocol):
    home: LayerHome
    generation: int
    compaction_lock: asyncio.Lock

    @property
    def stack(self) -> LayerStack: ...
    @property
    def manifest(self) -> Manifest: ...
    @property
    def commits(self) -> TimelineCommits: ...
    @property
    def deletions(self) -> DeletionQueue: ...
    def check_runs(self) -> None: ...
    async def whole_in_thread(self, function: Callable[[], _Result], /) -> _Result: ...


class Leftovers:
    """Of one timeline. On the event loop's thread."""

    def __init__(self, timeline: SweptTimeline) -> None:
        self._timeline = timeline
        self._suspected = asyncio.Event()
        self._uploaders = 0
        self._pause_s = PAUSE_S_FIRST

    @property
    def is_suspected(self) -> bool:
        return self._suspected.is_set()

    def suspect(self) -> None:
        """There may be layers that nobody will ever name."""
        self._suspected.set()

    @contextmanager
    def suspected_on_failure(self) -> Iterator[None]:
        """Around what uploads layers and names them at its end."""
        is_done = False
        try:
            yield
            is_done = True
        finally:
            if not is_done:
                self.suspect()

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """The same, for what uploads without holding the locks."""
        self._uploaders += 1
        try:
            with self.suspected_on_failure():
                yield
        finally:
            self._uploaders -= 1

    async def run_when_suspected(self) -> None:
        """Waits for a suspicion and settles it; waits for others with growing pauses. Errors as `sweep`."""
        await self._suspected.wait()
        if await self.sweep():
            self._pause_s = PAUSE_S_FIRST
            return
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)

    async def sweep(self) -> bool:
        """Removes what nobody names, if that can be told now; whether nothing is suspected any more.

        Raises `ObjectStoreError`, OSError: call it again; `OvertakenError`: all is a newer generation's.
        """
        timeline = self._timeline
        while self.is_suspected:
            async with timeline.compaction_lock, timeline.commits.lock:
                timeline.check_runs()
                if self._uploaders or timeline.manifest.importing_generation:
                    return False
                if timeline.deletions.are_readers_left()():
                    return False
                if not timeline.commits.is_sure_of_newest:
                    await timeline.commits.repeat_newest()
                if await timeline.whole_in_thread(self._remove_batch):
                    self._suspected.clear()
        return True

    def _remove_batch(self) -> bool:
        """Whether that was all. Blocks; nothing of ours is being uploaded."""
        timeline = self._timeline
        home = timeline.home
        objects = check_not_overtaken(
            home.context.store, home.tenant_id, home.timeline_id, timeline.generation
        )
        queued = timeline.deletions.object_names
        listed = [name for name in objects.layers if name not in queued]
        strangers = unnamed_layers(listed, timeline.manifest, timeline.generation)
        batch = strangers[:BATCH_MAX]
        if batch:
            home.context.store.delete_many(batch)
            for name in batch:
                home.context.filesystem.remove(home.local_dir / name.rsplit("/", 1)[-1])
            home.context.counters.leftovers_removed(len(batch))
            _log.info("timeline %s: %d layers that nobody names removed", home.timeline_id, len(batch))
        return len(batch) == len(strangers)


def unnamed_layers(object_names: Iterable[str], manifest: Manifest, generation: int) -> list[str]:
    """Of a timeline's listed layers those that this or an older generation wrote and the manifest has not."""
    named = {layer.name for layer in manifest.layers}
    return [
        name
        for name in object_names
        if (layer := name.rsplit("/", 1)[-1]) not in named and layer_generation(layer) <= generation
    ]
