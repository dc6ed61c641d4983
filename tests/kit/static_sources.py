"""Sources of WAL that a test names, for receivers without a controller."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from excimer.base.address import Address
from excimer.pageserver.receiver_plan import Source
from excimer.service.replication_client import ReplicationClient


class StaticSources:
    """A `wal_receiver.WalSources` whose tokens run out when the test says so."""

    def __init__(
        self,
        connect: Callable[[Address], Awaitable[ReplicationClient]],
        known: Callable[[], Iterable[Source]],
        wait_for_news: Callable[[float | None], Awaitable[None]] = lambda timeout_s: asyncio.sleep(
            timeout_s or 0.1
        ),
    ) -> None:
        self._connect = connect
        self._known = known
        self._wait_for_news = wait_for_news
        self.newer = asyncio.Event()
        """Set it, and the stream begins again."""

    def known(self) -> Iterable[Source]:
        return self._known()

    async def learn(self) -> None:
        return

    async def connect(self, address: Address) -> ReplicationClient:
        return await self._connect(address)

    async def wait_newer(self) -> None:
        await self.newer.wait()
        self.newer.clear()

    def doubt(self) -> None:
        return

    async def wait_for_news(self, timeout_s: float | None) -> None:
        await self._wait_for_news(timeout_s)

    def problem(self) -> str | None:
        return None

    def forget(self) -> None:
        return
