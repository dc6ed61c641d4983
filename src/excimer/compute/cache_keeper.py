"""Keeps the cache of a running PostgreSQL within its bound: looks, sweeps, asks.

::

    files' blocks on the disk --> CachePlan --> Evictor: a sweep of the clock's hand
                                                   | an epoch began for some files
    ask_horizon: end of WAL, oldest transaction <--+--> Evictor: their blocks may go once that is ingested

The sweeps run in a thread, without the interpreter. What the disk cannot do (no holes in files) is said once,
and then the cache has no bound.

Not here: which blocks may go and why (`csrc/libhydrate/eviction.h`), the decision (`cache_plan`).
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from excimer._native.cache_eviction import Evictor
from excimer.base.clock import Clock
from excimer.base.errors import ExcimerError
from excimer.base.lsn import Lsn
from excimer.compute.arena import Arena, ArenaStatistics
from excimer.compute.cache_bound import CacheBound
from excimer.compute.cache_plan import NOTHING_SWEPT, QUIET_S, CachePlan, Swept, blocks_to_evict
from excimer.compute.wal_horizon import WalHorizon
from excimer.service.logs import get_logger
from excimer.service.tasks import TaskScope, finish_in_thread

ASK_S: Final = 0.25
"""Between two questions to PostgreSQL, at least."""

log = get_logger(__name__)


class CacheKeeper:
    """For one running PostgreSQL on an arena that `evicts`."""

    def __init__(
        self,
        bound: CacheBound,
        arena: Arena,
        arena_path: Path,
        *,
        ingested_lsn: Callable[[], Lsn] | None,
        ask: Callable[[], Awaitable[WalHorizon]] | None,
        clock: Clock,
    ) -> None:
        """`ingested_lsn`, `ask` None: what PostgreSQL writes here is in no WAL, and stays."""
        self._bound = bound
        self._arena = arena
        self._arena_path = arena_path
        self._ingested_lsn = ingested_lsn
        self._ask = ask
        self._clock = clock
        self._asked_s = -ASK_S
        self._seen: tuple[int, ...] = ()
        self._awaits_answer = False
        """Epochs have begun since PostgreSQL answered."""
        self._wanted = 0
        self._looked_for = -1
        """Blocks that were to go at the last look, and for which bound."""
        self._question: asyncio.Task[WalHorizon | None] | None = None

    async def run(self) -> None:
        """Until cancelled. Raises OSError if the arena cannot be opened."""
        evictor = self._arena.make_evictor(self._arena_path, clean_only=self._ask is None)
        plan = CachePlan()
        try:
            async with TaskScope() as scope:
                while True:
                    await self._bound.wait(await self._look(scope, evictor, plan))
        finally:
            evictor.close()

    async def _look(self, scope: TaskScope, evictor: Evictor, plan: CachePlan) -> float:
        """Seconds until the next one."""
        has_changed = self._has_changed()
        if not has_changed and not self._wanted and self._looked_for == self._bound.size_bytes:
            return QUIET_S
        began = self._clock.monotonic()
        used, bound = await finish_in_thread(evictor.used_bytes), self._bound.size_bytes
        look_s = self._clock.monotonic() - began
        self._arena.set_cache(bound, used)
        self._looked_for, self._wanted = bound, blocks_to_evict(used, bound)
        wanted, swept = self._wanted, NOTHING_SWEPT
        if wanted:
            self._settle(evictor)
            ingested_lsn = Lsn(0) if self._ingested_lsn is None else self._ingested_lsn()
            is_free = self._question is None
            swept = Swept._make(await finish_in_thread(evictor.sweep, wanted, ingested_lsn, is_free))
            if swept.punch_error in (errno.EOPNOTSUPP, errno.ENOSYS):
                self._give_up(swept.punch_error)
            self._awaits_answer |= plan.asks(swept, wanted)
            self._ask_if_due(scope)
        return plan.wait_s(wanted=wanted, swept=swept, has_changed=has_changed, look_s=look_s)

    def _settle(self, evictor: Evictor) -> None:
        """With PostgreSQL's answer, if it is there."""
        if self._question is None or not self._question.done():
            return
        horizon, self._question = self._question.result(), None
        if horizon is not None:
            evictor.settle(*horizon)
            self._awaits_answer = False

    def _ask_if_due(self, scope: TaskScope) -> None:
        """After a sweep, beside those that come next."""
        now = self._clock.monotonic()
        if (
            not self._awaits_answer
            or self._ask is None
            or self._question is not None
            or now - self._asked_s < ASK_S
        ):
            return
        self._asked_s = now
        self._question = scope.start("end of WAL", _answer(self._ask))

    def _give_up(self, error: int) -> None:
        log.error("the cache has no bound: its file system makes no holes", reason=os.strerror(error))
        self._bound.set(0)

    def _has_changed(self) -> bool:
        """Whether anything came into the cache since the last time."""
        statistics: ArenaStatistics = self._arena.statistics()
        seen = statistics.blocks, self._arena.written_lsn()
        has_changed, self._seen = seen != self._seen, seen
        return has_changed


async def _answer(ask: Callable[[], Awaitable[WalHorizon]]) -> WalHorizon | None:
    """None: it does not say, and is asked again after another sweep."""
    try:
        return await ask()
    except (ExcimerError, OSError) as error:
        log.info("postgres does not say how far its WAL goes", error=error)
        return None
