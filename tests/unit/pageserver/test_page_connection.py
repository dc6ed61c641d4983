"""The page service on a real socket, over a timeline in memory."""

import asyncio
import contextlib
import math
import random
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from prometheus_client import CollectorRegistry

from excimer.base.address import Address
from excimer.base.errors import ExcimerError, NotFoundError, RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId, new_tenant_id, new_timeline_id
from excimer.base.keys import KeyKind, Relation, relation_block_key, relation_size_key
from excimer.base.lsn import Lsn
from excimer.compute.position_client import PositionClient
from excimer.pageserver.endpoints import page_connection
from excimer.pageserver.endpoints.page_connection import PageService
from excimer.pageserver.metrics import PageServiceMetrics
from excimer.service.connections import ConnectionLimits
from excimer.service.listen import bind_listen, bound_address
from excimer.service.tasks import TaskScope, running
from excimer.wire.auth import AuthError, Right, TokenVerifier, generate_key_pair
from excimer.wire.page_service import (
    BLOCKS_MAX,
    NEWEST_LSN,
    ErrorAnswer,
    ErrorCode,
    GetPages,
    Hello,
    HelloOk,
    Pages,
    encode_client_message,
)
from tests.kit.memory_timeline import MemoryTimeline
from tests.kit.page_client import PageClient, connect_pages
from tests.kit.tokens import make_token

KEYS = generate_key_pair()
TENANT = new_tenant_id(random.Random(1))
OTHER_TENANT = new_tenant_id(random.Random(2))
TIMELINE = new_timeline_id(random.Random(3))
RELATION = Relation(1663, 5, 16384)
KEY = (KeyKind.RELATION_BLOCK, *RELATION, 0, 0)
BLOCKS = 600
TOKEN = make_token(KEYS, Right.READ_PAGES, tenant_id=TENANT, timeline_id=TIMELINE)


class Served(MemoryTimeline):
    """With what the pageserver adds to the store."""

    def record_end(self, lsn: int) -> Lsn:
        return Lsn(lsn - 24 if lsn % 8192 == 24 else lsn)

    async def basebackup(self, lsn: Lsn) -> bytes:
        return b"backup at %d" % lsn


class World:
    """A server, its timeline, and whether the timeline is known."""

    def __init__(self, timeline: Served, address: Address) -> None:
        self.timeline = timeline
        self.address = address

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[PageClient]:
        async with connect_pages(self.address) as client:
            await client.hello(TENANT, TIMELINE, TOKEN)
            yield client


def page(block: int, lsn: int) -> bytes:
    return struct.pack("<II", block, lsn) * 1024


@contextlib.asynccontextmanager
async def world(
    lsn_wait_timeout_s: float = 0.2, limits: ConnectionLimits | None = None
) -> AsyncIterator[World]:
    timeline = Served(TENANT, TIMELINE)
    timeline.put(relation_size_key(RELATION, 0), 0x100, BLOCKS.to_bytes(4, "little"))
    for block in range(BLOCKS):
        timeline.put(relation_block_key(RELATION, 0, block), 0x100, page(block, 0x100))
    timeline.put(relation_block_key(RELATION, 0, 0), 0x200, page(0, 0x200))
    await timeline.advance(0x200)

    def find(tenant_id: TenantId, timeline_id: TimelineId) -> Served:
        if (tenant_id, timeline_id) != (TENANT, TIMELINE):
            raise NotFoundError(f"no timeline {timeline_id} here")
        return timeline

    async with TaskScope() as scope:
        bound = bind_listen("127.0.0.1:0", "test")
        service = PageService(
            find_timeline=find,
            verifier=TokenVerifier(KEYS.public_pem),
            spawn=scope.contain,
            metrics=PageServiceMetrics(CollectorRegistry()),
            lsn_wait_timeout_s=lsn_wait_timeout_s,
            limits=limits,
        )
        with bound:
            async with running("page service", service.serve(bound)):
                yield World(timeline, bound_address(bound))
        service.close_all()


