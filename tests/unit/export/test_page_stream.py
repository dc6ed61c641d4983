"""Reading many files' pages: in order whatever the order of answers, again after losses, bounded."""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from excimer.base.errors import ExcimerError, RefusedError
from excimer.base.ids import new_tenant_id, new_timeline_id
from excimer.base.keys import BLOCK_SIZE_BYTES, Relation, relation_block_key
from excimer.base.lsn import Lsn
from excimer.export.layout import PageFile, page_runs
from excimer.export.page_stream import (
    IN_FLIGHT_MAX,
    BranchAccess,
    PageserverUnreachableError,
    PageStream,
    RunRequest,
    read_files,
)
from excimer.export.reading_token import NewToken, ReadingToken
from excimer.wire.page_service import ErrorCode, Pages, encode_server_message
from tests.kit.fake_page_server import FakePageServer

LSN = Lsn(0x1000)
BLOCKS = (3, 40, 1, 17, 200, 5)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakePageServer]:
    (tmp_path / "base/5").mkdir(parents=True)
    chance = random.Random(1)
    for number, blocks in enumerate(BLOCKS):
        (tmp_path / f"base/5/{number}").write_bytes(chance.randbytes(blocks * BLOCK_SIZE_BYTES))
    with FakePageServer(tmp_path) as running:
        running.behaviour.blocks_max = 8
        yield running


def _files() -> list[PageFile]:
    return [
        PageFile(f"base/5/{number}", relation_block_key(Relation(1663, 5, number), 0, 0), blocks)
        for number, blocks in enumerate(BLOCKS)
    ]


def _access(address: str, token: ReadingToken | None = None) -> BranchAccess:
    chance = random.Random(2)
    token = token or ReadingToken(NewToken("token", 60.0))
    return BranchAccess(new_tenant_id(chance), new_timeline_id(chance), address, "unused:1", token)


async def _read(
    server: FakePageServer, *, patience_s: float = 20.0, token: ReadingToken | None = None
) -> dict[str, bytes]:
    """The files' content, as pieces came; their order is checked."""
    found: dict[str, bytes] = {}
    stream = read_files(_access(server.address, token), LSN, _files(), patience_s=patience_s)
    async for file, data in stream:
        assert file.path not in found or file.path == list(found)[-1], "a file came in two parts"
        found[file.path] = found.get(file.path, b"") + data
    return found


def _expected(server: FakePageServer) -> dict[str, bytes]:
    return {file.path: (server.pages_dir / file.path).read_bytes() for file in _files()}


def test_pages_come_in_order_whatever_the_order_of_answers(server: FakePageServer) -> None:
    server.behaviour.reverse_batches = True
    found = asyncio.run(_read(server))
    assert found == _expected(server)
    assert list(found) == [file.path for file in _files()]
    assert {request.lsn for request in server.requests} == {LSN}


def test_a_connection_that_is_lost_comes_back_with_the_newest_token(server: FakePageServer) -> None:
    token = ReadingToken(NewToken("first", 60.0))
    server.behaviour.cut_after_bytes = 5000

    def renew() -> None:
        while not server.hellos:
            time.sleep(0.01)
        token.text = "second"
        while server.hellos[-1].token != "second":
            time.sleep(0.01)
        server.behaviour.cut_after_bytes = None

    async def both() -> dict[str, bytes]:
        found, _ = await asyncio.gather(_read(server, token=token), asyncio.to_thread(renew))
        return found

    assert asyncio.run(asyncio.wait_for(both(), 60)) == _expected(server)
    assert [hello.token for hello in server.hellos] == sorted(hello.token for hello in server.hellos)


def test_errors_that_may_pass_and_lost_connections_cost_only_time(server: FakePageServer) -> None:
    server.behaviour.error = (ErrorCode.RETRYABLE, "not yet")
    server.behaviour.errors_left = 3
    assert asyncio.run(_read(server)) == _expected(server)

    connections = len(server.hellos)
    server.behaviour.cut_after_bytes = 5000

    def heal() -> None:
        while len(server.hellos) < connections + 2:
            time.sleep(0.01)
        server.behaviour.cut_after_bytes = None

    async def both() -> dict[str, bytes]:
        found, _ = await asyncio.gather(_read(server), asyncio.to_thread(heal))
        return found

    assert asyncio.run(both()) == _expected(server)


def test_what_is_refused_is_not_asked_for_again(server: FakePageServer) -> None:
    server.behaviour.error = (ErrorCode.REFUSED, "too old")
    with pytest.raises(RefusedError, match="too old"):
        asyncio.run(_read(server))
    assert len(server.hellos) == 1


def test_runs_of_different_moments_are_answered_each_for_itself(server: FakePageServer) -> None:
    """What is refused of one is its answer, and the others go on."""
    server.behaviour.error = (ErrorCode.REFUSED, "there is no such page")
    server.behaviour.errors_left = 1
    files = _files()

    def requests(blocks_max: int) -> Iterator[RunRequest[str]]:
        for number, file in enumerate(files):
            run = next(page_runs(file, blocks_max))
            yield RunRequest(file.path, run, Lsn(LSN + 8 * number))

    async def all_answers() -> list[tuple[str, bytes | ExcimerError]]:
        return [pair async for pair in PageStream[str](_access(server.address)).read(requests)]

    answers = asyncio.run(all_answers())
    assert [path for path, _ in answers] == [file.path for file in files]
    (refused,) = [answer for _, answer in answers if not isinstance(answer, bytes)]
    assert "no such page" in str(refused)
    expected = _expected(server)
    assert all(expected[path].startswith(answer) for path, answer in answers if isinstance(answer, bytes))
    assert {request.lsn - LSN for request in server.requests} == {8 * number for number in range(len(files))}
    assert len(server.hellos) == 1


def test_a_pageserver_that_stays_away_is_given_up(server: FakePageServer) -> None:
    server.close()
    with pytest.raises(PageserverUnreachableError, match="cannot be reached"):
        asyncio.run(_read(server, patience_s=0.0))


def test_an_answer_of_the_wrong_size_is_no_answer(server: FakePageServer) -> None:
    server.behaviour.garbage = encode_server_message(Pages(1, bytes(BLOCK_SIZE_BYTES)))
    with pytest.raises(RefusedError, match="another number of pages"):
        asyncio.run(_read(server))


def test_what_is_asked_ahead_is_bounded(server: FakePageServer) -> None:
    """A consumer that takes one piece and no more makes nobody read the rest."""

    async def one() -> int:
        pieces = read_files(_access(server.address), LSN, _files())
        async with aclosing(pieces):
            await anext(pieces)
            await asyncio.sleep(0.2)
            return len(server.requests)

    assert asyncio.run(one()) <= IN_FLIGHT_MAX + 1
    assert sum(-(-blocks // 8) for blocks in BLOCKS) > IN_FLIGHT_MAX + 1


def test_runs_cover_a_file_once() -> None:
    file = PageFile("base/5/1.1", relation_block_key(Relation(1663, 5, 1), 0, 131_072), 20)
    runs = list(page_runs(file, 8))
    assert [run.blocks for run in runs] == [8, 8, 4]
    assert [int.from_bytes(run.key[-4:], "big") for run in runs] == [131_072, 131_080, 131_088]
