"""Batches of the redo requests of many callers: everyone gets their own pages, whoever goes or fails, and
tenants take turns.
"""

import asyncio
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from excimer.base.ids import TenantId
from excimer.storage.engine import redo_batcher
from excimer.storage.engine.redo_batcher import (
    BATCH_REQUESTS_MAX,
    BATCH_REQUESTS_MIN,
    BATCH_SIZE_BYTES_MAX,
    RedoBatcher,
)
from excimer.storage.engine.redo_supervisor import RedoError, RedoUnavailableError

TENANT, OTHER, THIRD = (TenantId(f"{number:032x}") for number in (1, 2, 3))


class Workers:
    """Answers each request with itself, turned round; holds batches back while its gate is closed."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.tenants: list[TenantId] = []
        """Whose each batch was."""
        self.begun = threading.Semaphore(0)
        """Released for each batch."""
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def run_batch(self, tenant: TenantId, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        self.batches.append(list(requests))
        self.tenants.append(tenant)
        self.begun.release()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return [answer(request) for request in requests]


def answer(request: bytes) -> bytes | RedoError:
    return RedoError(bytes(18), 1, 1, "poison") if request == b"poison" else request[::-1]


def make_batcher(fake: Workers, executor: ThreadPoolExecutor, workers: int = 2) -> RedoBatcher:
    return RedoBatcher(fake.run_batch, executor, workers)


def test_requests_that_come_together_share_a_batch() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            batcher = make_batcher(fake, executor)
            calls = [batcher.redo([b"%d" % number], TENANT) for number in range(10)]
            assert await asyncio.gather(*calls) == [[b"%d" % number] for number in range(10)]
            assert await batcher.redo([], TENANT) == []

    asyncio.run(run())
    assert [len(batch) for batch in fake.batches] == [10]


def test_what_comes_while_all_are_busy_goes_out_together() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            batcher = make_batcher(fake, executor)
            fake.gate.clear()
            first = [
                asyncio.create_task(batcher.redo([b"%d" % at] * BATCH_REQUESTS_MIN, TENANT)) for at in (1, 2)
            ]
            await asyncio.to_thread(fake.begun.acquire)
            await asyncio.to_thread(fake.begun.acquire)
            later = [asyncio.create_task(batcher.redo([b"%d" % number], TENANT)) for number in range(300)]
            await asyncio.sleep(0.01)
            assert len(fake.batches) == 2
            fake.gate.set()
            await asyncio.gather(*first, *later)

    asyncio.run(run())
    assert [len(batch) for batch in fake.batches[:3]] == [16, 16, 150]
    assert len(fake.batches) < 12


def test_a_caller_who_goes_takes_nothing_from_the_others() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = make_batcher(fake, executor, workers=1)
            fake.gate.clear()
            running = asyncio.create_task(batcher.redo([b"ab"], TENANT))
            await asyncio.to_thread(fake.begun.acquire)
            goes, stays = (asyncio.create_task(batcher.redo([text] * 3, TENANT)) for text in (b"cd", b"ef"))
            await asyncio.sleep(0)
            running.cancel()
            goes.cancel()
            await asyncio.sleep(0)
            fake.gate.set()
            assert await stays == [b"fe"] * 3
            assert running.cancelled()
            assert goes.cancelled()
            assert await batcher.redo([b"gh"], TENANT) == [b"hg"]

    asyncio.run(run())
    assert fake.batches == [[b"ab"], [b"ef"] * 3, [b"gh"]]


def test_a_page_that_fails_fails_for_its_own_caller_only() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = make_batcher(fake, executor, workers=1)
            good, bad = await asyncio.gather(
                batcher.redo([b"ab", b"cd"], TENANT), batcher.redo([b"poison"], TENANT)
            )
            assert good == [b"ba", b"dc"]
            assert isinstance(bad[0], RedoError)

    asyncio.run(run())
    assert len(fake.batches) == 1


def test_a_batch_that_cannot_be_run_is_an_error_to_all_in_it_and_the_next_one_runs() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = make_batcher(fake, executor, workers=1)
            fake.error = RedoUnavailableError("none stays alive")
            calls = [batcher.redo([b"ab"], TENANT), batcher.redo([b"cd"], TENANT)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(outcome, RedoUnavailableError) for outcome in outcomes)
            fake.error = None
            assert await batcher.redo([b"ab"], TENANT) == [b"ba"]

    asyncio.run(run())


def test_closing_refuses_what_waits_and_what_comes() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = make_batcher(fake, executor, workers=1)
            fake.gate.clear()
            running = asyncio.create_task(batcher.redo([b"ab"], TENANT))
            await asyncio.to_thread(fake.begun.acquire)
            waiting = asyncio.create_task(batcher.redo([b"cd"], TENANT))
            await asyncio.sleep(0)
            batcher.close()
            with pytest.raises(RedoUnavailableError):
                await waiting
            with pytest.raises(RedoUnavailableError):
                await batcher.redo([b"ef"], TENANT)
            fake.gate.set()
            assert await running == [b"ba"]

    asyncio.run(run())


def test_batches_are_bounded() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = make_batcher(fake, executor, workers=1)
            many = [b"x"] * (BATCH_REQUESTS_MAX * 2)
            large = [bytes(BATCH_SIZE_BYTES_MAX // 2)] * 3 + [bytes(BATCH_SIZE_BYTES_MAX * 2)]
            await batcher.redo(many, TENANT)
            await batcher.redo(large, TENANT)

    asyncio.run(run())
    assert [len(batch) for batch in fake.batches] == [BATCH_REQUESTS_MAX, BATCH_REQUESTS_MAX, 2, 1, 1]


def test_everyone_gets_their_own() -> None:
    """Calls of all sizes at all moments, some cancelled."""
    fake = Workers()
    chance = random.Random(5)

    async def one(batcher: RedoBatcher, number: int) -> None:
        await asyncio.sleep(chance.random() * 0.02)
        requests = [b"%d-%d" % (number, at) for at in range(chance.randrange(1, 60))]
        call = asyncio.create_task(batcher.redo(requests, TENANT))
        if chance.random() < 0.2:
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            return
        assert await call == [request[::-1] for request in requests]

    async def run() -> None:
        with ThreadPoolExecutor(3) as executor:
            batcher = make_batcher(fake, executor, workers=3)
            await asyncio.gather(*(one(batcher, number) for number in range(300)))

    asyncio.run(run())
    assert len(fake.batches) < 300


def test_a_batch_holds_one_tenants_requests_and_tenants_take_turns() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher = make_batcher(fake, executor, workers=1)
            fake.gate.clear()
            calls = [asyncio.create_task(batcher.redo([b"first"], THIRD))]
            await asyncio.to_thread(fake.begun.acquire)
            calls += [
                asyncio.create_task(batcher.redo([b"%d" % tenant] * count, tenants[tenant]))
                for tenant, count in [(0, BATCH_REQUESTS_MAX * 3), (1, 5), (0, 1), (2, 1), (1, 2)]
            ]
            await asyncio.sleep(0)
            fake.gate.set()
            await asyncio.gather(*calls)

    tenants = (TENANT, OTHER, THIRD)
    asyncio.run(run())
    assert fake.tenants == [THIRD, TENANT, OTHER, THIRD, TENANT, TENANT, TENANT]
    assert [len(batch) for batch in fake.batches] == [1, 256, 7, 1, 256, 256, 1]
    assert all(
        set(batch) <= {b"first", b"%d" % tenants.index(tenant)}
        for batch, tenant in zip(fake.batches, fake.tenants, strict=True)
    )


def test_waiting_tenants_take_a_thread_each_before_one_is_split() -> None:
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            batcher = make_batcher(fake, executor)
            await asyncio.gather(batcher.redo([b"a"] * 200, TENANT), batcher.redo([b"b"] * 200, OTHER))

    asyncio.run(run())
    assert sorted(map(len, fake.batches)) == [200, 200]


def test_tenants_whose_batches_take_long_leave_a_thread_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redo_batcher, "SLOW_BATCH_S", 0.0)
    fake = Workers()

    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            batcher = make_batcher(fake, executor)
            await asyncio.gather(batcher.redo([b"slow"], TENANT), batcher.redo([b"slow"], THIRD))
            monkeypatch.setattr(redo_batcher, "SLOW_BATCH_S", 60.0)
            fake.gate.clear()
            slow = [asyncio.create_task(batcher.redo([b"slow"] * 64, each)) for each in (TENANT, THIRD)]
            for _ in range(3):
                await asyncio.to_thread(fake.begun.acquire)
            other = asyncio.create_task(batcher.redo([b"other"], OTHER))
            await asyncio.to_thread(fake.begun.acquire)
            assert fake.tenants[2:] == [TENANT, OTHER]
            fake.gate.set()
            assert await other == [b"rehto"]
            await asyncio.gather(*slow)
            # Forgiven after a while.
            monkeypatch.setattr(batcher, "_slow_until_s", dict.fromkeys((TENANT, THIRD), 0.0))
            fake.begun = threading.Semaphore(0)
            fake.gate.clear()
            fast = asyncio.create_task(batcher.redo([b"fast"] * 64, TENANT))
            for _ in range(2):
                assert await asyncio.to_thread(fake.begun.acquire, timeout=10)
            fake.gate.set()
            await fast

    asyncio.run(run())


def test_tenants_with_processes_go_on_while_others_take_theirs() -> None:
    """Of two threads one recycles at a time, and then not again for as long as that took."""
    fake = Workers()
    cold = {OTHER, THIRD}

    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            batcher = RedoBatcher(fake.run_batch, executor, 2, cold.__contains__)
            fake.gate.clear()
            calls = [asyncio.create_task(batcher.redo([b"x"], each)) for each in (OTHER, THIRD, TENANT)]
            for _ in range(2):
                assert await asyncio.to_thread(fake.begun.acquire, timeout=10)
            assert fake.tenants == [OTHER, TENANT]
            await asyncio.sleep(0.05)
            began_s = asyncio.get_running_loop().time()
            fake.gate.set()
            await asyncio.gather(*calls)
            assert fake.tenants == [OTHER, TENANT, THIRD]
            assert asyncio.get_running_loop().time() - began_s > 0.04

    asyncio.run(run())
