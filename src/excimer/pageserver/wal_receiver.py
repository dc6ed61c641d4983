"""Takes one timeline's WAL from a safekeeper and feeds it to ingest, for as long as the timeline lives.

The event loop only moves bytes; decoding and storing run in a thread, one chunk at a time, each chunk
being all that has arrived meanwhile. `WalStream` stops reading its socket when too much waits, so a
pageserver that is behind holds back the safekeeper's sending, not its commits. Only committed WAL is
ever sent (C3), so nothing that was ingested has to be taken back.

After any loss the stream begins again at the end of the last whole record. A timeline to which nothing
happens lets its connection go and waits for news that a safekeeper has more.

Not here: which source to take (`receiver_plan`), decoding (`ingest`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from typing import Protocol

from excimer.base.address import Address
from excimer.base.clock import Clock, Monotonic
from excimer.base.errors import RefusedError, RetryableError
from excimer.base.lsn import Lsn
from excimer.pageserver.receiver_plan import (
    Failure,
    Source,
    choose_source,
    is_idle,
    is_stalled,
    next_failure,
    wait_s,
)
from excimer.service.logs import get_logger
from excimer.service.replication_client import ReplicationClient, WalStream, stream_wal

log = get_logger(__name__)

STALL_CHECK_S = 1.0
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
        """End of the last record ingested, and the LSN below which no pageserver needs WAL again (D2)."""


Connect = Callable[[Address], Awaitable[ReplicationClient]]


class WalReceiver:
    def __init__(
        self,
        *,
        consumer: WalConsumer,
        sources: Callable[[], Iterable[Source]],
        wait_for_news: Callable[[float | None], Awaitable[object]],
        connect: Connect,
        executor: Executor,
        clock: Clock,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`on_progress` is told the bytes of each chunk once it is ingested."""
        self._consumer = consumer
        self._sources = sources
        self._wait_for_news = wait_for_news
        self._connect = connect
        self._executor = executor
        self._clock = clock
        self._on_progress = on_progress
        self._failures: dict[Address, Failure] = {}
        self._idle_lsn: Lsn | None = None
        """Where the stream was let go because nothing more came; None when it was not."""
        self.source: Address | None = None
        """Where WAL comes from now."""

    async def run(self) -> None:
        """Never returns. Raises CorruptionError when the WAL itself cannot be understood."""
        while True:
            now = self._clock.monotonic()
            source = choose_source(self._sources(), self._failures, now, self._idle_lsn)
            if source is None:
                await self._wait_for_news(wait_s(self._failures, now))
                continue
            self._idle_lsn = None
            try:
                await self._take_from(source.address)
            except (RetryableError, RefusedError, OSError) as error:
                failure = next_failure(self._failures.get(source.address), self._clock.monotonic())
                self._failures[source.address] = failure
                log.info("WAL source lost", address=str(source.address), error=error, failures=failure.times)
            finally:
                self.source = None

    async def _take_from(self, address: Address) -> None:
        client = await self._connect(address)
        try:
            loop = asyncio.get_running_loop()
            start_lsn = await loop.run_in_executor(self._executor, self._consumer.begin_stream)
            async with asyncio.timeout(STREAM_START_TIMEOUT_S):
                stream = await stream_wal(client, start_lsn)
            self.source = address
            log.info("WAL source connected", address=str(address), start_lsn=start_lsn)
            self._idle_lsn = await self._take_chunks(address, client, stream, start_lsn)
        finally:
            client.close()

    async def _take_chunks(
        self, address: Address, client: ReplicationClient, stream: WalStream, received_lsn: Lsn
    ) -> Lsn:
        """Until nothing more comes; where that was."""
        loop = asyncio.get_running_loop()
        last_received = self._clock.monotonic()
        while True:
            try:
                async with asyncio.timeout(STALL_CHECK_S):
                    chunk = await stream.next_chunk()
            except TimeoutError:
                self._check_stall(address, received_lsn, last_received)
                self._report(client, received_lsn)
                if self._is_idle(received_lsn, last_received):
                    log.info("WAL source let go: nothing has come for a while", address=str(address))
                    return received_lsn
                continue
            await _uninterrupted(
                loop.run_in_executor(self._executor, self._consumer.ingest, chunk.start_lsn, chunk.data)
            )
            self._failures.pop(address, None)
            received_lsn = Lsn(chunk.start_lsn + len(chunk.data))
            last_received = self._clock.monotonic()
            self._on_progress(len(chunk.data))
            self._report(client, received_lsn)

    def _check_stall(self, address: Address, received_lsn: Lsn, last_received: Monotonic) -> None:
        now = self._clock.monotonic()
        if is_stalled(self._sources(), address, received_lsn, last_received, now):
            raise StalledError(f"nothing came from {address} for {now - last_received:.0f} s")

    def _is_idle(self, received_lsn: Lsn, last_received: Monotonic) -> bool:
        _, durable_lsn = self._consumer.positions()
        now = self._clock.monotonic()
        return is_idle(self._sources(), received_lsn, durable_lsn, last_received, now)

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