Story = Callable[[World], Awaitable[None]]


def play(story: Story, lsn_wait_timeout_s: float = 0.2, limits: ConnectionLimits | None = None) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), world(lsn_wait_timeout_s, limits) as made:
            await story(made)

    asyncio.run(run())


def test_pages_at_the_newest_and_at_an_exact_lsn() -> None:
    async def story(world: World) -> None:
        async with world.client() as client:
            assert await client.get_pages(KEY, 1) == page(0, 0x200)
            assert await client.get_pages(KEY, 2, lsn=0x1F8) == page(0, 0x100) + page(1, 0x100)
            assert await client.get_pages(KEY, BLOCKS_MAX, lsn=0x200, since=0x200) == b"".join(
                page(block, 0x200 if block == 0 else 0x100) for block in range(BLOCKS_MAX)
            )

    play(story)


@pytest.mark.parametrize("lsn", [0x300, NEWEST_LSN])
def test_a_request_waits_for_its_lsn(lsn: int) -> None:
    async def story(world: World) -> None:
        async with world.client() as client:
            client.send(GetPages(7, lsn, 0x300, 0, 0, *RELATION, 0, 1))
            await asyncio.sleep(0.05)
            world.timeline.put(relation_block_key(RELATION, 0, 0), 0x300, page(0, 0x300))
            await world.timeline.advance(0x300)
            assert await client.receive() == Pages(7, page(0, 0x300))

    play(story, lsn_wait_timeout_s=20)


def test_an_lsn_behind_a_wal_page_header_is_the_record_end_before_it() -> None:
    async def story(world: World) -> None:
        await world.timeline.advance(8192)
        async with world.client() as client:
            await client.get_pages(KEY, 1, since=8192 + 24)
            await client.get_pages(KEY, 1, lsn=8192 + 24)
        assert [lsn for _, _, lsn in world.timeline.reads] == [8192, 8192]

    play(story)


def test_an_lsn_that_does_not_come_is_a_retryable_error_that_names_what_is_there() -> None:
    async def story(world: World) -> None:
        async with world.client() as client:
            with pytest.raises(RetryableError, match=r"0/300 .* newest is 0/200"):
                await client.get_pages(KEY, 1, lsn=0x300)
            assert await client.get_pages(KEY, 1) == page(0, 0x200)

    play(story)


@pytest.mark.parametrize("count", [0, BLOCKS_MAX + 1, 2**32 - 1])
def test_a_wrong_number_of_blocks_is_refused_and_the_connection_stays(count: int) -> None:
    async def story(world: World) -> None:
        async with world.client() as client:
            with pytest.raises(RefusedError, match="1 to 256"):
                await client.get_pages(KEY, count)
            assert await client.get_pages(KEY, 1)

    play(story)


def test_blocks_beyond_the_relation_are_refused() -> None:
    async def story(world: World) -> None:
        async with world.client() as client:
            with pytest.raises(RefusedError, match="relation block 1663/5/16384 main 599"):
                await client.get_pages((*KEY[:5], BLOCKS - 1), 2)

    play(story)


def test_how_far_it_is_asked_again_and_again() -> None:
    async def story(world: World) -> None:
        client = PositionClient(str(world.address), TENANT, TIMELINE, TOKEN)
        assert [await client.position() for _ in range(2)] == [0x200, 0x200]
        await world.timeline.advance(0x300)
        assert await client.position() == 0x300
        client.close()
        stranger = PositionClient(str(world.address), TENANT, TimelineId("ee" * 16), TOKEN)
        with pytest.raises(ExcimerError):
            await stranger.position()
        stranger.close()

    play(story)


