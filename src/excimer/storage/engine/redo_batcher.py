"""Redo requests of many reads in few batches: what waits together, of one tenant, goes out together.

::

    tenant A: redo(1 page)  --.
    tenant A: redo(8 pages) --+--> waiting, in order --.             .--> worker of A: one batch
    tenant B: redo(2 pages) -----> waiting, in order --+-- by turns --+--> worker of B: one batch

A batch starts as soon as a thread is free, one step of the event loop after the first request that waits,
so that requests which came together from one socket are in it. While all are busy requests pile up, and
the next batch takes a fair share of those of its tenant: the more there is to do, the less each costs. A way
through a thread and two pipes for each page cost three times what redo itself does.

Tenants take turns, one batch each. A tenant whose batch took unusually long, because its records hang or
kill workers, leaves a thread to the others for a while: else it could hold all of them again and again.

Where as many processes run as may, a tenant without one takes another's, which costs more than most batches.
So only one thread at a time, and for half of the time at most, serves a tenant in that way; those that have
processes go on meanwhile. Without this a hundred tenants over 64 processes did little but start processes.

How much waits is bounded by those who wait: each holds up a request of a connection, which may have few.

Not here: what a batch goes through, and which process serves it (`redo_supervisor`).
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

from excimer.base.ids import TenantId
from excimer.storage.engine.redo_supervisor import RedoError, RedoUnavailableError

BATCH_REQUESTS_MIN = 16
"""Fewer are not split up among workers: waking another one costs more."""
BATCH_REQUESTS_MAX = 256
BATCH_SIZE_BYTES_MAX = 4 << 20
SLOW_BATCH_S = 2.0
"""A batch takes milliseconds; one that takes longer than this has met a worker that died or fell silent."""
SLOW_TENANT_S = 60.0
"""For so long after such a batch its tenant is kept from holding all threads."""

WouldRecycle = Callable[[TenantId], bool]
"""Whether a batch of this tenant would take a process from another one. At once."""

RunBatch = Callable[[TenantId, Sequence[bytes]], list[bytes | RedoError]]
"""Blocks. Raises `RedoUnavailableError`."""


class _Call:
    """One `redo`: its results as they come in."""

    def __init__(self, count: int, done: "asyncio.Future[list[bytes | RedoError]]") -> None:
        self.results: list[bytes | RedoError] = [b""] * count
        self.missing = count
        self.done = done


class _Waiting(NamedTuple):
    request: bytes
    call: _Call
    slot: int
    """Among the call's results."""


class _Batch(NamedTuple):
    tenant: TenantId
    requests: list[_Waiting]
    started_s: float
    recycles: bool


