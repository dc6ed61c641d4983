"""What the engine of one process has done, as plain numbers that a host may show.

Kept here and not in a metrics library because the engine is a library itself, and because a page read
must not pay for more than an addition.

Not here: how they are shown (`excimer.pageserver.metrics`).
"""

import threading
from bisect import bisect_left
from enum import StrEnum

VISITS_BOUNDS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64)


class WrittenBy(StrEnum):
    """Why a layer was written."""

    FLUSH = "flush"
    MERGE = "merge"
    ROUND = "round"


class EngineCounters:
    """Any thread. Numbers only grow."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._visits = [0] * (len(VISITS_BOUNDS) + 1)
        self.visits_sum = 0
        self.written_bytes = dict.fromkeys(WrittenBy, 0)
        """Of layer files, compressed."""
        self.merged_bytes = 0
        """Of layers that merges have read and replaced."""
        self.delayed_puts = 0
        """Batches that ingest was held up before, for compaction to catch up."""
        self.delayed_puts_s = 0.0
        self.doomed_layers = 0
        """Layers that a commit has dropped, to be deleted."""
        self.deleted_layers = 0
        self.deleted_bytes = 0
        self.left_layers = 0
        """Doomed ones that were left: the timeline was closed, or a newer generation owns it."""
        self.leftover_layers = 0
        """Removed because no manifest names them and nobody is about to."""
        self.collections = 0
        self.collected_bytes = 0
        """Of layers that garbage collections have dropped."""

    @property
    def deletions_waiting(self) -> int:
        return self.doomed_layers - self.deleted_layers - self.left_layers

    def layers_doomed(self, count: int) -> None:
        with self._lock:
            self.doomed_layers += count

    def layers_deleted(self, count: int, size_bytes: int) -> None:
        with self._lock:
            self.deleted_layers += count
            self.deleted_bytes += size_bytes

    def layers_left(self, count: int) -> None:
        with self._lock:
            self.left_layers += count

    def leftovers_removed(self, count: int) -> None:
        with self._lock:
            self.leftover_layers += count

    def garbage_collected(self, size_bytes: int) -> None:
        with self._lock:
            self.collections += 1
            self.collected_bytes += size_bytes

    def read_visited(self, layers: int) -> None:
        """A read of a page, or of adjacent pages, took so many layer files. One out of caches is not told."""
        with self._lock:
            self._visits[bisect_left(VISITS_BOUNDS, layers)] += 1
            self.visits_sum += layers

    def layer_written(self, by: WrittenBy, size_bytes: int) -> None:
        with self._lock:
            self.written_bytes[by] += size_bytes

    def layers_merged(self, size_bytes: int) -> None:
        with self._lock:
            self.merged_bytes += size_bytes

    def put_delayed(self, delay_s: float) -> None:
        with self._lock:
            self.delayed_puts += 1
            self.delayed_puts_s += delay_s

    @property
    def visits(self) -> list[tuple[int | None, int]]:
        """(at most so many layers, so many reads), each read counted once; None: more than any of them."""
        with self._lock:
            return list(zip((*VISITS_BOUNDS, None), self._visits, strict=True))

    @property
    def write_amplification(self) -> float:
        """Bytes of all layers written for each byte flushed; 0 before the first flush."""
        with self._lock:
            flushed = self.written_bytes[WrittenBy.FLUSH]
            return sum(self.written_bytes.values()) / flushed if flushed else 0.0
