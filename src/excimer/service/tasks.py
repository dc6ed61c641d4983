"""Tasks: named, in a scope, never left behind. The one place that may catch everything.

A `TaskScope` holds all tasks of a service. Leaving it cancels and awaits them. Two kinds:

* `start`: an error of the task ends the scope (and the service), as in `asyncio.TaskGroup`;
* `supervise`: a background job that is restarted after any error, later and later, and logged
  each time. `FencedError` and `CorruptionError` end it for good: trying again would do harm.

Not here: what to do about an error; whoever wrote the job knows that.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

from excimer.base.clock import Monotonic, UnixTime
from excimer.base.errors import CorruptionError, ExcimerError, FencedError
from excimer.service.logs import get_logger

T = TypeVar("T")

log = get_logger(__name__)

FINAL_ERRORS: Final = (FencedError, CorruptionError)


class SystemClock:
    """The real `excimer.base.clock.Clock`."""

    def monotonic(self) -> Monotonic:
        return Monotonic(time.monotonic())

    def now(self) -> UnixTime:
        return UnixTime(time.time())


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts: doubling from `first_s` to `most_s`; anew after a run of `reset_after_s`."""

    first_s: float = 0.1
    most_s: float = 10.0
    reset_after_s: float = 30.0

    def next_wait(self, failures: int) -> float:
        """The wait after `failures` failures in a row (at least 1)."""
        return min(self.most_s, self.first_s * 2.0 ** min(failures - 1, 30))


class TaskScope:
    """An `asyncio.TaskGroup` for services: leaving the block cancels what still runs.

    When exactly one task failed, its error is raised itself, not in a group.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_leaving = False

    async def __aenter__(self) -> "TaskScope":
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_leaving = True
        for task in list(self._tasks):
            task.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group_error:
            if len(group_error.exceptions) == 1:
                raise group_error.exceptions[0] from None
            raise

    def start(self, name: str, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs `coroutine` in the scope. Its error cancels the whole scope.

        What is started while the scope is being left, by a callback for example, is cancelled at once.
        """
        try:
            task = self._group.create_task(coroutine, name=name)
        except RuntimeError:  # the scope is being left
            coroutine.close()
            raise
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._is_leaving:
            task.cancel()
        return task

    def contain(self, name: str, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs one piece of work, a connection for example, whose unexpected error is logged and goes no
        further.
        """
        containing = _contained(name, coroutine)
        try:
            task = self.start(name, containing)
        except RuntimeError:
            coroutine.close()
            raise
        # A task that is cancelled before its first step never comes to await the coroutine.
        task.add_done_callback(lambda _: coroutine.close())
        return task

    def supervise(
        self, name: str, job: Callable[[], Awaitable[None]], backoff: Backoff | None = None
    ) -> asyncio.Task[None]:
        """Runs `job` until it returns, restarting it after errors. Never fails the scope."""
        return self.start(name, supervised(name, job, backoff or Backoff()))


async def supervised(name: str, job: Callable[[], Awaitable[None]], backoff: Backoff) -> None:
    """The loop behind `TaskScope.supervise`, for whoever already has a task."""
    failures = 0
    while True:
        started = time.monotonic()
        try:
            return await job()
        except FINAL_ERRORS as error:
            log.error("task stopped for good", task=name, error=error)
            return None
        except Exception as error:
            failures = 1 if time.monotonic() - started >= backoff.reset_after_s else failures + 1
            wait_s = backoff.next_wait(failures)
            if isinstance(error, ExcimerError | OSError):
                log.warning("task failed, will restart", task=name, error=error, wait_s=round(wait_s, 3))
            else:
                log.exception("task crashed, will restart", task=name, error=error, wait_s=round(wait_s, 3))
        await asyncio.sleep(wait_s)


async def _contained(name: str, coroutine: Coroutine[Any, Any, None]) -> None:
    try:
        await coroutine
    except Exception as error:
        log.exception("task crashed", task=name, error=error)


@contextlib.asynccontextmanager
async def running(name: str, coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """One task beside a block: cancelled when the block ends; its error ends the block."""
    async with TaskScope() as scope:
        yield scope.start(name, coroutine)


async def finish_in_thread(function: Callable[..., T], *args: object) -> T:
    """Cancelled only after it has ended: what it works on is closed next."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


def failure_of(action: Callable[[], None]) -> Exception | None:
    """Runs `action`; what it raised (a group of one unwrapped), logged with its traceback if unexpected."""
    try:
        action()
    except Exception as error:
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if not isinstance(error, ExcimerError):
            log.exception("crashed", error=error)
        return error
    return None