class RedoBatcher:
    """Belongs to one event loop at a time."""

    def __init__(
        self,
        run_batch: RunBatch,
        executor: Executor,
        workers: int,
        would_recycle: WouldRecycle = lambda tenant: False,
    ) -> None:
        """`executor` has a thread per worker."""
        self._run_batch = run_batch
        self._would_recycle = would_recycle
        self._executor = executor
        self._workers = workers
        self._waiting: dict[TenantId, deque[_Waiting]] = {}
        """Of tenants with anything waiting, the one whose turn it is first."""
        self._slow_until_s: dict[TenantId, float] = {}
        self._busy: Counter[TenantId] = Counter()
        """Batches under way."""
        self._is_recycling = False
        self._recycle_from_s = 0.0
        """Not before this does a batch take a process from another tenant."""
        self._recycle_timer: asyncio.TimerHandle | None = None
        self._is_starting = False
        self._closed = False

    async def redo(self, requests: Sequence[bytes], tenant: TenantId) -> list[bytes | RedoError]:
        """A page or an error per request, in order. Raises `RedoUnavailableError`."""
        if self._closed:
            raise RedoUnavailableError("the redo pool is closed: the page server is stopping")
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        call = _Call(len(requests), loop.create_future())
        waiting = self._waiting.setdefault(tenant, deque())
        waiting.extend(_Waiting(request, call, slot) for slot, request in enumerate(requests))
        if self._busy.total() < self._workers and not self._is_starting:
            self._is_starting = True
            loop.call_soon(self._start_batches, loop)
        return await call.done

    def close(self) -> None:
        """Refuses what waits and all that comes; batches under way go on."""
        self._closed = True
        refused = RedoUnavailableError("the redo pool is closed: the page server is stopping")
        for waiting in self._waiting.values():
            _fail(waiting, refused)
        self._waiting.clear()
        if self._recycle_timer is not None:
            self._recycle_timer.cancel()

    def _start_batches(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_starting = False
        while self._busy.total() < self._workers:
            turn = self._next_turn(loop)
            if turn is None:
                return
            tenant, recycles = turn
            requests = self._next_requests(tenant)
            if not requests:
                continue
            batch = _Batch(tenant, requests, loop.time(), recycles)
            self._busy[tenant] += 1
            self._is_recycling = self._is_recycling or recycles
            running = loop.run_in_executor(
                self._executor, self._run_batch, tenant, [each.request for each in requests]
            )
            running.add_done_callback(partial(self._finish, loop, batch))

    def _next_turn(self, loop: asyncio.AbstractEventLoop) -> tuple[TenantId, bool] | None:
        """Whose turn it is, and whether that takes another's process; None when nobody waits who may have a
        thread.
        """
        now_s = loop.time()
        for tenant in self._waiting:
            if not self._may_have_thread(tenant, now_s):
                continue
            if not self._would_recycle(tenant):
                return tenant, False
            if self._is_recycling:
                continue
            if now_s >= self._recycle_from_s:
                return tenant, True
            if self._recycle_timer is None:
                self._recycle_timer = loop.call_at(self._recycle_from_s, self._recycle_again, loop)
        return None

    def _may_have_thread(self, tenant: TenantId, now_s: float) -> bool:
        if self._slow_until_s.get(tenant, now_s) <= now_s:
            self._slow_until_s.pop(tenant, None)
            return True
        return sum(self._busy[slow] for slow in self._slow_until_s) < max(1, self._workers - 1)

    def _recycle_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._recycle_timer = None
        self._start_batches(loop)

    def _next_requests(self, tenant: TenantId) -> list[_Waiting]:
        """A fair share of what waits of this tenant, which goes to the end of the row; nothing for callers
        who have gone.
        """
        waiting = self._waiting.pop(tenant)
        others = len(self._waiting) + self._busy.total() - self._busy[tenant]
        share = -(-len(waiting) // max(1, self._workers - others))
        count_max = min(max(share, BATCH_REQUESTS_MIN), BATCH_REQUESTS_MAX)
        requests: list[_Waiting] = []
        size = 0
        while waiting and len(requests) < count_max:
            size += len(waiting[0].request)
            if requests and size > BATCH_SIZE_BYTES_MAX:
                break
            each = waiting.popleft()
            if not each.call.done.done():
                requests.append(each)
        if waiting:
            self._waiting[tenant] = waiting
        return requests

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: _Batch,
        running: "asyncio.Future[list[bytes | RedoError]]",
    ) -> None:
        self._busy[batch.tenant] -= 1
        self._busy += Counter()  # forgets tenants with none
        now_s = loop.time()
        if now_s - batch.started_s > SLOW_BATCH_S:
            self._slow_until_s[batch.tenant] = now_s + SLOW_TENANT_S
        if batch.recycles:
            self._is_recycling = False
            self._recycle_from_s = now_s + (now_s - batch.started_s)
        if running.cancelled():
            for each in batch.requests:
                each.call.done.cancel()
        elif (error := running.exception()) is not None:
            _fail(batch.requests, error)
        else:
            for each, result in zip(batch.requests, running.result(), strict=True):
                each.call.results[each.slot] = result
                each.call.missing -= 1
                if each.call.missing == 0 and not each.call.done.done():
                    each.call.done.set_result(each.call.results)
        self._start_batches(loop)


def _fail(waiting: Iterable[_Waiting], error: BaseException) -> None:
    for each in waiting:
        if not each.call.done.done():
            each.call.done.set_exception(error)
