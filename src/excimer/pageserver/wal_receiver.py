"""Takes one timeline's WAL from a safekeeper and feeds it to ingest, for as long as the timeline lives.

The event loop only moves bytes; decoding and storing run in a thread, one chunk at a time, each chunk
being all that has arrived meanwhile. `WalStream` stops reading its socket when too much waits, so a
pageserver that is behind holds back the safekeeper's sending, not its commits. Only committed WAL is
ever sent (C3), so nothing that was ingested has to be taken back.

After any loss the stream begins again at the end of the last whole record. A timeline to which nothing
happens lets its connection go and waits for news that a safekeeper has more. A connection lives as long as
its token: once there is a newer one, the stream begins again with that.

Not here: which source to take (`receiver_plan`), decoding (`ingest`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from typing import Protocol

from excimer.base.address import Address
from excimer.base.clock import Clock, Monotonic
from excimer.base.errors import RefusedError, RetryableError
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.pageserver.receiver_plan import (
    Failure,
    Source,
    choose_source,
    is_idle,
    is_stalled,
    next_failure,
    wait_s,
)
from excimer.pageserver.wal_access import WalAccessError
from excimer.service.logs import get_logger
from excimer.service.replication_client import ReplicationClient, WalStream, stream_wal
from excimer.service.tasks import Backoff, running

log = get_logger(__name__)

STALL_CHECK_S = 1.0
_ACCESS = Backoff(first_s=0.1, most_s=5.0)
STREAM_START_TIMEOUT_S = 5.0
"""How long a connected source may take to agree to stream: one that hangs must not hold the timeline up."""


class StalledError(RetryableError):
    """A safekeeper sends nothing although another one has more."""


class WalConsumer(Protocol):
    """Where WAL goes."""

    def begin_stream(self) -> Lsn:
        """Forgets a record that came in part; returns the LSN from which WAL must come now. May block."""

    def ingest(self, start_lsn: Lsn, data: bytes, /) -> None:
        """Takes WAL that continues the stream. Blocks; called from a thread, never twice at a time."""

    def positions(self) -> tuple[Lsn, Lsn]:
        """End of the last record ingested, and the LSN below which nobody needs WAL again (D2)."""

    def is_settled(self, lsn: Lsn) -> bool:
        """Whether all below is durable, and safekeepers may be told no more of it for now."""


Connect = Callable[[Address], Awaitable[ReplicationClient]]


class WalSources(Protocol):
    """Where WAL comes from (`wal_sources.TimelineSources`)."""

    def known(self) -> Iterable[Source]:
        """None before they were learned."""

    async def learn(self) -> None:
        """Who they are. Raises `WalAccessError`."""

    async def connect(self, address: Address, /) -> ReplicationClient:
        """Raises `WalAccessError`, and as `connect_replication` does."""

    async def wait_newer(self) -> None:
        """Until there is a newer token than connections so far were made with; raises `WalAccessError` when
        there is none in time.
        """

    def doubt(self) -> None:
        """One was not as it should be: who they are is to be learned anew."""

    async def wait_for_news(self, timeout_s: float | None, /) -> None: ...
    def problem(self) -> str | None:
        """Why no WAL can be had now."""

    def forget(self) -> None:
        """The timeline is gone for good."""


class WalReceiver:
    def __init__(
        self,
        *,
        consumer: WalConsumer,
        sources: WalSources,
        executor: Executor,
        clock: Clock,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`on_progress` is told the bytes of each chunk once it is ingested."""
        self._consumer = consumer
        self._sources = sources
        self._executor = executor
        self._clock = clock
        self._on_progress = on_progress
        self._failures: dict[Address, Failure] = {}
        self._idle_lsn: Lsn | None = None
        """Where the stream was let go because nothing more came; None when it was not."""
        self._disbelieved_lsn = INVALID_LSN
        """The highest that was claimed when nothing more came: nobody has delivered it."""
        self._silent: set[Address] = set()
        """Sources that were left because others claim more, since WAL came last."""
        self._access_failures = 0
        self.source: Address | None = None
        """Where WAL comes from now."""

    async def run(self) -> None:
        """Never returns. Raises CorruptionError when the WAL itself cannot be understood."""
        while True:
            source = await self._choose()
            self._idle_lsn = None
            try:
                await self._take_from(source.address)
            except WalAccessError as error:
                await self._wait_for_access(error)
            except (RetryableError, RefusedError, OSError) as error:
                failure = next_failure(self._failures.get(source.address), self._clock.monotonic())
                self._failures[source.address] = failure
                self._sources.doubt()
                log.info("WAL source lost", address=str(source.address), error=error, failures=failure.times)
            finally:
                self.source = None

    async def _choose(self) -> Source:
        """Waits until there is one."""
        while True:
            now = self._clock.monotonic()
            known = list(self._sources.known())
            source = choose_source(known, self._failures, now, self._idle_lsn, self._disbelieved_lsn)
            if source is not None:
                return source
            if known:
                await self._sources.wait_for_news(wait_s(self._failures, now))
                continue
            try:
                await self._sources.learn()
            except WalAccessError as error:
                await self._wait_for_access(error)

    async def _wait_for_access(self, error: WalAccessError) -> None:
        """No source is to blame."""
        self._access_failures += 1
        if self._access_failures == 1:
            log.warning("ingest waits: there is no access to WAL", error=error)
        await asyncio.sleep(_ACCESS.next_wait(self._access_failures))

    async def _take_from(self, address: Address) -> None:
        client = await self._sources.connect(address)
        self._access_failures = 0
        try:
            loop = asyncio.get_running_loop()
            start_lsn = await loop.run_in_executor(self._executor, self._consumer.begin_stream)
            async with asyncio.timeout(STREAM_START_TIMEOUT_S):
                stream = await stream_wal(client, start_lsn)
            self.source = address
            log.info("WAL source connected", address=str(address), start_lsn=start_lsn)
            async with running("renew WAL access", self._sources.wait_newer()) as renewal:
                self._idle_lsn = await self._take_chunks(address, client, stream, start_lsn, renewal)
        finally:
            client.close()

    async def _take_chunks(
        self,
        address: Address,
        client: ReplicationClient,
        stream: WalStream,
        received_lsn: Lsn,
        renewal: asyncio.Task[None],
    ) -> Lsn | None:
        """Until nothing more comes, and where that was; None: the stream is to go on with a newer token."""
        loop = asyncio.get_running_loop()
        last_received = self._clock.monotonic()
        while not renewal.done():
            try:
                async with asyncio.timeout(STALL_CHECK_S):
                    chunk = await stream.next_chunk()
            except TimeoutError:
                self._check_stall(address, received_lsn, last_received)
                self._report(client, received_lsn)
                if self._is_idle(received_lsn, last_received):
                    log.info("WAL source let go: nothing has come for a while", address=str(address))
                    claims = [source.claimed_lsn for source in self._sources.known()]
                    self._disbelieved_lsn = max(claims, default=INVALID_LSN)
                    return received_lsn
                continue
            await _uninterrupted(
                loop.run_in_executor(self._executor, self._consumer.ingest, chunk.start_lsn, chunk.data)
            )
            self._failures.pop(address, None)
            self._silent.clear()
            received_lsn = Lsn(chunk.start_lsn + len(chunk.data))
            last_received = self._clock.monotonic()
            self._on_progress(len(chunk.data))
            self._report(client, received_lsn)
        log.debug("the stream goes on with a newer token", address=str(address))
        return None

    def _check_stall(self, address: Address, received_lsn: Lsn, last_received: Monotonic) -> None:
        now = self._clock.monotonic()
        silent = self._silent | {address}
        if is_stalled(self._sources.known(), silent, received_lsn, last_received, now):
            self._silent = silent
            raise StalledError(f"nothing came from {address} for {now - last_received:.0f} s")

    def _is_idle(self, received_lsn: Lsn, last_received: Monotonic) -> bool:
        if not self._consumer.is_settled(received_lsn):
            return False
        return is_idle(self._sources.known(), received_lsn, last_received, self._clock.monotonic())

    def _report(self, client: ReplicationClient, received_lsn: Lsn) -> None:
        record_lsn, durable_lsn = self._consumer.positions()
        client.report(write_lsn=received_lsn, flush_lsn=durable_lsn, apply_lsn=record_lsn)


async def _uninterrupted(future: asyncio.Future[None]) -> None:
    """Awaits a thread's work; a cancellation waits until the thread is done, for it owns the consumer."""
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise
