"""The WAL receiver on sources that misbehave before they send anything."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from excimer.base.address import Address
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.pageserver import receiver_plan, wal_receiver
from excimer.pageserver.receiver_plan import Source
from excimer.pageserver.wal_access import WalAccessError
from excimer.pageserver.wal_receiver import WalReceiver
from excimer.service.replication_client import ReplicationClient, ReplicationLostError
from excimer.service.tasks import SystemClock, running
from tests.kit.static_sources import StaticSources

HANGING, OTHER = Address("hangs", 1), Address("other", 2)


class HangingClient:
    """Connected, but START_REPLICATION is never answered."""

    def __init__(self) -> None:
        self.is_closed = False

    async def start_physical(self, start_lsn: Lsn, sink: object, *, slot: str | None = None) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        self.is_closed = True


class SilentClient:
    """Streams nothing."""

    def __init__(self) -> None:
        self.is_closed = False

    async def start_physical(self, start_lsn: Lsn, sink: object, *, slot: str | None = None) -> None:
        return

    def report(self, **lsns: Lsn) -> None:
        return

    def close(self) -> None:
        self.is_closed = True


class Nothing:
    """A consumer that gets no WAL."""

    def begin_stream(self) -> Lsn:
        return Lsn(8)

    def ingest(self, start_lsn: Lsn, data: bytes) -> None:
        raise AssertionError("no WAL was sent")

    def positions(self) -> tuple[Lsn, Lsn]:
        return INVALID_LSN, INVALID_LSN

    def is_settled(self, lsn: Lsn) -> bool:
        return False


def test_a_source_that_hangs_before_it_streams_is_left_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_receiver, "STREAM_START_TIMEOUT_S", 0.05)
    client = HangingClient()
    reached = asyncio.Event()

    async def connect(address: Address) -> ReplicationClient:
        if address == OTHER:
            reached.set()
            raise ReplicationLostError("enough is known")
        return cast(ReplicationClient, client)

    async def scenario() -> None:
        with ThreadPoolExecutor(1) as executor:
            receiver = WalReceiver(
                consumer=Nothing(),
                sources=StaticSources(connect, lambda: [Source(HANGING, Lsn(100)), Source(OTHER, Lsn(50))]),
                executor=executor,
                clock=SystemClock(),
            )
            async with running("receiver", receiver.run()), asyncio.timeout(30):
                await reached.wait()
        assert client.is_closed

    asyncio.run(scenario())


class Durable(Nothing):
    """All it has is in object storage."""

    def positions(self) -> tuple[Lsn, Lsn]:
        return Lsn(8), Lsn(8)

    def is_settled(self, lsn: Lsn) -> bool:
        return True


def test_an_idle_timeline_lets_its_source_go_until_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal_receiver, "STALL_CHECK_S", 0.01)
    monkeypatch.setattr(receiver_plan, "IDLE_S", 0.02)
    clients: list[SilentClient] = []
    news = asyncio.Queue[float | None]()
    commit_lsn = claimed_lsn = Lsn(8)

    async def connect(address: Address) -> ReplicationClient:
        clients.append(SilentClient())
        if len(clients) > 1:
            back.set()
        return cast(ReplicationClient, clients[-1])

    async def wait_for_news(timeout_s: float | None) -> None:
        await news.put(timeout_s)
        await heard.wait()
        heard.clear()

    async def scenario() -> None:
        nonlocal commit_lsn, claimed_lsn
        with ThreadPoolExecutor(1) as executor:
            receiver = WalReceiver(
                consumer=Durable(),
                sources=StaticSources(
                    connect, lambda: [Source(OTHER, commit_lsn, claimed_lsn=claimed_lsn)], wait_for_news
                ),
                executor=executor,
                clock=SystemClock(),
            )
            async with running("receiver", receiver.run()), asyncio.timeout(30):
                assert await news.get() is None, "nothing failed: only news matters"
                assert [client.is_closed for client in clients] == [True]
                assert receiver.source is None
                heard.set()  # of something that is not more
                assert await news.get() is None
                claimed_lsn = Lsn(24)
                heard.set()
                await back.wait()
                assert await news.get() is None, "looked at, and forgotten: nothing came of it"
                assert [client.is_closed for client in clients] == [True, True]
                back.clear()
                commit_lsn = Lsn(16)
                heard.set()
                await back.wait()

    heard, back = asyncio.Event(), asyncio.Event()
    asyncio.run(scenario())


def test_the_stream_begins_again_with_a_newer_token_and_blames_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wal_receiver, "STALL_CHECK_S", 0.01)
    clients: list[SilentClient] = []
    connected = asyncio.Queue[int]()

    async def connect(address: Address) -> ReplicationClient:
        clients.append(SilentClient())
        connected.put_nowait(len(clients))
        return cast(ReplicationClient, clients[-1])

    async def scenario() -> None:
        sources = StaticSources(connect, lambda: [Source(OTHER, Lsn(8))])
        with ThreadPoolExecutor(1) as executor:
            receiver = WalReceiver(
                consumer=Nothing(), sources=sources, executor=executor, clock=SystemClock()
            )
            async with running("receiver", receiver.run()), asyncio.timeout(30):
                for count in (1, 2, 3):
                    assert await connected.get() == count
                    assert [client.is_closed for client in clients] == [True] * (count - 1) + [False]
                    sources.newer.set()
                assert await connected.get() == 4
                assert receiver._failures == {}

    asyncio.run(scenario())


def test_ingest_waits_for_access_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    class Closed(StaticSources):
        async def learn(self) -> None:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise WalAccessError("the controller is away")

        def known(self) -> list[Source]:
            return [Source(OTHER, Lsn(8))] if tries >= 3 else []

    async def scenario() -> None:
        connected = asyncio.Event()

        async def connect(address: Address) -> ReplicationClient:
            connected.set()
            return cast(ReplicationClient, SilentClient())

        with ThreadPoolExecutor(1) as executor:
            receiver = WalReceiver(
                consumer=Nothing(), sources=Closed(connect, list), executor=executor, clock=SystemClock()
            )
            async with running("receiver", receiver.run()), asyncio.timeout(30):
                await connected.wait()
        assert tries == 3

    asyncio.run(scenario())
