"""Tells a timeline's safekeepers which WAL is durable in object storage, so that they may remove it (D2).

::

    flush -> manifest durable -> no newer generation claims the timeline -> every safekeeper is told,
                                                     but not of what replication slots still need

The second arrow is why no pageserver, of whatever generation, can come to need WAL that is gone: an
older one makes its manifest durable before it looks for a claim, a newer one its claim before it looks
for the newest manifest (`storage.engine.claim`), so one of them sees the other.

The safekeeper from which WAL comes hears it in the stream. The others are visited, when what they know
lags by a segment, or after a while. What a safekeeper knows is heard through the broker; a status that
lies or is lost costs a visit or some disk space.

Not here: what safekeepers make of it (`excimer.safekeeper.wal_retention`).
"""

import asyncio
from collections.abc import Callable, Iterable

from excimer.base.address import Address
from excimer.base.errors import ExcimerError, RetryableError
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.pageserver.receiver_plan import Source
from excimer.pageserver.wal_receiver import Connect
from excimer.service.logs import get_logger
from excimer.storage.engine.timeline import Timeline

log = get_logger(__name__)

QUIET_S = 10.0
"""A smaller lag than a segment is told after this time, and a safekeeper that was away is tried again."""
GATHER_S = 1.0
LAST_WORD_TIMEOUT_S = 10.0


class DurableWal:
    """Of one timeline. Belongs to the event loop."""

    def __init__(
        self,
        store: Timeline,
        *,
        sources: Callable[[], Iterable[Source]],
        connect: Connect,
        streams_from: Callable[[], Address | None],
    ) -> None:
        """`streams_from` is the safekeeper that hears it anyway."""
        self.lsn: Lsn = INVALID_LSN
        """WAL below is needed by no pageserver and no replication slot; 0 until the slots are known."""
        self._confirmed_lsn: Lsn = store.disk_consistent_lsn
        """WAL below is needed by no pageserver. What is attached or made has been claimed."""
        self._store = store
        self._sources = sources
        self._connect = connect
        self._streams_from = streams_from
        self._told: dict[Address, Lsn] = {}
        self._told_at: dict[Address, float] = {}
        self._moved = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def is_settled(self, lsn: Lsn) -> bool:
        """Whether all below is durable, and as much of it known to be of no use as the slots let be."""
        return self._confirmed_lsn >= lsn and self.lsn != INVALID_LSN

    def moved(self) -> None:
        """More has become durable, or slots need other WAL."""
        self._moved.set()

    async def run(self) -> None:
        """Until cancelled. Raises `OvertakenError` when the timeline is a newer generation's."""
        while True:
            self._moved.clear()
            is_known = False
            try:
                await self.confirm()
                is_known = True
            except (RetryableError, OSError) as error:
                log.warning("not known what may be told to be durable", error=error)
            is_done = await self.tell_those_behind(self._store.wal_segment_size_bytes, QUIET_S) and is_known
            await self._wait(None if is_done else QUIET_S)

    async def finish(self) -> None:
        """The timeline is put away: a last word to all of its safekeepers, if they hear it soon."""
        try:
            async with asyncio.timeout(LAST_WORD_TIMEOUT_S):
                await self.confirm()
                await self.tell_those_behind(1, 0.0)
        except (ExcimerError, OSError, TimeoutError) as error:
            log.info("safekeepers not told what is durable", error=error)

    async def confirm(self) -> None:
        """Raises `OvertakenError`, `ObjectStoreError`."""
        if self._store.disk_consistent_lsn > self._confirmed_lsn:
            self._confirmed_lsn = max(self._confirmed_lsn, await self._store.confirm_consistent_lsn())
        needed_lsn = await self._store.kept_slots.needed_lsn(self._confirmed_lsn)
        self.lsn = max(self.lsn, min(self._confirmed_lsn, needed_lsn))

    async def tell_those_behind(self, lag_size_bytes_max: int, quiet_s: float) -> bool:
        """Whether all that are known have been told everything."""
        is_done, current = True, self._streams_from()
        sources = list(self._sources())
        for source in sources:
            address, now = source.address, self._loop.time()
            known_lsn = max(source.durable_lsn, self._told.get(address, INVALID_LSN))
            if address == current or known_lsn >= self.lsn:
                continue
            is_quiet = now - self._told_at.get(address, 0.0) >= quiet_s
            is_done = (
                (is_quiet or self.lsn - known_lsn >= lag_size_bytes_max)
                and await self._tell(address, self.lsn)
                and is_done
            )
        return is_done and bool(sources)

    async def _tell(self, address: Address, lsn: Lsn) -> bool:
        self._told_at[address] = self._loop.time()
        try:
            client = await self._connect(address)
            try:
                async with asyncio.timeout(LAST_WORD_TIMEOUT_S):
                    await client.confirm_durable(lsn)
            finally:
                client.close()
        except (ExcimerError, OSError, TimeoutError) as error:
            log.info("safekeeper not told what is durable", address=str(address), error=error)
            return False
        self._told[address] = lsn
        return True

    async def _wait(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()
        except TimeoutError:
            return
        await asyncio.sleep(GATHER_S)
