"""Redo requests of many reads in few batches: what waits together goes out together.

::

    redo(1 page)  --.                          .--> worker's thread: one batch redo(1 page)  --+-->
waiting, in order ----+ redo(8 pages) --'                          '--> worker's thread: one batch

A batch starts as soon as a worker is free, one step of the event loop after the first request that waits,
so that requests which came together from one socket are in it. While all workers are busy requests pile
up, and the next batch takes a fair share of them all: the more there is to do, the less each costs. A way
through a thread and two pipes for each page cost three times what redo itself does.

How much waits is bounded by those who wait: each holds up a request of a connection, which may have few.

Not here: what a batch goes through (`redo_crew`).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

from excimer.storage.engine.redo_crew import RedoError, RedoUnavailableError

BATCH_REQUESTS_MIN = 16
"""Fewer are not split up among workers: waking another one costs more."""
BATCH_REQUESTS_MAX = 256
BATCH_SIZE_BYTES_MAX = 4 << 20

RunBatch = Callable[[Sequence[bytes]], list[bytes | RedoError]]
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
    place: int
    """Among the call's results."""


class RedoGathering:
    """Belongs to one event loop at a time."""

    def __init__(self, run_batch: RunBatch, executor: Executor, workers: int) -> None:
        """`executor` has a thread per worker."""
        self._run_batch = run_batch
        self._executor = executor
        self._workers = workers
        self._waiting: deque[_Waiting] = deque()
        self._busy = 0
        self._is_starting = False
        self._closed = False

    async def redo(self, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        """A page or an error per request, in order. Raises `RedoUnavailableError`."""
        if self._closed:
            raise RedoUnavailableError("the redo pool is closed: the page server is stopping")
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        call = _Call(len(requests), loop.create_future())
        self._waiting.extend(_Waiting(request, call, place) for place, request in enumerate(requests))
        if self._busy < self._workers and not self._is_starting:
            self._is_starting = True
            loop.call_soon(self._start_batches, loop)
        return await call.done

    def close(self) -> None:
        """Refuses what waits and all that comes; batches under way go on."""
        self._closed = True
        refused = RedoUnavailableError("the redo pool is closed: the page server is stopping")
        _fail(self._waiting, refused)
        self._waiting.clear()

    def _start_batches(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_starting = False
        while self._waiting and self._busy < self._workers:
            batch = self._next_batch()
            if not batch:
                continue
            self._busy += 1
            requests = [each.request for each in batch]
            running = loop.run_in_executor(self._executor, self._run_batch, requests)
            running.add_done_callback(partial(self._finish, loop, batch))

    def _next_batch(self) -> list[_Waiting]:
        """A worker's fair share of what waits; nothing for callers who have gone."""
        fair = -(-len(self._waiting) // self._workers)
        count_max = min(max(fair, BATCH_REQUESTS_MIN), BATCH_REQUESTS_MAX)
        batch: list[_Waiting] = []
        size = 0
        while self._waiting and len(batch) < count_max:
            size += len(self._waiting[0].request)
            if batch and size > BATCH_SIZE_BYTES_MAX:
                break
            each = self._waiting.popleft()
            if not each.call.done.done():
                batch.append(each)
        return batch

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[_Waiting],
        running: "asyncio.Future[list[bytes | RedoError]]",
    ) -> None:
        self._busy -= 1
        if running.cancelled():
            for each in batch:
                each.call.done.cancel()
        elif (error := running.exception()) is not None:
            _fail(batch, error)
        else:
            for each, result in zip(batch, running.result(), strict=True):
                each.call.results[each.place] = result
                each.call.missing -= 1
                if each.call.missing == 0 and not each.call.done.done():
                    each.call.done.set_result(each.call.results)
        self._start_batches(loop)


def _fail(waiting: Iterable[_Waiting], error: BaseException) -> None:
    for each in waiting:
        if not each.call.done.done():
            each.call.done.set_exception(error)