def test_basebackup() -> None:
    async def story(world: World) -> None:
        async with connect_pages(world.address) as client:
            hello = encode_client_message(Hello(TENANT, TIMELINE, TOKEN))
            body = struct.pack("<IBQQ", 17, ord("B"), 1, 0x200)
            client.writer.write(hello + body)  # both at once, as a client in a hurry does
            assert await client.receive() == HelloOk(BLOCKS_MAX)
            answer = await client.receive()
            assert getattr(answer, "compressed", None) == b"backup at 512"

    play(story)


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (Hello(TENANT, TIMELINE, "nonsense"), "not one of this installation"),
        (
            Hello(TENANT, TIMELINE, make_token(KEYS, Right.READ_PAGES, tenant_id=OTHER_TENANT)),
            "another tenant",
        ),
        (
            Hello(TENANT, TIMELINE, make_token(KEYS, Right.MANAGE, Right.READ_WAL)),
            "does not have the right read_pages",
        ),
        (Hello(TENANT, TimelineId("0" * 32), TOKEN), "another timeline"),
        (
            Hello(TENANT, TimelineId("0" * 32), make_token(KEYS, Right.READ_PAGES, tenant_id=TENANT)),
            "no timeline 0000",
        ),
        (Hello(TENANT, TIMELINE, TOKEN, version=2), "version 2"),
    ],
)
def test_a_hello_that_grants_nothing_is_answered_and_closed(hello: Hello, why: str) -> None:
    async def story(world: World) -> None:
        async with connect_pages(world.address) as client:
            client.send(hello)
            answer = await client.receive()
            assert isinstance(answer, ErrorAnswer)
            assert (answer.request_id, answer.code) == (0, ErrorCode.REFUSED)
            assert why in answer.text
            with pytest.raises(EOFError):
                await client.receive()
        assert world.timeline.reads == []

    play(story)


def test_an_expired_token_is_answered_so_that_a_newer_one_is_tried() -> None:
    async def story(world: World) -> None:
        async with connect_pages(world.address) as client:
            token = make_token(KEYS, Right.READ_PAGES, tenant_id=TENANT, timeline_id=TIMELINE, exp=1)
            client.send(Hello(TENANT, TIMELINE, token))
            answer = await client.receive()
            assert isinstance(answer, ErrorAnswer)
            assert (answer.code, "expired" in answer.text) == (ErrorCode.RETRYABLE, True)
            with pytest.raises(EOFError):
                await client.receive()

    play(story)


def test_a_token_that_runs_out_under_a_connection_ends_it_at_its_next_request() -> None:
    async def story(world: World) -> None:
        async with connect_pages(world.address) as client:
            expires = math.ceil(time.time()) + 1
            token = make_token(KEYS, Right.READ_PAGES, tenant_id=TENANT, timeline_id=TIMELINE, exp=expires)
            await client.hello(TENANT, TIMELINE, token)
            client.send(GetPages(1, 0x200, 0, 0, 0, *RELATION, 0, 1))
            assert isinstance(await client.receive(), Pages)
            await asyncio.sleep(expires - time.time() + 0.01)
            client.send(GetPages(2, 0x200, 0, 0, 0, *RELATION, 0, 1))
            answer = await client.receive()
            assert isinstance(answer, ErrorAnswer)
            assert (answer.request_id, answer.code) == (0, ErrorCode.RETRYABLE)
            with pytest.raises(EOFError):
                await client.receive()

    play(story)


def test_requests_before_hello_are_refused() -> None:
    async def story(world: World) -> None:
        async with connect_pages(world.address) as client:
            with pytest.raises(RefusedError, match="first message must be Hello"):
                await client.get_pages(KEY, 1)
            with pytest.raises(EOFError):
                await client.receive()

    play(story)


def test_garbage_closes_its_own_connection_only() -> None:
    async def story(world: World) -> None:
        chance = random.Random(5)
        async with world.client() as healthy:
            for _ in range(40):
                async with connect_pages(world.address) as client:
                    if chance.random() < 0.5:
                        await client.hello(TENANT, TIMELINE, TOKEN)
                    client.writer.write(b"\xff" * 5 + chance.randbytes(chance.randrange(0, 3000)))
                    with contextlib.suppress(ConnectionError, EOFError):
                        while True:
                            await client.receive()
            assert await healthy.get_pages(KEY, 1) == page(0, 0x200)

    play(story)


