"""Redo workers and what happens when they fail: the right page or an error, never anything else.

* A worker that reported an error, died or fell silent is killed, and what it answered before that counts;
  what came after is asked of another one, because redo of a bad record may have corrupted memory.
* The request at fault is tried again alone, in a fresh worker. An error that it itself reported twice,
  or `ATTEMPTS` deaths, are a `RedoError`. So a worker killed from outside costs time and nothing else.
* Workers that do not start are tried again with growing pauses, then `RedoUnavailableError`.

A worker is also replaced after `LIFE_REQUESTS` requests, and when its memory or its scratch files have grown.

Not here: threads and splitting (`redo_pool`), processes and pipes (`redo_worker`).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from excimer.base.errors import CorruptionError, RetryableError
from excimer.base.keys import describe_key
from excimer.base.lsn import format_lsn
from excimer.storage.engine.redo_worker import Exchange, Failure, RedoWorkerStartError
from excimer.wire.redo import decode_redo_request, request_key

REQUEST_TIMEOUT_S = 20.0
"""Without any progress. Well below the 60 s after which a compute gives up a read: a worker that hangs is
replaced, and the read still succeeds."""
ATTEMPTS = 3
LIFE_REQUESTS = 1_000_000
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


class Worker(Protocol):
    """What a crew needs of `RedoWorker`."""

    @property
    def process_id(self) -> int: ...
    @property
    def request_count(self) -> int: ...
    def exchange(self, requests: Sequence[bytes], timeout_s: float) -> Exchange: ...
    def memory_bytes(self) -> int: ...
    def scratch_bytes(self) -> int: ...
    def close(self) -> None: ...


class RedoCrew:
    """As many workers as threads call `run_batch` at once; all methods block and any thread may call them."""

    def __init__(
        self,
        start_worker: Callable[[], Worker],
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._start_worker = start_worker
        self._request_timeout_s = request_timeout_s
        self._pause = pause
        self._idle: deque[Worker] = deque()
        self._busy: set[Worker] = set()
        self._lock = threading.Lock()
        self.started = 0
        """Workers started so far."""

    def process_ids(self) -> list[int]:
        """Of the workers alive."""
        with self._lock:
            return [worker.process_id for worker in (*self._idle, *self._busy)]

    def run_batch(self, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        """A page or an error per request, in order. Raises `RedoUnavailableError`."""
        results: list[bytes | RedoError] = [b""] * len(requests)
        pending = list(range(len(requests)))
        suspects: list[tuple[int, Failure]] = []
        unexplained = 0
        while pending:
            pages, failure = self._exchange([requests[index] for index in pending], self._take())
            for index, page in zip(pending, pages, strict=False):
                results[index] = page
            if failure is None:
                break
            if failure.request is None:
                unexplained += 1
                if unexplained > UNEXPLAINED_DEATHS_MAX:
                    raise RedoUnavailableError(f"redo workers do not stay alive: {failure.reason}")
            else:
                suspects.append((pending[failure.request], failure))
            suspected = {index for index, _ in suspects}
            pending = [index for index in pending[len(pages) :] if index not in suspected]
        for index, failure in suspects:
            results[index] = self._run_alone(requests[index], failure)
        return results

    def close(self) -> None:
        """Stops the idle workers; nobody may be in `run_batch`."""
        while self._idle:
            self._idle.pop().close()

    def _run_alone(self, request: bytes, failure: Failure) -> bytes | RedoError:
        attempts = 1
        while attempts < (2 if failure.answered else ATTEMPTS):
            self._discard_one()
            pages, next_failure = self._exchange([request], self._start())
            if next_failure is None:
                return pages[0]
            failure = next_failure
            attempts += 1
        records = decode_redo_request(request).records
        lsn = records[-1].end_lsn if records else 0
        return RedoError(request_key(request), lsn, failure.record_lsn, failure.reason)

    def _exchange(self, requests: Sequence[bytes], worker: Worker) -> tuple[list[bytes], Failure | None]:
        reusable = False
        try:
            outcome = worker.exchange(requests, self._request_timeout_s)
            reusable = outcome.failure is None and not self._is_worn_out(worker, len(requests))
        finally:
            with self._lock:
                self._busy.discard(worker)
                if reusable:
                    self._idle.append(worker)
            if not reusable:
                worker.close()
        return outcome.pages, outcome.failure

    def _is_worn_out(self, worker: Worker, just_sent: int) -> bool:
        sent = worker.request_count
        if sent >= LIFE_REQUESTS:
            return True
        if sent // CHECK_EVERY_REQUESTS == (sent - just_sent) // CHECK_EVERY_REQUESTS:
            return False
        return worker.memory_bytes() > MEMORY_BYTES_MAX or worker.scratch_bytes() > SCRATCH_BYTES_MAX

    def _take(self) -> Worker:
        """An idle worker, the one used last first; else a new one."""
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
                self._busy.add(worker)
                return worker
        return self._start()

    def _discard_one(self) -> None:
        """Makes place for a fresh worker."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None:
            worker.close()

    def _start(self) -> Worker:
        for attempt in range(START_ATTEMPTS):
            try:
                worker = self._start_worker()
            except RedoWorkerStartError as error:
                problem = error
                self._pause(START_PAUSE_S * 4**attempt)
                continue
            with self._lock:
                self.started += 1
                self._busy.add(worker)
            return worker
        raise RedoUnavailableError(str(problem)) from problem
