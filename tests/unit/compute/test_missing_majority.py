"""Which safekeepers are missing is known while an election waits for them, whatever way they are away."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from excimer.base.ids import parse_tenant_id, parse_timeline_id
from excimer.cli.service_silence import EARLY_WORD_S
from excimer.compute import safekeeper_peer
from excimer.compute.attempt import AWAITED_NOTICE_S
from excimer.compute.proposer import Proposer
from excimer.service.health import Health
from tests.kit.ports import free_port

LIMIT_S = 60
HOST = "127.0.0.1"


@contextlib.asynccontextmanager
async def answering(word: bytes) -> AsyncIterator[str]:
    """The address of somebody who takes connections and answers each with `word` and nothing more."""
    handlers: set[asyncio.Task[object]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            await reader.read(4096)
            writer.write(word)
            while await reader.read(4096):
                pass
        finally:
            writer.close()

    async with await asyncio.start_server(answer, HOST, 0) as server:
        yield f"{HOST}:{server.sockets[0].getsockname()[1]}"
    await asyncio.wait(handlers, timeout=LIMIT_S)


async def elect_without(addresses: list[str], words: list[str], without: str = "-") -> str:
    """The first sentence with all the words and without another, 0.3 s after the start or later.

    The election itself must not come to an end.
    """
    proposer = Proposer(
        tenant_id=parse_tenant_id("a" * 32),
        timeline_id=parse_timeline_id("b" * 32),
        safekeepers=addresses,
        token="",
    )
    election = asyncio.ensure_future(proposer.elect())
    begun = time.monotonic()
    deadline = begun + LIMIT_S
    try:
        while True:
            said = proposer.missing_majority() or ""
            is_later = time.monotonic() > begun + 0.3
            if is_later and all(word in said for word in words) and without not in said:
                return said
            assert time.monotonic() < deadline, f"never said: {words}; said: {said!r}"
            assert not election.done()
            await asyncio.sleep(0.01)
    finally:
        election.cancel()
        await asyncio.gather(election, return_exceptions=True)
        proposer.close()


def test_those_that_refuse_connections_and_those_that_never_speak_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(safekeeper_peer, "GREETING_S_MAX", 0.1)
    monkeypatch.setattr(safekeeper_peer, "SILENT_S_MAX", 0.5)

    async def run() -> None:
        async with answering(b"") as quiet:
            gone = [f"{HOST}:{free_port()}" for _ in range(2)]
            said = await elect_without([quiet, *gone], [f"safekeeper {each} does" for each in [quiet, *gone]])
            assert said.startswith("a majority of safekeepers: safekeeper ")

    asyncio.run(run())


def test_one_that_has_spoken_is_not_missed_while_there_is_no_election(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is said to it then, so it has nothing to answer."""
    monkeypatch.setattr(safekeeper_peer, "GREETING_S_MAX", 0.1)
    monkeypatch.setattr(safekeeper_peer, "ANSWER_S_MAX", 0.1)

    async def run() -> None:
        async with answering(b"\0") as there:  # the beginning of a message
            gone = [f"{HOST}:{free_port()}" for _ in range(2)]
            await elect_without([there, *gone], [f"safekeeper {each} does" for each in gone], without=there)

    asyncio.run(run())


def test_what_is_waited_for_is_looked_up_when_somebody_asks() -> None:
    health = Health("compute")
    health.on_ask = lambda: health.report("start", "waits for a majority of safekeepers")
    assert not health.problems
    status, body = health.answer()
    assert status == 503
    assert b"waits for a majority" in body
    assert AWAITED_NOTICE_S < EARLY_WORD_S, "it is there when the command line asks"