def test_a_truncated_frame_and_a_vanishing_peer_leave_nothing_behind() -> None:
    async def story(world: World) -> None:
        whole = encode_client_message(GetPages(1, NEWEST_LSN, 0, 0, 0, *RELATION, 0, 1))
        for size in range(0, len(whole), 7):
            async with world.client() as client:
                client.writer.write(whole[:size])
        async with world.client() as client:
            world.timeline.gate.clear()
            client.writer.write(whole)
            await asyncio.sleep(0.05)
        world.timeline.gate.set()
        async with world.client() as client:
            assert await client.get_pages(KEY, 1)

    play(story)


def test_concurrency_of_one_connection_is_bounded_and_all_are_answered() -> None:
    async def story(world: World) -> None:
        async with world.client() as client:
            world.timeline.gate.clear()
            for number in range(200):
                client.send(GetPages(number + 1, NEWEST_LSN, 0, 0, 0, *RELATION, number, 1))
            await asyncio.sleep(0.1)
            assert world.timeline.reading == page_connection.REQUESTS_IN_FLIGHT_MAX
            world.timeline.gate.set()
            answers = [await client.receive() for _ in range(200)]
            assert {answer.request_id for answer in answers if isinstance(answer, Pages)} == set(
                range(1, 201)
            )
            assert world.timeline.reading_most == page_connection.REQUESTS_IN_FLIGHT_MAX

    play(story)


def test_what_can_be_answered_at_once_is_answered_at_once() -> None:
    """All of it, with errors between, also behind a request that waits; the connection stays in order."""

    async def story(world: World) -> None:
        world.timeline.at_once = True
        async with world.client() as client:
            client.send(GetPages(1, NEWEST_LSN, 0x208, 0, 0, *RELATION, 0, 1))
            for number in range(2, 300):
                count = 0 if number % 50 == 0 else 1
                client.send(GetPages(number, NEWEST_LSN, 0, 0, 0, *RELATION, number, count))
            answers = [await client.receive() for _ in range(299)]
            assert {answer.request_id for answer in answers if isinstance(answer, ErrorAnswer)} == {
                1,
                *range(50, 300, 50),
            }
            found = {answer.request_id: answer.pages for answer in answers if isinstance(answer, Pages)}
            assert found == {number: page(number, 0x100) for number in range(2, 300) if number % 50}
            assert world.timeline.reading_most == 0

    play(story)


def test_requests_that_reach_across_reads_of_the_socket_are_answered_in_order() -> None:
    blocks = [(number * 7) % BLOCKS for number in range(3000)]

    async def story(world: World) -> None:
        async with world.client() as client:
            requests = [GetPages(at, 0x200, 0, 0, 0, *RELATION, block, 1) for at, block in enumerate(blocks)]
            data = b"".join(map(encode_client_message, requests))
            assert len(data) > 8 * page_connection.RECEIVE_BUFFER_BYTES
            client.writer.write(data)
            for at, block in enumerate(blocks):
                assert await client.receive() == Pages(at, page(block, 0x100 if block else 0x200))

    play(story)


def test_a_busy_connection_lets_others_have_their_turn() -> None:
    async def story(world: World) -> None:
        world.timeline.at_once = True
        async with world.client() as busy, world.client() as other:
            for number in range(2000):
                busy.send(GetPages(number + 1, NEWEST_LSN, 0, 0, 0, *RELATION, 0, 4))
            await asyncio.sleep(0)
            assert await other.get_pages(KEY, 1)
            assert len(world.timeline.reads) < 1000
            for _ in range(2000):
                assert isinstance(await busy.receive(), Pages)

    play(story)


