"""Removing a timeline's layers from object storage and from the local disk, when nothing needs them any more.

A layer comes here after a durable manifest no longer names it (D3). It goes when

* nobody reads by an older layer map: readers take a stack of layers once and may be anywhere in it;
* no newer generation has a manifest of this timeline: one that attached from an older manifest might still
  name the layer. That is asked right before each batch; a new generation therefore writes a manifest of
  its own first of all (`claim`).

What is in the queue is lost in a crash. Who attaches next removes what it finds that no manifest names
(`claim`, `leftovers`).

Not here: deciding what to remove (`excimer.storage.plan.gc_plan`, `compaction_plan`).
"""

import asyncio
import logging
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final, NamedTuple

from excimer.base.errors import FencedError
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.layer_stack import LayerHome
from excimer.storage.engine.manifest_store import check_not_overtaken
from excimer.storage.plan.layer_map import LayerMap

_log = logging.getLogger(__name__)

ENTRIES_MAX: Final = 100_000
"""What comes on top is left to `leftovers`."""
BATCH_MAX: Final = 1000
READERS_POLL_S_FIRST: Final = 0.05
READERS_POLL_S_MAX: Final = 10.0


class Doomed(NamedTuple):
    """A layer that is no longer named."""

    object_name: str
    file: DiskLayer
    readers: tuple[weakref.ref[LayerMap], ...]
    """The maps it was in: as long as one of them lives, somebody may come to read it."""

    @property
    def is_read(self) -> bool:
        return any(reader() is not None for reader in self.readers)


class DeletionQueue:
    """Of one timeline. `superseded` and `add` by the one who commits; `drain` one at a time, in a thread."""

    def __init__(self, home: LayerHome, generation: int) -> None:
        self._home = home
        self._generation = generation
        self._lock = threading.Lock()
        self._drain_lock = threading.Lock()
        self._waiting: deque[Doomed] = deque()
        self._maps: list[weakref.ref[LayerMap]] = []
        self._wanted = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._poll_s = READERS_POLL_S_FIRST
        self.on_overflow: Callable[[], None] = lambda: None
        """Called on the event loop when something did not fit."""
        self._closed = False
        self.dropped_count = 0
        """Entries that did not fit."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def object_names(self) -> frozenset[str]:
        """What it is going to delete."""
        with self._lock:
            return frozenset(doomed.object_name for doomed in self._waiting)

    def superseded(self, old: LayerMap) -> None:
        """A commit replaced this map; readers may still walk it."""
        with self._lock:
            self._maps = [reader for reader in self._maps if reader() is not None]
            self._maps.append(weakref.ref(old))

    def are_readers_left(self) -> Callable[[], bool]:
        """Tells, whenever it is asked, whether somebody still walks a map that has been replaced by now."""
        with self._lock:
            readers = tuple(self._maps)
        return lambda: any(reader() is not None for reader in readers)

    def add(self, files: Iterable[DiskLayer]) -> None:
        """Layers that the manifest just made durable no longer names. After `superseded`."""
        with self._lock:
            readers = tuple(self._maps)
        self._put([Doomed(file.object_name, file, readers) for file in files])

    def close(self) -> None:
        """Nothing is deleted from here on: the timeline is, or somebody else goes on with it."""
        with self._drain_lock:
            self._closed = True
            self._leave_all()

    async def run_when_wanted(self, in_thread: Callable[[Callable[[], int]], Awaitable[int]]) -> None:
        """Waits for something to delete and deletes it; waits for readers with growing pauses."""
        if not self._waiting:
            await self._wanted.wait()
        self._wanted.clear()
        deleted = await in_thread(self.drain)
        self._poll_s = READERS_POLL_S_FIRST if deleted else min(self._poll_s * 2, READERS_POLL_S_MAX)
        if self._waiting:
            await asyncio.sleep(self._poll_s)

    def drain(self) -> int:
        """Deletes what nobody reads, in batches; the number of objects. Blocks.

        Raises `ObjectStoreError`, OSError: what was not deleted stays in the queue; `OvertakenError`: all of
        it is the newer generation's, and forgotten.
        """
        count = 0
        home = self._home
        store = home.context.store
        with self._drain_lock:
            while batch := self._next_batch():
                try:
                    check_not_overtaken(store, home.tenant_id, home.timeline_id, self._generation)
                except FencedError:
                    self._leave_all()
                    raise
                store.delete_many([doomed.object_name for doomed in batch])
                for doomed in batch:
                    doomed.file.remove_local()
                self._forget({doomed.object_name for doomed in batch})
                size_bytes = sum(doomed.file.description.size_bytes for doomed in batch)
                home.context.counters.layers_deleted(len(batch), size_bytes)
                count += len(batch)
        return count

    def _leave_all(self) -> None:
        with self._lock:
            self._home.context.counters.layers_left(len(self._waiting))
            self._waiting.clear()

    def _put(self, doomed: list[Doomed]) -> None:
        with self._lock:
            if self._closed or not doomed:
                return
            room = max(0, ENTRIES_MAX - len(self._waiting))
            self._waiting.extend(doomed[:room])
            self.dropped_count += len(doomed) - len(doomed[:room])
            self._home.context.counters.layers_doomed(len(doomed[:room]))
        if len(doomed) > room:
            _log.warning(
                "timeline %s has %d layers too many to delete: they are looked for later",
                self._home.timeline_id,
                len(doomed) - room,
            )
            self._loop.call_soon_threadsafe(self.on_overflow)
        self._loop.call_soon_threadsafe(self._wanted.set)

    def _next_batch(self) -> list[Doomed]:
        with self._lock:
            ready: list[Doomed] = []
            for doomed in self._waiting:
                if len(ready) == BATCH_MAX:
                    break
                if not doomed.is_read:
                    ready.append(doomed)
            return ready

    def _forget(self, object_names: Collection[str]) -> None:
        with self._lock:
            self._waiting = deque(each for each in self._waiting if each.object_name not in object_names)
