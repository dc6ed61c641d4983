"""Receives a branch's committed WAL from its safekeepers into a `WalDirectory`, for as long as it is let.

::

    ask all members how far they are --> the furthest --> stream from the directory's next segment on
            ^                                                 | lost, its token over, or others are further
            '-------------------------------------------------'

It needs no endpoint, and goes on over the stops, starts and crashes of one. Only what a majority of
safekeepers has is ever sent (C3), so nothing that was received is taken back. What is on disk here is told to
the safekeeper, which keeps the rest for us, up to a limit.

Not here: who may receive (the controller), what is done with the files.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, NamedTuple

from excimer.base.address import Address, parse_address
from excimer.base.errors import ExcimerError, RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.export.wal_directory import WalDirectory
from excimer.service.replication_client import (
    ReplicationClient,
    ReplicationLostError,
    WalStream,
    connect_replication,
    stream_wal,
)
from excimer.service.tasks import Backoff
from excimer.wire.pg_client import PostgresError
from excimer.wire.replication import format_options
from excimer.wire.wal_access import WalAccess

SYNC_INTERVAL_S: Final = 1.0
"""What has come is on disk, and the safekeeper is told so, at the latest after this."""
QUIET_S: Final = 10.0
"""After so long without WAL the others are asked whether they have more."""
RENEW_AFTER: Final = 0.5
"""Part of a token's life after which another is asked for before a new connection is made."""
USER: Final = "postgres"
READER_NAME: Final = "excimer wal receive"
ONCE_FAILURES_MAX: Final = 3
_REMOVED: Final = "58P01"
_BACKOFF: Final = Backoff(first_s=0.1, most_s=5.0)

AskAccess = Callable[[], Awaitable[WalAccess]]
Report = Callable[[str], None]


class WalGoneError(RefusedError):
    """No safekeeper has the WAL that comes next, and none will have it again."""


class NoSafekeeperError(RetryableError):
    """None of the branch's safekeepers can be reached."""


class _Member(NamedTuple):
    client: ReplicationClient
    end_lsn: Lsn
    """It has all committed WAL below, as far as it knows."""


