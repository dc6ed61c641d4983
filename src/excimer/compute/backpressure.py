"""Keeps a compute's writers from running away from its pageserver: looks, decides, tells.

::

    pageserver --GetPosition--> ingested LSN --+
    proposer   --------------> commit LSN -----+--> BackpressurePlan --+--> arena: libhydrate slows writers
    arena      --------------> bulk WAL -------+                       +--> proposer: commits wait

While WAL moves it looks fifty times a second; else four times, without asking anybody. A pageserver that
does not answer counts as one that ingests nothing: it will answer again, or another one in its place.

Not here: the decision (`backpressure_plan`), the waiting (`csrc/libhydrate/throttle.c`, `proposer`).
"""

import asyncio
from collections.abc import Callable
from typing import Final, Never, Protocol

from excimer.base.clock import Clock
from excimer.base.errors import ExcimerError
from excimer.base.lsn import Lsn
from excimer.compute.backpressure_plan import NO_LIMITS, BackpressurePlan, Limits, Positions
from excimer.compute.position_client import PositionClient
from excimer.service.logs import get_logger
from excimer.service.tasks import TaskScope

LOOK_S: Final = 0.02
ASK_S: Final = 0.05
QUIET_S: Final = 0.25
RETRY_S: Final = 0.5
"""After a failure to ask."""

log = get_logger(__name__)


class ThrottledProposer(Protocol):
    """The part of `proposer.Proposer` that is looked at and told."""

    @property
    def commit_lsn(self) -> Lsn: ...
    @property
    def received_lsn(self) -> Lsn: ...
    def confirm_up_to(self, lsn: Lsn, /) -> None: ...


class ThrottledArena(Protocol):
    """The same of `arena.Arena`."""

    def bulk_bytes(self) -> int: ...
    def written_lsn(self) -> Lsn: ...
    def throttle(self, allowed_bytes: int, wal_limit_lsn: Lsn, /) -> None: ...
    def set_quorum(self, lsn: Lsn, /) -> None: ...


class Backpressure:
    """For one running PostgreSQL, from the LSN on that the pageserver has surely ingested."""

    def __init__(
        self,
        *,
        lag_bytes_max: int,
        start_lsn: Lsn,
        proposer: ThrottledProposer,
        arena: ThrottledArena,
        connect: Callable[[], PositionClient],
        clock: Clock,
    ) -> None:
        self._plan = BackpressurePlan(lag_bytes_max, clock.monotonic(), start_lsn)
        self._proposer = proposer
        self._arena = arena
        self._connect = connect
        self._clock = clock
        self._told: Limits | None = None
        self._is_over = False
        self._written_lsn = start_lsn
        self.ingested_lsn = start_lsn
        """How far the pageserver is, as far as is known."""

    @property
    def lag_bytes(self) -> int:
        return max(0, self._proposer.commit_lsn - self.ingested_lsn)

    async def run(self) -> Never:
        """Until cancelled."""
        async with TaskScope() as scope:
            scope.start("pageserver position", self._ask_for_ever())
            while True:
                self.look()
                await asyncio.sleep(LOOK_S if self._is_busy() else QUIET_S)

    def look(self) -> None:
        """Decides, and tells what has changed."""
        at = Positions(
            written_lsn=self._arena.written_lsn(),
            received_lsn=self._proposer.received_lsn,
            commit_lsn=self._proposer.commit_lsn,
            ingested_lsn=self.ingested_lsn,
            bulk_bytes=self._arena.bulk_bytes(),
        )
        self._arena.set_quorum(at.commit_lsn)
        if self._is_over:
            return
        self._tell(self._plan.step(self._clock.monotonic(), at))

    def _is_busy(self) -> bool:
        """WAL has moved since the last look, or somebody is behind."""
        written_lsn = self._arena.written_lsn()
        has_moved, self._written_lsn = written_lsn != self._written_lsn, written_lsn
        return has_moved or self.lag_bytes > 0

    def lift(self) -> None:
        """No limits from here on: PostgreSQL is to stop, which takes WAL and commits."""
        self._is_over = True
        self._tell(NO_LIMITS)

    def _tell(self, limits: Limits) -> None:
        if limits == self._told:
            return
        self._told = limits
        self._proposer.confirm_up_to(limits.confirm_lsn)
        self._arena.throttle(limits.allowed_bytes, limits.wal_limit_lsn)

    async def _ask_for_ever(self) -> Never:
        while True:
            client = self._connect()
            try:
                await self._ask(client)
            except (ExcimerError, OSError) as error:
                log.info("the pageserver does not say how far it is", error=error)
            finally:
                client.close()
            await asyncio.sleep(RETRY_S)

    async def _ask(self, client: PositionClient) -> Never:
        while True:
            if self.lag_bytes:
                self.ingested_lsn = max(self.ingested_lsn, await client.position())
            await asyncio.sleep(ASK_S if self.lag_bytes else QUIET_S)
