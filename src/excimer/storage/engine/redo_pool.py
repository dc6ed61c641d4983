"""Redo workers of one PostgreSQL version: batches of requests in, pages or errors out, in order.

::

    redo(requests) --split--> batch --thread--> worker process --> pages
                              batch --thread--> worker process --> pages

Each worker serves one batch at a time, driven by a thread that blocks on its pipes: an event loop
step per page would cost more than the page. Workers start when first needed.

What happens when something fails, so that an answer is the right page or an error, never anything else:

* A worker that reported an error, died or fell silent is killed, and what it answered before that counts;
  what came after is asked of a fresh one, because redo of a bad record may have corrupted memory.
* The request at fault is tried again alone, in a fresh worker. An error that it itself reported twice,
  or `ATTEMPTS` deaths, are a `RedoError`. So a worker killed from outside costs time and nothing else.
* Workers that do not start are tried again with growing pauses, then `RedoUnavailableError`.

A worker is also replaced after `LIFE_REQUESTS` requests, and when its memory or its scratch files have grown.

Not here: PostgreSQL's side (`csrc/redo`), and which records make up a page (`storage.plan.read_path`).
"""

import asyncio
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from excimer.base.errors import CorruptionError, RetryableError
from excimer.base.keys import describe_key
from excimer.base.lsn import format_lsn
from excimer.io.cache import make_reachable_dir, remove_reachable_dir
from excimer.postgres import PostgresBuild, redo_extension
from excimer.postgres.redo_template import redo_control_file
from excimer.storage.engine.redo_worker import Failure, RedoWorker, RedoWorkerStartError
from excimer.wire.redo import decode_redo_request, request_key

BATCH_REQUESTS_MIN = 16
"""A batch is not split below this: waking another worker costs more."""
BATCH_REQUESTS_MAX = 256
BATCH_SIZE_BYTES_MAX = 4 << 20
REQUEST_TIMEOUT_S = 60.0
ATTEMPTS = 3
LIFE_REQUESTS = 200_000
CHECK_EVERY_REQUESTS = 2_000
MEMORY_BYTES_MAX = 192 << 20
SCRATCH_BYTES_MAX = 64 << 20
START_ATTEMPTS = 4
START_PAUSE_S = 0.1
UNEXPLAINED_DEATHS_MAX = 5


class RedoError(CorruptionError):
    """A page cannot be rebuilt from its records."""

    def __init__(self, key: bytes, lsn: int, record_lsn: int, reason: str) -> None:
        at_record = f"; the record at fault is at {format_lsn(record_lsn)}" if record_lsn else ""
        super().__init__(
            f"{describe_key(key)} cannot be rebuilt as of {format_lsn(lsn)}: {reason}{at_record}"
        )
        self.key = key
        self.lsn = lsn
        """End of the last record of the chain: the version that was asked for."""
        self.record_lsn = record_lsn
        """Start of the record that could not be applied; 0 when the fault is not one record's."""
        self.reason = reason


class RedoUnavailableError(RetryableError):
    """No redo worker can be kept running at the moment, or the pool is closed."""