def test_a_defect_in_an_answer_at_once_drops_the_connection_and_not_the_service() -> None:
    async def story(world: World) -> None:
        world.timeline.at_once = True
        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: failures.append(context["exception"])
        )

        def broken(key: bytes, count: int, lsn: Lsn) -> bytes:
            raise ZeroDivisionError

        working = world.timeline.start_read
        world.timeline.start_read = broken  # type: ignore[method-assign]
        async with world.client() as client:
            with pytest.raises((EOFError, ConnectionError)):
                await client.get_pages(KEY, 1)
        assert [type(failure) for failure in failures] == [ZeroDivisionError]
        world.timeline.start_read = working  # type: ignore[method-assign]
        async with world.client() as client:
            assert await client.get_pages(KEY, 1)

    play(story)


async def reads_begun_after_a_while(world: World, other: PageClient) -> int:
    """Large ones. While another client is served many times, the event loop has turned for all."""
    for _ in range(100):
        await other.get_pages(KEY, 1)
    return sum(count == BLOCKS_MAX for _, count, _ in world.timeline.reads)


def test_a_slow_reader_stops_the_work_for_it_and_gets_everything_later() -> None:
    async def story(world: World) -> None:
        async with world.client() as client, world.client() as other:
            count = 100
            for number in range(count):
                client.send(GetPages(number + 1, NEWEST_LSN, 0, 0, 0, *RELATION, 0, BLOCKS_MAX))
            begun = [await reads_begun_after_a_while(world, other) for _ in range(2)]
            assert 0 < begun[0] == begun[1] < count // 2
            answers = [await client.receive() for _ in range(count)]
            assert all(
                isinstance(answer, Pages) and len(answer.pages) == BLOCKS_MAX * 8192 for answer in answers
            )

    play(story)


def test_many_connections_at_once() -> None:
    async def story(world: World) -> None:
        async def one(number: int) -> None:
            async with world.client() as client:
                for block in range(number, number + 20):
                    assert (await client.get_pages((*KEY[:5], block), 1, lsn=0x100)) == page(block, 0x100)

        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(one(number))

    play(story)


def test_a_defect_in_a_read_drops_the_connection_and_not_the_service() -> None:
    class Broken(Exception):
        pass

    async def story(world: World) -> None:
        async def broken(key: bytes, count: int, lsn: Lsn) -> bytes:
            raise Broken

        working = world.timeline.get_pages
        world.timeline.get_pages = broken  # type: ignore[method-assign]
        async with world.client() as client:
            with pytest.raises((EOFError, ConnectionError)):
                await client.get_pages(KEY, 1)
        world.timeline.get_pages = working  # type: ignore[method-assign]
        async with world.client() as client:
            assert await client.get_pages(KEY, 1)

    play(story)


def test_unauthenticated_connections_do_not_stay() -> None:
    async def story(world: World) -> None:
        async with connect_pages(world.address) as client:
            with pytest.raises((EOFError, ConnectionError)):
                await client.receive()

    play(story, limits=ConnectionLimits(handshake_s=0.05))


def test_connections_are_bounded_and_strangers_leave_computes_alone() -> None:
    async def story(world: World) -> None:
        async with world.client() as first, world.client() as second:
            strangers = [await asyncio.open_connection(*world.address) for _ in range(20)]
            assert await first.get_pages(KEY, 1)
            with pytest.raises(RetryableError, match="page_service_listen has 2 connections"):
                async with world.client():
                    raise AssertionError("a third connection was accepted")
            assert await second.get_pages(KEY, 1)
            for _, writer in strangers:
                writer.close()
        while True:  # until the server has seen that the two have gone
            with contextlib.suppress(RetryableError, EOFError):
                async with world.client() as third:
                    assert await third.get_pages(KEY, 1)
                    return

    play(story, limits=ConnectionLimits(authenticated_max=2, waiting_max=4))


def test_auth_error_is_a_refusal() -> None:
    assert issubclass(AuthError, RefusedError)
