"""What the stories do not tell: long records, the end, and who is told what when."""

import asyncio
from typing import Never

import pytest

from excimer.base.clock import Monotonic, UnixTime
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.compute import backpressure
from excimer.compute.backpressure import Backpressure
from excimer.compute.backpressure_plan import NO_LIMITS, BackpressurePlan, Positions
from excimer.compute.basebackup_client import PageserverUnreachableError
from excimer.compute.position_client import PositionClient
from excimer.service.tasks import running

MIB = 1 << 20
START = Lsn(1 << 30)
TENANT, TIMELINE = TenantId("a" * 32), TimelineId("b" * 32)


def at(written: int, committed: int, ingested: int) -> Positions:
    """Bytes behind `START`; the proposer has all that is written."""
    return Positions(
        Lsn(START + written), Lsn(START + written), Lsn(START + committed), Lsn(START + ingested), 0
    )


def test_a_record_longer_than_the_most_lag_is_not_stopped_in_the_middle() -> None:
    """Nothing is committed before its end, and nothing of it ingested: nobody lags."""
    plan = BackpressurePlan(64 * MIB, 0.0, START)
    for step in range(1, 100):
        limits = plan.step(step * 0.02, at(step * 10 * MIB, 0, 0))
        assert limits.wal_limit_lsn >= START + step * 10 * MIB + 64 * MIB
    limits = plan.step(3.0, at(1000 * MIB, 1000 * MIB, 0))
    assert (limits.confirm_lsn, limits.wal_limit_lsn) == (START + 56 * MIB, START + 64 * MIB)


def test_limits_can_be_turned_off() -> None:
    assert BackpressurePlan(0, 0.0, START).step(1.0, at(1 << 40, 1 << 40, 0)) == NO_LIMITS


class Compute:
    """Both that are looked at and told, and a clock; `told` are the calls."""

    def __init__(self) -> None:
        self.commit_lsn = self.received_lsn = START
        self.quorum_lsn = Lsn(0)
        self.told: list[tuple[int, ...]] = []

    def confirm_up_to(self, lsn: Lsn) -> None:
        self.told.append((lsn,))

    def bulk_bytes(self) -> int:
        return 0

    def written_lsn(self) -> Lsn:
        return self.commit_lsn

    def throttle(self, allowed_bytes: int, wal_limit_lsn: Lsn) -> None:
        self.told.append((allowed_bytes, wal_limit_lsn))

    def set_quorum(self, lsn: Lsn) -> None:
        self.quorum_lsn = lsn

    def monotonic(self) -> Monotonic:
        return Monotonic(1.0)

    def now(self) -> UnixTime:
        return UnixTime(1.0)


class Pageserver(PositionClient):
    """Fails the first time it is asked, and then says an old position before the newest."""

    answers: list[int | None]

    async def position(self) -> Lsn:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise PageserverUnreachableError("it does not run")
        return Lsn(answer)


def made(compute: Compute, answers: list[int | None] | None = None) -> Backpressure:
    def connect() -> PositionClient:
        client = Pageserver("127.0.0.1:1", TENANT, TIMELINE, "")
        client.answers = answers or [None]
        return client

    return Backpressure(
        lag_bytes_max=64 * MIB,
        start_lsn=START,
        proposer=compute,
        arena=compute,
        connect=connect,
        clock=compute,
    )


def test_only_changes_are_told_and_nothing_after_the_end() -> None:
    compute = Compute()
    pressure = made(compute)
    pressure.look()
    assert len(compute.told) == 2
    pressure.look()
    assert len(compute.told) == 2
    pressure.lift()
    assert compute.told[2:] == [(MAX_LSN,), (NO_LIMITS.allowed_bytes, NO_LIMITS.wal_limit_lsn)]
    compute.commit_lsn = Lsn(START + 100 * MIB)
    pressure.look()
    assert len(compute.told) == 4


def test_base_backups_hear_what_the_quorum_has() -> None:
    compute = Compute()
    pressure = made(compute)
    pressure.look()
    assert compute.quorum_lsn == START
    compute.commit_lsn = Lsn(START + MIB)
    pressure.look()
    assert compute.quorum_lsn == START + MIB


def test_a_pageserver_that_fails_is_asked_again_and_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backpressure, "RETRY_S", 0.01)
    monkeypatch.setattr(backpressure, "ASK_S", 0.01)
    compute = Compute()
    compute.commit_lsn = Lsn(START + 2 * MIB)
    answers: list[int | None] = [None, START + MIB, 0, START + MIB, START + 2 * MIB]
    pressure = made(compute, answers)
    seen: list[int] = []

    async def watch() -> Never:
        while True:
            seen.append(pressure.ingested_lsn)
            await asyncio.sleep(0.001)

    async def main() -> None:
        async with asyncio.timeout(20), running("pressure", pressure.run()), running("watch", watch()):
            while pressure.lag_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    asyncio.run(main())
    assert seen == sorted(seen)
    assert pressure.ingested_lsn == START + 2 * MIB
