"""Which safekeepers are missing is known while an election waits for them, whatever way they are away."""

import asyncio
import time

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


async def elect_without(addresses: list[str], words: list[str]) -> str:
    """The first sentence with all the words; the election itself must not come to an end."""
    proposer = Proposer(
        tenant_id=parse_tenant_id("a" * 32),
        timeline_id=parse_timeline_id("b" * 32),
        safekeepers=addresses,
        token="",
    )
    election = asyncio.ensure_future(proposer.elect())
    deadline = time.monotonic() + LIMIT_S
    try:
        while True:
            said = proposer.missing_majority() or ""
            if all(word in said for word in words):
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
        async def keep_quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(4096):
                pass
            writer.close()

        async with await asyncio.start_server(keep_quiet, HOST, 0) as mute:
            quiet = f"{HOST}:{mute.sockets[0].getsockname()[1]}"
            gone = [f"{HOST}:{free_port()}" for _ in range(2)]
            said = await elect_without([quiet, *gone], [f"safekeeper {each} does" for each in [quiet, *gone]])
            assert said.startswith("a majority of safekeepers: safekeeper ")

    asyncio.run(run())


def test_what_is_waited_for_is_looked_up_when_somebody_asks() -> None:
    health = Health("compute")
    health.on_ask = lambda: health.report("start", "waits for a majority of safekeepers")
    assert not health.problems
    status, body = health.answer()
    assert status == 503
    assert b"waits for a majority" in body
    assert AWAITED_NOTICE_S < EARLY_WORD_S, "it is there when the command line asks"
