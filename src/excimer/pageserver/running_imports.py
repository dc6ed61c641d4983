"""The imports of a tenant that are going on: who may break them off, and cleaning up after them.

An import is one HTTP request. It ends complete; or with an error, when its sender goes away, or when
the tenant is detached; then all of it is removed, before the request is answered if that is possible.

Not here: the import itself (`cluster_import`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from excimer.base.errors import RetryableError
from excimer.base.ids import TimelineId
from excimer.pageserver.cluster_import import ClusterImport
from excimer.pageserver.model import ImportProgress
from excimer.service.logs import get_logger
from excimer.storage.engine.tenant import TenantStorage

log = get_logger(__name__)


class ImportBrokenOffError(RetryableError):
    """The tenant was detached, or the timeline deleted, while the cluster was imported."""


@dataclass(slots=True)
class RunningImport:
    job: ClusterImport
    limit: asyncio.Timeout
    is_complete: bool = False
    is_ending: bool = False
    """There is nothing to break off any more, only to wait for."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class RunningImports:
    """Of one tenant. Belongs to the event loop."""

    def __init__(self) -> None:
        self._running: dict[TimelineId, RunningImport] = {}

    def __contains__(self, timeline_id: TimelineId) -> bool:
        return timeline_id in self._running

    def progress(self) -> list[ImportProgress]:
        return [
            ImportProgress(timeline_id=timeline_id, received_bytes=each.job.received_bytes)
            for timeline_id, each in sorted(self._running.items())
        ]

    @contextlib.asynccontextmanager
    async def running(
        self, store: TenantStorage, timeline_id: TimelineId, job: ClusterImport
    ) -> AsyncIterator[RunningImport]:
        """For the time of an import; one that is not complete at the end is removed."""
        try:
            async with asyncio.timeout(None) as limit:
                running = self._running[timeline_id] = RunningImport(job, limit)
                try:
                    yield running
                finally:
                    running.is_ending = True
                    await asyncio.shield(self._end(store, timeline_id, running))
        except TimeoutError as error:
            if not limit.expired():  # ETIMEDOUT of a socket or of a disk
                raise
            raise ImportBrokenOffError("the import was ended from outside: nothing was imported") from error

    async def break_off(self, timeline_id: TimelineId | None = None) -> None:
        """Ends one, or all; returns when nothing of them is left."""
        running = [each for key, each in self._running.items() if timeline_id in (None, key)]
        for each in running:
            if not each.is_ending:
                each.is_ending = True
                each.limit.reschedule(asyncio.get_running_loop().time())
        await asyncio.gather(*(each.ended.wait() for each in running))

    async def _end(self, store: TenantStorage, timeline_id: TimelineId, running: RunningImport) -> None:
        """Goes on when whoever waits for it is cancelled."""
        try:
            if not running.is_complete:
                await _remove(store, running.job)
        finally:
            del self._running[timeline_id]
            running.ended.set()


async def _remove(store: TenantStorage, job: ClusterImport) -> None:
    if job.made is None:
        return
    try:
        await store.abort_import(job.made)
    except (RetryableError, OSError) as error:
        log.warning("a broken-off import is removed when the tenant is attached next", error=error)
