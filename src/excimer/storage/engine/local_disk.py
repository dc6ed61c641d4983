"""How much of the local disk copies of layers take, over all tenants, and which of them go first.

::

    0 ................ low water ........ high water
                           <---- evict ----|            when a copy makes the sum exceed high water, the
                                                        least recently used go until low water is reached

Every local copy is a cache of an object, so evicting one costs a download and never data. Layers report what
they take (`use`) and that they were read (`next_tick`). A copy that is being read goes on being
readable for its readers: the file is unlinked, not emptied.

One thread downloads the rest of a layer in the background where that pays (`partial_copy` says where).

Not here: files (`disk_layer`, `partial_copy`), the memory for decompressed blocks (`block_cache`).
"""

import itertools
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, Protocol

from excimer.base.errors import ExcimerError

_log = logging.getLogger(__name__)

LOW_WATER_FRACTION: Final = 0.9
BACKGROUND_JOBS_MAX: Final = 64
"""Downloads that may wait; what comes on top is simply not downloaded."""
FETCHERS_MAX: Final = 16
"""Requests of reads at the same time, beyond one per read."""


class LocalCopy(Protocol):
    """A layer as this module sees it."""

    last_used: int
    """A tick of `LocalDisk.next_tick`."""

    def evict(self) -> None:
        """Removes the local file, if any. Never blocks for long; an error leaves it where it is."""


class LocalDisk:
    """One per process. Any thread; call it without holding a layer's lock, for it may evict another one."""

    def __init__(self, size_bytes_max: int | None = None) -> None:
        """None: no bound."""
        self.size_bytes_max = size_bytes_max
        self.evictions = 0
        self.evicted_bytes = 0
        self.fetched_bytes = 0
        """Of layers, from object storage."""
        self.fetches = 0
        self.fetch_failures = 0
        self._taken: dict[LocalCopy, int] = {}
        self._total_bytes = 0
        self._lock = threading.Lock()
        self._ticks = itertools.count(1)
        self._jobs = 0
        self._executor: ThreadPoolExecutor | None = None
        self._fetchers: ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """What all copies take."""
        return self._total_bytes

    @property
    def copies(self) -> int:
        return len(self._taken)

    def size_of(self, copy: LocalCopy) -> int:
        """What one copy takes."""
        return self._taken.get(copy, 0)

    def next_tick(self) -> int:
        return next(self._ticks)

    def has_room(self, size_bytes: int) -> bool:
        """Whether so much more would evict nothing."""
        return self.size_bytes_max is None or self._total_bytes + size_bytes <= self.size_bytes_max

    def use(self, copy: LocalCopy, size_bytes: int) -> None:
        """The copy takes so much now (0: it is gone). Evicts others if that is too much in all."""
        with self._lock:
            self._total_bytes += size_bytes - self._taken.pop(copy, 0)
            if size_bytes:
                self._taken[copy] = size_bytes
            victims = []
            if self.size_bytes_max is not None and self._total_bytes > self.size_bytes_max:
                victims = self._take_victims_locked(int(self.size_bytes_max * LOW_WATER_FRACTION), copy)
        self._evict(victims)

    def relieve(self) -> None:
        """The file system is full, whatever the bound: evicts half of what is here."""
        with self._lock:
            victims = self._take_victims_locked(self._total_bytes // 2, None)
        self._evict(victims)

    def count_fetch(self, size_bytes: int | None) -> None:
        """A request for bytes of a layer; None: it failed."""
        with self._lock:
            self.fetches += 1
            if size_bytes is None:
                self.fetch_failures += 1
            else:
                self.fetched_bytes += size_bytes

    def in_background(self, job: Callable[[], None]) -> bool:
        """Runs the job some time; False if there is too much to do already. What it raises is logged."""
        with self._lock:
            if self._closed or self._jobs >= BACKGROUND_JOBS_MAX:
                return False
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="layer download")
            self._jobs += 1
            self._executor.submit(self._run, job)
            return True

    def run_together(self, fetches: Iterable[Callable[[], None]]) -> None:
        """Runs what fetches at the same time, and waits for all of it. Not from within one of them."""
        with self._lock:
            if self._closed:
                return
            if self._fetchers is None:
                self._fetchers = ThreadPoolExecutor(FETCHERS_MAX, thread_name_prefix="layer fetch")
            running = [self._fetchers.submit(fetch) for fetch in fetches]
        wait(running)

    def close(self) -> None:
        """No more background work; what waits is dropped, what runs is not waited for."""
        with self._lock:
            self._closed = True
            executors = [each for each in (self._executor, self._fetchers) if each is not None]
            self._executor = self._fetchers = None
        for executor in executors:
            executor.shutdown(wait=False, cancel_futures=True)

    def wait_idle(self) -> None:
        """Blocks until the background work begun so far is done. For tests and benchmarks."""
        with self._lock:
            executor = self._executor
        if executor is not None:
            executor.submit(lambda: None).result()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except (ExcimerError, OSError) as error:
            _log.warning("a layer was not downloaded in the background: %s", error)
        finally:
            with self._lock:
                self._jobs -= 1

    def _take_victims_locked(self, low_bytes: int, user: LocalCopy | None) -> list[tuple[LocalCopy, int]]:
        """Copies, and what they took, without which all take `low_bytes`; never the user's."""
        victims = []
        for copy in sorted(self._taken, key=lambda copy: copy.last_used):
            if self._total_bytes <= low_bytes:
                break
            if copy is not user:
                victims.append((copy, self._taken.pop(copy)))
                self._total_bytes -= victims[-1][1]
        return victims

    def _evict(self, victims: list[tuple[LocalCopy, int]]) -> None:
        for victim, size_bytes in victims:
            victim.evict()
            self.evictions += 1
            self.evicted_bytes += size_bytes
