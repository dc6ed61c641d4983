"""The WAL receiver on stock PostgreSQL servers in the safekeepers' place: order, loss, and the way back."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from excimer.base.address import Address
from excimer.base.errors import CorruptionError
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.pageserver.receiver_plan import Source
from excimer.pageserver.wal_receiver import WalReceiver
from excimer.pgformat.wal_prefix import wal_segment_file_name
from excimer.service.replication_client import ReplicationClient, connect_replication
from excimer.service.tasks import SystemClock, running
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.plain_postgres import PlainPostgres
from tests.kit.ports import free_port
from tests.kit.static_sources import StaticSources

SEGMENT = 16 << 20
CHUNK_KEPT = 1000


class Recorder:
    """Takes WAL; after each chunk pretends that a record ended a little before its end."""

    def __init__(self, start_lsn: Lsn) -> None:
        self.start_lsn = start_lsn
        self.record_lsn = start_lsn
        self.data = b""
        self.streams = 0
        self.fail_with: Exception | None = None
        self.pause_s = 0.0

    def begin_stream(self) -> Lsn:
        self.streams += 1
        self.data = self.data[: self.record_lsn - self.start_lsn]
        return self.record_lsn

    def ingest(self, start_lsn: Lsn, data: bytes) -> None:
        assert start_lsn == self.start_lsn + len(self.data)
        time.sleep(self.pause_s)
        if self.fail_with is not None:
            raise self.fail_with
        self.data += data
        self.record_lsn = Lsn(max(self.record_lsn, self.start_lsn + len(self.data) - CHUNK_KEPT))

    def positions(self) -> tuple[Lsn, Lsn]:
        return self.record_lsn, INVALID_LSN

    def is_settled(self, lsn: Lsn) -> bool:
        return False


async def connect(address: Address) -> ReplicationClient:
    return await connect_replication(address, user="postgres", application_name="receiver")


@contextlib.asynccontextmanager
async def receiving(recorder: Recorder, sources: list[Source]) -> AsyncIterator[WalReceiver]:
    with ThreadPoolExecutor(1) as executor:
        receiver = WalReceiver(
            consumer=recorder,
            sources=StaticSources(
                connect, lambda: sources, lambda timeout_s: asyncio.sleep(min(timeout_s or 1.0, 0.02))
            ),
            executor=executor,
            clock=SystemClock(),
        )
        async with running("receiver", receiver.run()) as task:
            yield receiver
            task.cancel()


@contextlib.asynccontextmanager
async def stock(configuration: str = "") -> AsyncIterator[PlainPostgres]:
    postgres = PlainPostgres(build_of(NEWEST_VERSION))
    try:
        postgres.create(f"wal_keep_size='1GB'\n{configuration}")
        async with postgres.running():
            yield postgres
    finally:
        postgres.remove()


async def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in 30 s")


async def write_wal(postgres: PlainPostgres, rows: int) -> Lsn:
    async with await postgres.connect() as connection:
        await connection.execute("create table if not exists t (a int, b text)")
        await connection.execute(
            "insert into t select g, repeat('x', 100) from generate_series(1, %s) g", [rows]
        )
    return await postgres.flush_lsn()


def wal_of(data_dir: Path, start_lsn: Lsn, end_lsn: Lsn) -> bytes:
    """What the server has on disk."""
    parts = []
    at = int(start_lsn)
    while at < end_lsn:
        number = at // SEGMENT
        size = min(end_lsn - at, SEGMENT - at % SEGMENT)
        path = data_dir / "pg_wal" / wal_segment_file_name(Lsn(number * SEGMENT), SEGMENT)
        parts.append(path.read_bytes()[at % SEGMENT :][:size])
        at += size
    return b"".join(parts)


def source(postgres: PlainPostgres, commit_lsn: int = 0) -> Source:
    return Source(Address(str(postgres.root), postgres.port), Lsn(commit_lsn))


def test_wal_arrives_in_order_over_segments_and_after_the_server_was_killed() -> None:
    async def story() -> None:
        async with stock() as postgres:
            recorder = Recorder(await postgres.flush_lsn())
            end_lsn = await write_wal(postgres, 110_000)
            dead = Source(Address("127.0.0.1", free_port()), Lsn(1 << 60))
            async with receiving(recorder, [dead, source(postgres)]) as receiver:
                await until(lambda: recorder.start_lsn + len(recorder.data) >= end_lsn)
                assert end_lsn - recorder.start_lsn > SEGMENT
                assert recorder.data.startswith(wal_of(postgres.data_dir, recorder.start_lsn, end_lsn))
                assert receiver.source == source(postgres).address
                assert postgres.process is not None
                await postgres.process.kill()
                await until(lambda: receiver.source is None)
                async with postgres.running():
                    end_lsn = await write_wal(postgres, 100)
                    await until(lambda: recorder.start_lsn + len(recorder.data) >= end_lsn)
                    assert recorder.streams >= 2
                    assert recorder.data.startswith(wal_of(postgres.data_dir, recorder.start_lsn, end_lsn))

    asyncio.run(story())


def test_a_slow_consumer_holds_the_stream_back_and_loses_nothing() -> None:
    async def story() -> None:
        async with stock() as postgres:
            recorder = Recorder(await postgres.flush_lsn())
            recorder.pause_s = 0.2
            end_lsn = await write_wal(postgres, 80_000)
            async with receiving(recorder, [source(postgres)]):
                await until(lambda: recorder.start_lsn + len(recorder.data) >= end_lsn)
            assert recorder.streams == 1
            assert recorder.data.startswith(wal_of(postgres.data_dir, recorder.start_lsn, end_lsn))

    asyncio.run(story())


def test_wal_that_cannot_be_understood_ends_the_receiver() -> None:
    async def story() -> None:
        async with stock() as postgres:
            recorder = Recorder(await postgres.flush_lsn())
            recorder.fail_with = CorruptionError("a record's checksum is wrong")
            await write_wal(postgres, 10)
            with pytest.raises(CorruptionError, match="checksum"):
                async with receiving(recorder, [source(postgres)]):
                    await asyncio.sleep(20)

    asyncio.run(story())