class RedoPool:
    """Up to `workers` redo workers of one build. Close it, or it leaves processes behind until we exit.

    `scratch_dir` is the page server's own: what a killed page server left there is removed. The
    constructor blocks while the redo extension is compiled (once per build) and raises
    `BuildUnusableError` when it cannot be.
    """

    def __init__(
        self,
        build: PostgresBuild,
        scratch_dir: Path,
        workers: int,
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        wal_log_hints: bool = False,
    ) -> None:
        self._build = build
        self._extension = redo_extension(build)
        self._control_file = redo_control_file(build)
        self._scratch_name = scratch_dir / f"redo-{build.version}"
        self._scratch_dir = make_reachable_dir(self._scratch_name)
        for leftover in self._scratch_dir.glob("worker-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._workers = workers
        self._request_timeout_s = request_timeout_s
        self._wal_log_hints = wal_log_hints
        # As many threads as workers: a thread always finds an idle place.
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix=f"redo-{build.version}")
        self._idle: deque[RedoWorker] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self.restarts = 0
        """Workers started so far."""

    async def redo(self, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        """Pages for requests (`encode_redo_request`), in their order; a `RedoError` in place of a page
        that cannot be rebuilt. Raises `RedoUnavailableError`.
        """
        futures = [asyncio.wrap_future(future) for future in self._submit(requests)]
        results: list[bytes | RedoError] = []
        for part in await asyncio.gather(*futures):
            results += part
        return results

    def redo_blocking(self, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        """`redo` for a thread that may block."""
        results: list[bytes | RedoError] = []
        for future in self._submit(requests):
            results += future.result()
        return results

    async def close(self) -> None:
        """Waits for batches under way, then stops all workers."""
        with self._lock:
            self._closed = True
        await asyncio.to_thread(self._executor.shutdown)
        while self._idle:
            self._idle.pop().close()
        remove_reachable_dir(self._scratch_name, self._scratch_dir)

    def _submit(self, requests: Sequence[bytes]) -> "list[Future[list[bytes | RedoError]]]":
        with self._lock:
            if self._closed:
                raise RedoUnavailableError("the redo pool is closed: the page server is stopping")
            return [
                self._executor.submit(self._run_batch, batch)
                for batch in split_batches(requests, self._workers)
            ]

    def _run_batch(self, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        """Runs in a thread. Asks all, then the suspects alone."""
        results: list[bytes | RedoError] = [b""] * len(requests)
        pending = list(range(len(requests)))
        suspects: list[tuple[int, Failure]] = []
        unexplained = 0
        while pending:
            pages, failure = self._exchange([requests[index] for index in pending])
            for index, page in zip(pending, pages, strict=False):
                results[index] = page
            if failure is None:
                break
            if failure.request is None:
                unexplained += 1
                if unexplained > UNEXPLAINED_DEATHS_MAX:
                    raise RedoUnavailableError(f"redo workers do not stay alive: {failure.reason}")
                pending = pending[len(pages) :]
                continue
            suspects.append((pending[failure.request], failure))
            pending = pending[len(pages) :]
            pending.remove(suspects[-1][0])
        for index, failure in suspects:
            results[index] = self._run_alone(requests[index], failure)
        return results

    def _run_alone(self, request: bytes, failure: Failure) -> bytes | RedoError:
        attempts = 1
        while attempts < (2 if failure.answered else ATTEMPTS):
            self._discard_idle()
            pages, next_failure = self._exchange([request], self._start())
            if next_failure is None:
                return pages[0]
            failure = next_failure
            attempts += 1
        records = decode_redo_request(request).records
        lsn = records[-1].end_lsn if records else 0
        return RedoError(request_key(request), lsn, failure.record_lsn, failure.reason)

    def _exchange(
        self, requests: Sequence[bytes], worker: RedoWorker | None = None
    ) -> tuple[list[bytes], Failure | None]:
        worker = worker or self._take()
        failed = True
        try:
            outcome = worker.exchange(requests, self._request_timeout_s)
            failed = outcome.failure is not None
        finally:
            if failed or self._worn_out(worker, len(requests)):
                worker.close()
            else:
                self._idle.append(worker)
        return outcome.pages, outcome.failure

    def _worn_out(self, worker: RedoWorker, just_sent: int) -> bool:
        sent = worker.request_count
        if sent >= LIFE_REQUESTS:
            return True
        if sent // CHECK_EVERY_REQUESTS == (sent - just_sent) // CHECK_EVERY_REQUESTS:
            return False
        return worker.memory_bytes() > MEMORY_BYTES_MAX or worker.scratch_bytes() > SCRATCH_BYTES_MAX

    def _take(self) -> RedoWorker:
        """An idle worker, the one used last first; else a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._start()

    def _discard_idle(self) -> None:
        """Makes place for a fresh one."""
        try:
            self._idle.pop().close()
        except IndexError:
            return

    def _start(self) -> RedoWorker:
        for attempt in range(START_ATTEMPTS):
            self.restarts += 1
            try:
                return RedoWorker(
                    self._build,
                    self._extension,
                    self._control_file,
                    self._scratch_dir,
                    wal_log_hints=self._wal_log_hints,
                )
            except RedoWorkerStartError as error:
                problem = error
                time.sleep(START_PAUSE_S * 4**attempt)
        raise RedoUnavailableError(str(problem)) from problem


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
