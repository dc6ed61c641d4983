"""Committed WAL of the branch, from whichever safekeeper has most of it.

Each safekeeper sends what it knows to be committed (C3), so the most that any of them has is committed.

Not here: who reads it (`wal_relay`, `replica_start`), writing WAL (`proposer`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, NamedTuple

from excimer.base.address import Address
from excimer.base.errors import ExcimerError, RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.service.replication_client import ReplicationClient, WalStream, connect_replication, stream_wal
from excimer.wire.pg_client import PostgresError
from excimer.wire.replication import SystemIdentity, format_options

USER: Final = "postgres"
_REMOVED: Final = "58P01"


class NoWalSourceError(RetryableError):
    """None of the branch's safekeepers can be reached."""


class WalRemovedError(RefusedError):
    """No safekeeper has this WAL, and none will have it again."""


class Source(NamedTuple):
    """One safekeeper, connected."""

    client: ReplicationClient
    identity: SystemIdentity

    @property
    def end_lsn(self) -> Lsn:
        """It has all committed WAL below, as far as it knows."""
        return self.identity.flush_lsn


class WalSource:
    def __init__(
        self,
        tenant_id: TenantId,
        timeline_id: TimelineId,
        safekeepers: Sequence[Address],
        token: Callable[[], str],
        reader_name: str,
    ) -> None:
        """`token` gives the newest one that reads the branch's WAL."""
        self._options = format_options(tenant_id, timeline_id)
        self._safekeepers = safekeepers
        self._token = token
        self._reader_name = reader_name

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[list[Source]]:
        """Those that answer, the furthest first; never empty. Raises `NoWalSourceError`."""
        asked = await asyncio.gather(*(self._connect(address) for address in self._safekeepers))
        found = [answer for answer in asked if isinstance(answer, Source)]
        try:
            if not found:
                raise NoWalSourceError(f"no safekeeper of the branch sends WAL: {asked[0]}")
            yield sorted(found, key=lambda source: source.end_lsn, reverse=True)
        finally:
            for source in found:
                source.client.close()

    async def _connect(self, address: Address) -> Source | ExcimerError:
        client = None
        try:
            client = await connect_replication(
                address,
                user=USER,
                application_name=self._reader_name,
                password=self._token(),
                options=self._options,
            )
            return Source(client, await client.identify_system())
        except ExcimerError as error:
            if client is not None:
                client.close()
            return error


async def open_stream(sources: Sequence[Source], start_lsn: Lsn) -> tuple[Source, WalStream]:
    """From the furthest that has this WAL; the others are closed.

    Raises `WalRemovedError`, `NoWalSourceError`.
    """
    refused: ExcimerError | None = None
    for source in sources:
        try:
            stream = await stream_wal(source.client, start_lsn)
        except PostgresError as error:
            refused = error
        except RetryableError as error:
            refused = refused or error
        else:
            for other in sources:
                if other is not source:
                    other.client.close()
            return source, stream
    if isinstance(refused, PostgresError) and refused.sqlstate == _REMOVED:
        raise WalRemovedError(f"WAL from {format_lsn(start_lsn)} on is gone: {refused}")
    raise NoWalSourceError(f"no safekeeper sends WAL from {format_lsn(start_lsn)} on: {refused}")
