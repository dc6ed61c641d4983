"""Layers on their way into object storage: how many at once, how often tried, and how that goes.

::

    put_layer -> waiting (bounded by the threads that call) -> in flight (at most `in_flight_max`)
                                    ^                               |
                                    +------- pause, twice as long --+   after an error, `TRIES_MAX` in all

Memory is bounded: a file is streamed in parts, a few of them at once. The order of things is the
caller's: it returns from `put_layer` before it writes the manifest that names the layer. When the tries are
used up the error is the caller's too; a flush then comes again, with longer pauses and for ever.

Not here: manifests, which are small and exclusive (`manifest_store`); deletions.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from excimer.io.object_store import ObjectStore, ObjectStoreError

IN_FLIGHT_MAX: Final = 4
TRIES_MAX: Final = 4
PAUSE_S_FIRST: Final = 0.1
PAUSE_S_MAX: Final = 5.0


class UploadQueue:
    """One per process. Any thread. The figures are read without a lock, and may be a moment old."""

    def __init__(self, in_flight_max: int = IN_FLIGHT_MAX, pause_s_first: float = PAUSE_S_FIRST) -> None:
        self._pause_s_first = pause_s_first
        self._slots = threading.BoundedSemaphore(in_flight_max)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.layers_pending = 0
        """Waiting and in flight."""
        self.bytes_pending = 0
        self.layers_uploaded = 0
        self.bytes_uploaded = 0
        self.retries = 0
        self.failures = 0
        """Given back to the caller after `TRIES_MAX`."""
        self.seconds = 0.0
        """From asking to done, over all layers that were uploaded."""

    def put_layer(self, store: ObjectStore, name: str, path: Path, size_bytes: int) -> None:
        """Durable on return. Blocks. Raises `ObjectStoreError`, OSError when the file cannot be read."""
        begun = time.monotonic()
        with self._pending(size_bytes):
            self._try(store, name, path)
        with self._lock:
            self.layers_uploaded += 1
            self.bytes_uploaded += size_bytes
            self.seconds += time.monotonic() - begun

    def stop(self) -> None:
        """Pauses end at once, with the error that they followed: the process ends."""
        self._stopping.set()

    def _try(self, store: ObjectStore, name: str, path: Path) -> None:
        pause_s = self._pause_s_first
        for left in reversed(range(TRIES_MAX)):
            try:
                with self._slots:
                    store.put_file(name, path)
                return
            except ObjectStoreError:
                if left == 0 or self._stopping.wait(pause_s):
                    with self._lock:
                        self.failures += 1
                    raise
            pause_s = min(2 * pause_s, PAUSE_S_MAX)
            with self._lock:
                self.retries += 1

    @contextmanager
    def _pending(self, size_bytes: int) -> Iterator[None]:
        with self._lock:
            self.layers_pending += 1
            self.bytes_pending += size_bytes
        try:
            yield
        finally:
            with self._lock:
                self.layers_pending -= 1
                self.bytes_pending -= size_bytes
