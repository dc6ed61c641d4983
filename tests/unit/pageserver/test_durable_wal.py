"""Safekeepers hear what is durable, once no newer generation claims the timeline; and only those that lag."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from excimer.base.address import Address, parse_address
from excimer.base.lsn import INVALID_LSN, MAX_LSN, Lsn
from excimer.io.object_store import ObjectStoreError
from excimer.pageserver.durable_wal import DurableWal
from excimer.pageserver.receiver_plan import Source
from excimer.service.replication_client import ReplicationClient, ReplicationLostError
from excimer.storage.engine.manifest_store import OvertakenError
from excimer.storage.engine.timeline import Timeline

FIRST, SECOND, THIRD = (parse_address(f"127.0.0.1:{port}") for port in (1001, 1002, 1003))
SEGMENT = 16 << 20


class Store:
    """What is asked of a timeline."""

    wal_segment_size_bytes = SEGMENT

    def __init__(self) -> None:
        self.disk_consistent_lsn = Lsn(1000)
        self.failure: Exception | None = None
        self.slots_failure: Exception | None = None
        self.slots_lsn = MAX_LSN
        self.kept_slots = self

    async def confirm_consistent_lsn(self) -> Lsn:
        if self.failure is not None:
            raise self.failure
        return self.disk_consistent_lsn

    async def needed_lsn(self, durable_lsn: Lsn) -> Lsn:
        if self.slots_failure is not None:
            raise self.slots_failure
        return self.slots_lsn


class World:
    def __init__(self) -> None:
        self.store = Store()
        self.sources = [Source(each, Lsn(0)) for each in (FIRST, SECOND, THIRD)]
        self.streams_from: Address | None = FIRST
        self.away: set[Address] = set()
        self.told: list[tuple[Address, int]] = []
        self.wal = DurableWal(
            cast(Timeline, self.store),
            sources=lambda: self.sources,
            connect=self._connect,
            streams_from=lambda: self.streams_from,
        )

    async def _connect(self, address: Address) -> ReplicationClient:
        if address in self.away:
            raise ReplicationLostError("away")
        return cast(ReplicationClient, Visit(self, address))

    async def tell(self, lag: int = SEGMENT, quiet_s: float = 1e9) -> bool:
        return await self.wal.tell_those_behind(lag, quiet_s)


class Visit:
    def __init__(self, world: World, address: Address) -> None:
        self._world, self._address = world, address

    async def confirm_durable(self, lsn: Lsn) -> None:
        self._world.told.append((self._address, lsn))

    def close(self) -> None:
        pass


def in_loop(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await scenario(World())

    asyncio.run(run())


def test_nothing_is_told_before_it_is_sure_that_nobody_has_taken_over() -> None:
    async def scenario(world: World) -> None:
        await world.wal.confirm()
        world.store.disk_consistent_lsn = Lsn(1000 + SEGMENT)
        world.store.failure = ObjectStoreError("away")
        with pytest.raises(ObjectStoreError):
            await world.wal.confirm()
        assert world.wal.lsn == 1000
        world.store.failure = OvertakenError("by generation 2")
        with pytest.raises(OvertakenError):
            await world.wal.run()
        assert world.wal.lsn == 1000
        assert world.told == []

    in_loop(scenario)


def test_those_that_lag_by_a_segment_are_visited_and_the_source_of_wal_is_not() -> None:
    async def scenario(world: World) -> None:
        world.store.disk_consistent_lsn = Lsn(1000 + SEGMENT)
        world.sources[1] = Source(SECOND, Lsn(0), Lsn(1000 + SEGMENT))  # it has said so through the broker
        await world.wal.confirm()
        assert await world.tell()
        assert world.told == [(THIRD, 1000 + SEGMENT)]
        assert await world.tell(), "once told is enough"
        assert len(world.told) == 1
        world.store.disk_consistent_lsn = Lsn(1000 + 2 * SEGMENT - 8)
        await world.wal.confirm()
        assert not await world.tell(), "less than a segment waits"
        assert len(world.told) == 1
        assert await world.tell(quiet_s=0.0)
        assert world.told[1:] == [(each, 1000 + 2 * SEGMENT - 8) for each in (SECOND, THIRD)]

    in_loop(scenario)


def test_a_safekeeper_that_is_away_is_told_later_and_holds_up_nobody() -> None:
    async def scenario(world: World) -> None:
        world.streams_from = None
        world.away = {FIRST}
        world.store.disk_consistent_lsn = Lsn(1000 + SEGMENT)
        await world.wal.confirm()
        assert not await world.tell()
        assert [address for address, _ in world.told] == [SECOND, THIRD]
        world.away = set()
        assert await world.tell()
        assert [address for address, _ in world.told] == [SECOND, THIRD, FIRST]

    in_loop(scenario)


def test_without_known_safekeepers_it_is_not_done() -> None:
    async def scenario(world: World) -> None:
        world.sources = []
        await world.wal.confirm()
        assert not await world.tell()
        assert world.wal.lsn > INVALID_LSN

    in_loop(scenario)


def test_what_slots_need_is_not_told_and_nothing_before_they_are_known() -> None:
    async def scenario(world: World) -> None:
        world.streams_from = None
        world.store.slots_failure = ObjectStoreError("away")
        with pytest.raises(ObjectStoreError):
            await world.wal.confirm()
        assert await world.tell(quiet_s=0.0)
        assert world.told == []
        assert not world.wal.is_settled(Lsn(1000))
        world.store.slots_failure, world.store.slots_lsn = None, Lsn(1024)
        world.store.disk_consistent_lsn = Lsn(1000 + SEGMENT)
        await world.wal.confirm()
        assert await world.tell(quiet_s=0.0)
        assert {lsn for _, lsn in world.told} == {1024}
        assert world.wal.is_settled(Lsn(1000 + SEGMENT)), "nobody has to stay connected for it"
        world.store.slots_lsn = MAX_LSN
        await world.wal.confirm()
        assert await world.tell(quiet_s=0.0)
        assert {lsn for _, lsn in world.told} == {1024, 1000 + SEGMENT}

    in_loop(scenario)


def test_the_last_word_of_a_timeline_that_is_put_away_goes_to_all() -> None:
    async def scenario(world: World) -> None:
        world.streams_from = None
        world.away = {SECOND}
        world.store.disk_consistent_lsn = Lsn(1008)
        await world.wal.finish()
        assert world.told == [(FIRST, 1008), (THIRD, 1008)]

    in_loop(scenario)
