"""Redo workers of one PostgreSQL version: batches of requests in, pages or errors out, in order.

::

    redo(requests) --.--> batch --thread--> worker process --> pages
    redo(requests) --'--> batch --thread--> worker process --> pages

Each worker serves one batch at a time, driven by a thread that blocks on its pipes: an event loop
step per page would cost more than the page. Requests of several reads that wait at the same time share a
batch (`redo_gathering`). Workers start when first needed.

Not here: what happens when a worker fails (`redo_crew`), PostgreSQL's side (`csrc/redo`), and which
records make up a page (`storage.plan`).
"""

import asyncio
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from excimer.io.cache import make_reachable_dir, remove_reachable_dir
from excimer.postgres import PostgresBuild, redo_extension
from excimer.postgres.redo_template import redo_control_file
from excimer.storage.engine.redo_crew import (
    REQUEST_TIMEOUT_S,
    RedoCrew,
    RedoError,
    RedoUnavailableError,
)
from excimer.storage.engine.redo_gathering import (
    BATCH_REQUESTS_MAX,
    BATCH_REQUESTS_MIN,
    BATCH_SIZE_BYTES_MAX,
    RedoGathering,
)
from excimer.storage.engine.redo_worker import RedoWorker

__all__ = ["RedoError", "RedoPool", "RedoUnavailableError", "split_batches"]


class RedoPool:
    """Up to `workers` redo workers of one build. Close it: its processes live as long as we do.

    `scratch_dir` is the page server's own: what a killed page server left there is removed. The
    constructor blocks while the redo extension is compiled (once per build) and raises
    `BuildUnusableError` when it cannot be. `wal_log_hints` must say whether the timelines' clusters log
    hint bits (by that setting or by data checksums): it decides which LSN some records leave on a page.
    `extension` is one that was compiled otherwise than usual.
    """

    def __init__(
        self,
        build: PostgresBuild,
        scratch_dir: Path,
        workers: int,
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        wal_log_hints: bool = False,
        extension: Path | None = None,
    ) -> None:
        self._workers = workers
        self._scratch_name = scratch_dir / f"redo-{build.version}{'-hints' if wal_log_hints else ''}"
        library = extension or redo_extension(build)
        control_file = redo_control_file(build)
        place = self._scratch_dir = make_reachable_dir(self._scratch_name)
        for leftover in place.glob("worker-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.crew = RedoCrew(
            lambda: RedoWorker(build, library, control_file, place, wal_log_hints=wal_log_hints),
            request_timeout_s=request_timeout_s,
        )
        # As many threads as workers: a thread always finds an idle worker, or room for one more.
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix=f"redo-{build.version}")
        self._gathering = RedoGathering(self.crew.run_batch, self._executor, workers)
        self._lock = threading.Lock()
        self._closed = False

    async def redo(self, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        """Pages for requests (`encode_redo_request`), in their order; a `RedoError` in place of a page
        that cannot be rebuilt. Raises `RedoUnavailableError`. Of one event loop at a time.
        """
        return await self._gathering.redo(requests)

    def redo_blocking(self, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        """`redo` for a thread that may block."""
        results: list[bytes | RedoError] = []
        for future in self._submit(requests):
            results += future.result()
        return results

    async def close(self) -> None:
        """Waits for batches under way, then stops all workers. May be called more than once."""
        with self._lock:
            self._closed = True
        self._gathering.close()
        await asyncio.to_thread(self._executor.shutdown)
        self.crew.close()
        remove_reachable_dir(self._scratch_name, self._scratch_dir)

    def _submit(self, requests: Sequence[bytes]) -> "list[Future[list[bytes | RedoError]]]":
        with self._lock:
            if self._closed:
                raise RedoUnavailableError("the redo pool is closed: the page server is stopping")
            return [
                self._executor.submit(self.crew.run_batch, batch)
                for batch in split_batches(requests, self._workers)
            ]


def split_batches(requests: Sequence[bytes], workers: int) -> Iterator[list[bytes]]:
    """Consecutive batches: spread over the workers, but not too small, nor too big for a pipe's pace."""
    fair = -(-len(requests) // workers)
    count_max = min(max(fair, BATCH_REQUESTS_MIN), BATCH_REQUESTS_MAX)
    batch: list[bytes] = []
    size = 0
    for request in requests:
        if batch and (len(batch) >= count_max or size + len(request) > BATCH_SIZE_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(request)
        size += len(request)
    if batch:
        yield batch
