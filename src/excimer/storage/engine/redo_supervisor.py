"""Redo workers and what happens when they fail: the right page or an error, never anything else.

* A worker that reported an error, died or fell silent is killed, and what it answered before that counts;
  what came after is asked of another one, because redo of a bad record may have corrupted memory.
* The request at fault is tried again alone, in a fresh worker. An error that it itself reported twice,
  or `ATTEMPTS` deaths, are a `RedoError`. So a worker killed from outside costs time and nothing else.
* Workers that do not start are tried again with growing pauses, then `RedoUnavailableError`.

A worker is also replaced after `LIFE_REQUESTS` requests, and when its memory or its scratch files have grown.

A worker belongs to the tenant for whom it was started until it ends: redo of a tenant's WAL may have put
anything into its memory. So there are as many idle ones as tenants that read, up to a bound; above it a
tenant that has not read for a while loses its own, and those idle for `IDLE_S_MAX` go.

Not here: threads (`redo_pool`), batches and turns (`redo_batcher`), processes and pipes (`redo_worker`).
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from excimer.base.errors import CorruptionError, RetryableError
from excimer.base.ids import TenantId
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
IDLE_S_MAX = 60.0
"""Starting another one costs some 12 ms, which a tenant that reads once a minute does not notice."""
NEEDED_S = 1.0
"""A worker that was used more recently than this is likely to be used again soon."""
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
    """What a supervisor needs of `RedoWorker`."""

    @property
    def process_id(self) -> int: ...
    @property
    def request_count(self) -> int: ...
    def exchange(self, requests: Sequence[bytes], timeout_s: float) -> Exchange: ...
    def memory_bytes(self) -> int: ...
    def scratch_bytes(self) -> int: ...
    def close(self) -> None: ...


class _Idle(NamedTuple):
    tenant: TenantId
    worker: Worker
    since_s: float
    number: int
    """In the order in which workers were started."""


class RedoSupervisor:
    """At most `processes_max` workers; all methods block and any thread may call them.

    Not more than `processes_max` threads may be in `run_batch` at once: each has a worker of its own.
    """

    def __init__(
        self,
        start_worker: Callable[[], Worker],
        processes_max: int,
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start_worker = start_worker
        self._processes_max = processes_max
        self._request_timeout_s = request_timeout_s
        self._pause = pause
        self._clock = clock
        self._idle: deque[_Idle] = deque()
        """Those idle for longest first."""
        self._busy: dict[Worker, int] = {}
        """With the numbers in the order of their start."""
        self._places = 0
        """Workers alive, being started or being closed."""
        self._lock = threading.Condition()
        """Notified when a place or a worker has become free."""
        self.started = 0
        """Workers started so far."""
        self.recycled = 0
        """Workers that one tenant lost to another."""

    def process_ids(self) -> list[int]:
        """Of the workers alive."""
        with self._lock:
            return [worker.process_id for worker in (*(each.worker for each in self._idle), *self._busy)]

    def run_batch(self, tenant: TenantId, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        """A page or an error per request, in order. Raises `RedoUnavailableError`.

        All `requests` are `tenant`'s, and so have been all that the worker ever saw.
        """
        results: list[bytes | RedoError] = [b""] * len(requests)
        pending = list(range(len(requests)))
        suspects: list[tuple[int, Failure]] = []
        unexplained = 0
        while pending:
            pages, failure = self._exchange(
                tenant, [requests[index] for index in pending], self._take(tenant)
            )
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
            results[index] = self._run_alone(tenant, requests[index], failure)
        return results

    def close(self) -> None:
        """Stops the idle workers; nobody may be in `run_batch`."""
        self._close_idle(idle_since_s=None)

    def would_recycle(self, tenant: TenantId) -> bool:
        """Whether a batch of this tenant would now take a worker from another."""
        with self._lock:
            return self._places >= self._processes_max and self._last_idle(tenant) is None

    @property
    def has_workers(self) -> bool:
        return self._places > 0

    def close_idle(self) -> None:
        """Stops workers that nobody has needed for `IDLE_S_MAX`."""
        self._close_idle(idle_since_s=self._clock() - IDLE_S_MAX)

    def _close_idle(self, idle_since_s: float | None) -> None:
        while True:
            with self._lock:
                if not self._idle or (idle_since_s is not None and self._idle[0].since_s > idle_since_s):
                    return
                worker = self._idle.popleft().worker
            self._end(worker)

    def _run_alone(self, tenant: TenantId, request: bytes, failure: Failure) -> bytes | RedoError:
        attempts = 1
        while attempts < (2 if failure.answered else ATTEMPTS):
            pages, next_failure = self._exchange(tenant, [request], self._take_fresh(tenant))
            if next_failure is None:
                return pages[0]
            failure = next_failure
            attempts += 1
        records = decode_redo_request(request).records
        lsn = records[-1].end_lsn if records else 0
        return RedoError(request_key(request), lsn, failure.record_lsn, failure.reason)

    def _exchange(
        self, tenant: TenantId, requests: Sequence[bytes], worker: Worker
    ) -> tuple[list[bytes], Failure | None]:
        reusable = False
        try:
            outcome = worker.exchange(requests, self._request_timeout_s)
            reusable = outcome.failure is None and not self._is_worn_out(worker, len(requests))
        finally:
            with self._lock:
                number = self._busy.pop(worker)
                if reusable:
                    self._idle.append(_Idle(tenant, worker, self._clock(), number))
                    self._lock.notify()
            if not reusable:
                self._end(worker)
        return outcome.pages, outcome.failure

    def _is_worn_out(self, worker: Worker, just_sent: int) -> bool:
        sent = worker.request_count
        if sent >= LIFE_REQUESTS:
            return True
        if sent // CHECK_EVERY_REQUESTS == (sent - just_sent) // CHECK_EVERY_REQUESTS:
            return False
        return worker.memory_bytes() > MEMORY_BYTES_MAX or worker.scratch_bytes() > SCRATCH_BYTES_MAX

    def _take(self, tenant: TenantId) -> Worker:
        """An idle worker of this tenant, the one used last first; else a new one."""
        with self._lock:
            own = self._last_idle(tenant)
            if own is not None:
                self._idle.remove(own)
                self._busy[own.worker] = own.number
                return own.worker
        return self._take_fresh(tenant)

    def _take_fresh(self, tenant: TenantId) -> Worker:
        """A new worker, in the place of an idle one where there are enough."""
        with self._lock:
            # Only for a moment: those in excess are being closed.
            self._lock.wait_for(lambda: self._idle or self._places < self._processes_max)
            victim: _Idle | None = None
            if self._places < self._processes_max:
                self._places += 1
            else:
                victim = self._victim()
                self._idle.remove(victim)
                self.recycled += victim.tenant != tenant
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._give_place_back)
            if victim is not None:
                victim.worker.close()
            worker = self._start()
            on_failure.pop_all()
            return worker

    def _victim(self) -> _Idle:
        """The one that is not needed; where all are, the one that has been there for longest: to take the one
        idle for longest from tenants that read by turns would hit each just before its own.
        """
        longest_idle = self._idle[0]
        if self._clock() - longest_idle.since_s > NEEDED_S:
            return longest_idle
        return min(self._idle, key=lambda each: each.number)

    def _last_idle(self, tenant: TenantId) -> _Idle | None:
        return next((each for each in reversed(self._idle) if each.tenant == tenant), None)

    def _end(self, worker: Worker) -> None:
        """Its place is free once it is gone, so that there are never more than there may be."""
        try:
            worker.close()
        finally:
            self._give_place_back()

    def _give_place_back(self) -> None:
        with self._lock:
            self._places -= 1
            self._lock.notify()

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
                self._busy[worker] = self.started
            return worker
        raise RedoUnavailableError(str(problem)) from problem
