"""Gathering redo requests of many callers: everyone gets their own pages, whoever goes or fails."""

import asyncio
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from excimer.storage.engine.redo_crew import RedoError, RedoUnavailableError
from excimer.storage.engine.redo_gathering import (
    BATCH_REQUESTS_MAX,
    BATCH_REQUESTS_MIN,
    BATCH_SIZE_BYTES_MAX,
    RedoGathering,
)


class Crew:
    """Answers each request with itself, turned round; holds batches back while its gate is closed."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.begun = threading.Semaphore(0)
        """Released for each batch."""
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def run_batch(self, requests: Sequence[bytes]) -> list[bytes | RedoError]:
        self.batches.append(list(requests))
        self.begun.release()
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return [answer(request) for request in requests]


def answer(request: bytes) -> bytes | RedoError:
    return RedoError(bytes(18), 1, 1, "poison") if request == b"poison" else request[::-1]


async def gathered(crew: Crew, executor: ThreadPoolExecutor, workers: int = 2) -> RedoGathering:
    return RedoGathering(crew.run_batch, executor, workers)


def test_requests_that_come_together_share_a_batch() -> None:
    crew = Crew()

    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            gathering = await gathered(crew, executor)
            calls = [gathering.redo([b"%d" % number]) for number in range(10)]
            assert await asyncio.gather(*calls) == [[b"%d" % number] for number in range(10)]
            assert await gathering.redo([]) == []

    asyncio.run(run())
    assert [len(batch) for batch in crew.batches] == [10]


def test_what_comes_while_all_are_busy_goes_out_together() -> None:
    crew = Crew()

    async def run() -> None:
        with ThreadPoolExecutor(2) as executor:
            gathering = await gathered(crew, executor)
            crew.gate.clear()
            first = [asyncio.create_task(gathering.redo([b"%d" % at] * BATCH_REQUESTS_MIN)) for at in (1, 2)]
            await asyncio.to_thread(crew.begun.acquire)
            await asyncio.to_thread(crew.begun.acquire)
            later = [asyncio.create_task(gathering.redo([b"%d" % number])) for number in range(300)]
            await asyncio.sleep(0.01)
            assert len(crew.batches) == 2
            crew.gate.set()
            await asyncio.gather(*first, *later)

    asyncio.run(run())
    assert [len(batch) for batch in crew.batches[:3]] == [16, 16, 150]
    assert len(crew.batches) < 12


def test_a_caller_who_goes_takes_nothing_from_the_others() -> None:
    crew = Crew()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            gathering = await gathered(crew, executor, workers=1)
            crew.gate.clear()
            running = asyncio.create_task(gathering.redo([b"ab"]))
            await asyncio.to_thread(crew.begun.acquire)
            goes, stays = (asyncio.create_task(gathering.redo([text] * 3)) for text in (b"cd", b"ef"))
            await asyncio.sleep(0)
            running.cancel()
            goes.cancel()
            await asyncio.sleep(0)
            crew.gate.set()
            assert await stays == [b"fe"] * 3
            assert running.cancelled()
            assert goes.cancelled()
            assert await gathering.redo([b"gh"]) == [b"hg"]

    asyncio.run(run())
    assert crew.batches == [[b"ab"], [b"ef"] * 3, [b"gh"]]


def test_a_page_that_fails_fails_for_its_own_caller_only() -> None:
    crew = Crew()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            gathering = await gathered(crew, executor, workers=1)
            good, bad = await asyncio.gather(gathering.redo([b"ab", b"cd"]), gathering.redo([b"poison"]))
            assert good == [b"ba", b"dc"]
            assert isinstance(bad[0], RedoError)

    asyncio.run(run())
    assert len(crew.batches) == 1


def test_a_batch_that_cannot_be_run_is_an_error_to_all_in_it_and_the_next_one_runs() -> None:
    crew = Crew()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            gathering = await gathered(crew, executor, workers=1)
            crew.error = RedoUnavailableError("none stays alive")
            calls = [gathering.redo([b"ab"]), gathering.redo([b"cd"])]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(outcome, RedoUnavailableError) for outcome in outcomes)
            crew.error = None
            assert await gathering.redo([b"ab"]) == [b"ba"]

    asyncio.run(run())


def test_closing_refuses_what_waits_and_what_comes() -> None:
    crew = Crew()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            gathering = await gathered(crew, executor, workers=1)
            crew.gate.clear()
            running = asyncio.create_task(gathering.redo([b"ab"]))
            await asyncio.to_thread(crew.begun.acquire)
            waiting = asyncio.create_task(gathering.redo([b"cd"]))
            await asyncio.sleep(0)
            gathering.close()
            with pytest.raises(RedoUnavailableError):
                await waiting
            with pytest.raises(RedoUnavailableError):
                await gathering.redo([b"ef"])
            crew.gate.set()
            assert await running == [b"ba"]

    asyncio.run(run())


def test_batches_are_bounded() -> None:
    crew = Crew()

    async def run() -> None:
        with ThreadPoolExecutor(1) as executor:
            gathering = await gathered(crew, executor, workers=1)
            many = [b"x"] * (BATCH_REQUESTS_MAX * 2)
            large = [bytes(BATCH_SIZE_BYTES_MAX // 2)] * 3 + [bytes(BATCH_SIZE_BYTES_MAX * 2)]
            await gathering.redo(many)
            await gathering.redo(large)

    asyncio.run(run())
    assert [len(batch) for batch in crew.batches] == [BATCH_REQUESTS_MAX, BATCH_REQUESTS_MAX, 2, 1, 1]


def test_everyone_gets_their_own() -> None:
    """Calls of all sizes at all moments, some cancelled."""
    crew = Crew()
    chance = random.Random(5)

    async def one(gathering: RedoGathering, number: int) -> None:
        await asyncio.sleep(chance.random() * 0.02)
        requests = [b"%d-%d" % (number, at) for at in range(chance.randrange(1, 60))]
        call = asyncio.create_task(gathering.redo(requests))
        if chance.random() < 0.2:
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            return
        assert await call == [request[::-1] for request in requests]

    async def run() -> None:
        with ThreadPoolExecutor(3) as executor:
            gathering = await gathered(crew, executor, workers=3)
            await asyncio.gather(*(one(gathering, number) for number in range(300)))

    asyncio.run(run())
    assert len(crew.batches) < 300
