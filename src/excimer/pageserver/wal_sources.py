"""One timeline's sources of WAL: the safekeepers that the controller names, and what the broker says of them.

The controller says who they are; a status on the broker is only a hint of how far one of them is, found by
its id, and an address in it is not looked at: whoever may publish there gets neither token nor connection.

Not here: what follows from it (`receiver_plan`), the connection's life (`wal_receiver`).
"""

import asyncio
from typing import Final

from excimer.base.address import Address, parse_address
from excimer.base.clock import Clock
from excimer.pageserver.receiver_plan import Source, confirmed_sources
from excimer.pageserver.wal_access import Key, WalAccessBook, WalAccessError
from excimer.service.broker_client import LatestStatuses
from excimer.service.replication_client import ReplicationClient, connect_replication
from excimer.wire.broker import SafekeeperTimelineStatus
from excimer.wire.replication import format_options

WAL_USER: Final = "postgres"
RENEW_RETRY_S: Final = 5.0


class TimelineSources:
    """A `wal_receiver.WalSources`."""

    def __init__(
        self,
        key: Key,
        book: WalAccessBook,
        statuses: LatestStatuses[SafekeeperTimelineStatus] | None,
        clock: Clock,
        reader_name: str,
    ) -> None:
        """`statuses` is None without a broker. `reader_name` is how safekeepers' logs call us."""
        self._key = key
        self._book = book
        self._statuses = statuses
        self._clock = clock
        self._reader_name = reader_name

    def known(self) -> list[Source]:
        held = self._book.known(self._key)
        if held is None:
            return []
        members = {member.safekeeper_id: parse_address(member.address) for member in held.access.members}
        statuses = [] if self._statuses is None else self._statuses.of_timeline(*self._key)
        return confirmed_sources(
            members,
            {each.safekeeper_id: each.commit_lsn for each in statuses},
            {each.safekeeper_id: each.durable_lsn for each in statuses},
        )

    async def learn(self) -> None:
        await self._book.get(self._key)

    async def connect(self, address: Address) -> ReplicationClient:
        held = await self._book.get(self._key)
        return await connect_replication(
            address,
            user=WAL_USER,
            application_name=self._reader_name,
            password=held.access.token,
            options=format_options(*self._key),
        )

    async def wait_newer(self) -> None:
        while True:
            held = await self._book.get(self._key)
            if self._clock.now() < held.renew_at:
                await asyncio.sleep(held.renew_at - self._clock.now())
            try:
                await self._book.renew(self._key)
            except WalAccessError:
                await asyncio.sleep(min(RENEW_RETRY_S, held.access.valid_for_s / 16))
            else:
                return

    def doubt(self) -> None:
        self._book.doubt(self._key)

    async def wait_for_news(self, timeout_s: float | None) -> None:
        if self._statuses is not None:
            await self._statuses.wait_for_news(*self._key, timeout_s)
        else:
            await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=timeout_s)

    def forget(self) -> None:
        self._book.forget(self._key)

    def problem(self) -> str | None:
        return self._book.problem(self._key)