class WalReceiving:
    """One branch, one directory: `run` once."""

    def __init__(
        self,
        tenant_id: TenantId,
        timeline_id: TimelineId,
        ask_access: AskAccess,
        open_directory: Callable[[int], WalDirectory],
        report: Report,
    ) -> None:
        """`open_directory` is given the segment size; `report` hears sentences for the user."""
        self._ids = tenant_id, timeline_id
        self._ask_access = ask_access
        self._open_directory = open_directory
        self._report = report
        self._access: WalAccess | None = None
        self._asked_at = -math.inf
        self._directory: WalDirectory | None = None
        self._trouble = ""

    async def run(self, *, once: bool) -> Lsn:
        """Until cancelled, or `once` all is here that was committed when it began; up to where.

        Raises `WalGoneError`, `WalDirectoryError`, other refusals, OSError of the directory.
        """
        failures = 0
        target: Lsn | None = None
        try:
            while True:
                begun = time.monotonic()
                try:
                    async with self._members() as members:
                        target = target or (members[0].end_lsn if once else None)
                        return await self._receive(members, target)
                except RetryableError as error:
                    if once and isinstance(error, NoSafekeeperError) and failures >= ONCE_FAILURES_MAX:
                        raise
                    failures = 1 if time.monotonic() - begun > QUIET_S else failures + 1
                    self._asked_at = -math.inf  # members may have changed, or the branch be gone
                    self._tell_trouble(str(error))
                await asyncio.sleep(_BACKOFF.next_wait(failures))
        finally:
            if self._directory is not None:
                await asyncio.to_thread(self._directory.close)

    def _tell_trouble(self, what: str) -> None:
        """The same is not told again and again."""
        if what != self._trouble:
            self._trouble = what
            self._report(f"no WAL comes: {what}; trying again")

    async def _current_access(self) -> WalAccess:
        """One with more than half of its life before it, or what there is while the controller is away."""
        now = time.monotonic()
        if self._access is None or now - self._asked_at > RENEW_AFTER * self._access.valid_for_s:
            try:
                self._access, self._asked_at = await self._ask_access(), now
            except RetryableError:
                if self._access is None:
                    raise
        return self._access

    @contextlib.asynccontextmanager
    async def _members(self) -> AsyncIterator[list[_Member]]:
        """Those that answer, the furthest first; never empty. Raises `NoSafekeeperError`, RefusedError."""
        access = await self._current_access()
        asked = await asyncio.gather(
            *(self._connect(parse_address(member.address), access) for member in access.members)
        )
        found = [answer for answer in asked if isinstance(answer, _Member)]
        try:
            if not found:
                raise NoSafekeeperError(f"no safekeeper of the branch answers: {asked[0]}")
            yield sorted(found, key=lambda member: member.end_lsn, reverse=True)
        finally:
            for member in found:
                member.client.close()

    async def _connect(self, address: Address, access: WalAccess) -> _Member | ExcimerError:
        client = None
        try:
            client = await connect_replication(
                address,
                user=USER,
                application_name=READER_NAME,
                password=access.token,
                options=format_options(*self._ids),
            )
            return _Member(client, (await client.identify_system()).flush_lsn)
        except ExcimerError as error:
            if client is not None:
                client.close()
            return error

    async def _receive(self, members: list[_Member], target: Lsn | None) -> Lsn:
        """Raises `ReplicationLostError` when the source is no longer the right one."""
        directory, start_lsn = await self._begin(members[0])
        if target is not None and start_lsn >= target:
            return start_lsn
        client, stream = await _open_stream(members, start_lsn)
        for member in members:
            if member.client is not client:
                member.client.close()
        if self._trouble:
            self._trouble = ""
            self._report(f"WAL comes again, from {format_lsn(start_lsn)} on")
        return await self._store(client, stream, directory, start_lsn, target)

    async def _begin(self, member: _Member) -> tuple[WalDirectory, Lsn]:
        if self._directory is None:
            segment_size = int((await member.client.show("wal_segment_size")).removesuffix("MB")) << 20
            self._directory = await asyncio.to_thread(self._open_directory, segment_size)
        return self._directory, await asyncio.to_thread(self._directory.begin, member.end_lsn)

    async def _store(
        self,
        client: ReplicationClient,
        stream: WalStream,
        directory: WalDirectory,
        start_lsn: Lsn,
        target: Lsn | None,
    ) -> Lsn:
        written_lsn, synced_lsn, synced_at = start_lsn, start_lsn, time.monotonic()
        while True:
            is_quiet = written_lsn == synced_lsn
            try:
                chunk = await asyncio.wait_for(stream.next_chunk(), QUIET_S if is_quiet else SYNC_INTERVAL_S)
            except TimeoutError:
                if is_quiet:
                    await self._look_for_more(written_lsn)
            except PostgresError as error:  # the token has run out, say: beginning anew shows what it means
                raise ReplicationLostError(str(error)) from error
            else:
                await asyncio.to_thread(directory.write, chunk.start_lsn, chunk.data)
                written_lsn = Lsn(chunk.start_lsn + len(chunk.data))
            is_over = target is not None and written_lsn >= target
            if is_over or (synced_lsn < written_lsn and time.monotonic() - synced_at >= SYNC_INTERVAL_S):
                await asyncio.to_thread(directory.sync)
                synced_lsn, synced_at = written_lsn, time.monotonic()
                client.report(write_lsn=synced_lsn, flush_lsn=synced_lsn, apply_lsn=synced_lsn)
            if is_over:
                return written_lsn

    async def _look_for_more(self, written_lsn: Lsn) -> None:
        """Raises `ReplicationLostError` if another safekeeper has more than this one sends."""
        try:
            async with self._members() as members:
                end_lsn = members[0].end_lsn
        except NoSafekeeperError:
            return
        if end_lsn > written_lsn:
            raise ReplicationLostError(f"the safekeeper sends nothing behind {format_lsn(written_lsn)}")


async def _open_stream(members: list[_Member], start_lsn: Lsn) -> tuple[ReplicationClient, WalStream]:
    """From the furthest that has this WAL. Raises `WalGoneError`, PostgresError, `ReplicationLostError`."""
    for member in members:
        try:
            return member.client, await stream_wal(member.client, start_lsn)
        except PostgresError as error:
            if error.sqlstate != _REMOVED:
                raise
            refused = error
    raise WalGoneError(
        f"WAL from {format_lsn(start_lsn)} on is gone ({refused}): receive into a new directory, "
        "and take a base backup after that"
    )
