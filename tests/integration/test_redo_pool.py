"""The pool with real workers: order, damage, kills, silence, restarts."""

import asyncio
import contextlib
import os
import signal
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from excimer.base.errors import CorruptionError
from excimer.base.ids import TenantId
from excimer.base.keys import BLOCK_SIZE_BYTES, Relation, relation_block_key
from excimer.pgformat.wal_record import Rmgr, record_crc
from excimer.postgres import redo_extension
from excimer.postgres.redo_template import redo_control_file
from excimer.storage.engine.redo_pool import RedoError, RedoPool, RedoUnavailableError
from excimer.storage.engine.redo_worker import LOG_SIZE_MAX, RedoWorker, RedoWorkerError
from excimer.wire.redo import REQUEST_HEAD, STATISTICS_REQUEST, encode_redo_request
from tests.kit.builds import ALL_VERSIONS, NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory

TENANT = TenantId("0a" * 16)
RELATION = Relation(1663, 5, 16384)
FLAG_WILL_INIT, FLAG_HAS_DATA = 0x40, 0x20
HEAP_INSERT, HEAP_INIT_PAGE = 0x00, 0x80
START, END = 0x100_0028, 0x100_0080


@contextlib.asynccontextmanager
async def open_pool(
    version: int = NEWEST_VERSION, workers: int = 2, **options: float
) -> AsyncIterator[RedoPool]:
    with reachable_directory() as root:
        pool = RedoPool(build_of(version), root / "scratch", workers, **options)  # type: ignore[arg-type]
        try:
            yield pool
        finally:
            await pool.close()
        assert not list((root / "scratch").glob("*/*")), "workers left their directories behind"


def plain_page(number: int) -> bytes:
    return struct.pack("<Q", number) * (BLOCK_SIZE_BYTES // 8)


def plain_request(number: int) -> bytes:
    """A request that changes nothing: its answer is its base."""
    return encode_redo_request(RELATION, 0, number, plain_page(number), [])


def insert_record(block: int, *, offset: int = 1, init: bool = True, rmgr: int = Rmgr.HEAP) -> bytes:
    """A heap insert of a 32-byte tuple at line pointer `offset`."""
    block_data = struct.pack("<HHB", 1, 0x0800, 24) + bytes(1) + b"excimer!"
    flags = FLAG_HAS_DATA | (FLAG_WILL_INIT if init else 0)
    body = struct.pack("<BBHIIII", 0, flags, len(block_data), *RELATION, block)
    main = struct.pack("<HB", offset, 0)
    body += bytes([255, len(main)]) + block_data + main
    info = HEAP_INSERT | (HEAP_INIT_PAGE if init else 0)
    record = struct.pack("<IIQBB2xI", 24 + len(body), 700, 0, info, rmgr, 0) + body
    return record[:20] + struct.pack("<I", record_crc(record)) + record[24:]


def insert_request(block: int, *records: bytes) -> bytes:
    """The last record is at START to END, the others right before it."""
    size = END - START
    first = START - size * (len(records) - 1)
    starts = [first + size * index for index in range(len(records))]
    chain = [(start, start + size, record) for start, record in zip(starts, records, strict=True)]
    return encode_redo_request(RELATION, 0, block, None, chain)


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_a_record_makes_a_page(version: int) -> None:
    async def scenario() -> None:
        async with open_pool(version) as pool:
            (page,) = await pool.redo([insert_request(7, insert_record(7))], TENANT)
            assert isinstance(page, bytes)
            assert struct.unpack_from("<II", page) == (END >> 32, END & 0xFFFFFFFF)
            assert page.endswith(b"excimer!")

    asyncio.run(scenario())


def test_answers_come_in_the_order_of_requests() -> None:
    async def one(pool: RedoPool, first: int, count: int) -> None:
        numbers = range(first, first + count)
        assert await pool.redo([plain_request(number) for number in numbers], TENANT) == [
            plain_page(number) for number in numbers
        ]

    async def scenario() -> None:
        async with open_pool() as pool:
            async with asyncio.TaskGroup() as group:
                for index, count in enumerate((1, 3, 700, 16, 17, 1, 300, 40, 2, 1000, 5, 64)):
                    group.create_task(one(pool, index * 10_000, count), name=f"ask-{index}")
            assert pool.supervisor.started <= 2

    asyncio.run(scenario())


def damaged(record: bytes, at: int) -> bytes:
    return record[:at] + bytes([record[at] ^ 0x10]) + record[at + 1 :]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"garbage" * 20, "length is"),
        (damaged(insert_record(7), 50), "checksum is wrong"),
        (damaged(insert_record(7), 17), "checksum is wrong"),
        (insert_record(8), "does not touch this page"),
        (insert_record(7, rmgr=Rmgr.SMGR), "changes no page"),
        (insert_record(7, rmgr=99), "changes no page"),
        (insert_record(7, offset=200), "invalid max offset number"),
    ],
    ids=[
        "garbage",
        "flipped data",
        "flipped header",
        "other page",
        "smgr",
        "unknown manager",
        "PANIC in redo",
    ],
)
def test_a_bad_record_is_an_error_that_names_it(record: bytes, reason: str) -> None:
    async def scenario() -> None:
        async with open_pool() as pool:
            good = [plain_request(number) for number in range(20)]
            results = await pool.redo(
                [*good[:5], insert_request(7, insert_record(7), record), *good[5:]], TENANT
            )
            error = results.pop(5)
            assert results == [plain_page(number) for number in range(20)]
            assert isinstance(error, RedoError)
            assert isinstance(error, CorruptionError)
            assert reason in str(error)
            assert error.key == relation_block_key(RELATION, 0, 7)
            assert (error.lsn, error.record_lsn) == (END, START)
            assert "1663/5/16384 main 7" in str(error)
            assert "0/1000028" in str(error)
            started = pool.supervisor.started
            assert await pool.redo(good, TENANT) == results
            assert pool.supervisor.started <= started + 2  # the two batches of these 20

    asyncio.run(scenario())


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_a_chain_without_its_beginning_is_an_error_not_an_empty_page(version: int) -> None:
    async def scenario() -> None:
        async with open_pool(version) as pool:
            (error,) = await pool.redo([insert_request(7, insert_record(7, init=False))], TENANT)
            assert isinstance(error, RedoError)
            assert "neither the base nor an earlier record has filled" in str(error)
            chain = insert_request(7, insert_record(7), insert_record(7, offset=2, init=False))
            assert isinstance((await pool.redo([chain], TENANT))[0], bytes)

    asyncio.run(scenario())


def test_records_out_of_order_are_refused() -> None:
    async def scenario() -> None:
        async with open_pool() as pool:
            records = [(200, 300, insert_record(7)), (100, 200, insert_record(7))]
            (error,) = await pool.redo([encode_redo_request(RELATION, 0, 7, None, records)], TENANT)
            assert "out of order" in str(error)

    asyncio.run(scenario())


@pytest.mark.parametrize("version", [14, NEWEST_VERSION])
def test_killed_workers_cost_time_and_nothing_else(version: int) -> None:
    async def killer(pool: RedoPool, redone: asyncio.Task[Sequence[bytes | Exception]]) -> None:
        """Once in the middle of a turn: who is killed again and again in one batch gives up, by right."""
        await asyncio.sleep(0.001)
        if not redone.done():
            for process_id in pool.supervisor.process_ids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)

    async def scenario() -> None:
        async with open_pool(version) as pool:
            for turn in range(12):
                numbers = range(turn * 1000, turn * 1000 + 600)
                async with asyncio.TaskGroup() as group:
                    requests = [plain_request(number) for number in numbers]
                    redone = group.create_task(pool.redo(requests, TENANT), name="redo")
                    group.create_task(killer(pool, redone), name="killer")
                assert redone.result() == [plain_page(number) for number in numbers]
            assert pool.supervisor.started > 4

    asyncio.run(scenario())


def test_a_silent_worker_is_replaced() -> None:
    async def scenario() -> None:
        async with open_pool(workers=1, request_timeout_s=0.5) as pool:
            await pool.redo([plain_request(1)], TENANT)
            os.kill(pool.supervisor.process_ids()[0], signal.SIGSTOP)
            assert await pool.redo([plain_request(2), plain_request(3)], TENANT) == [
                plain_page(2),
                plain_page(3),
            ]
            assert pool.supervisor.started == 2

    asyncio.run(scenario())


def test_batches_larger_than_both_pipes_do_not_stop() -> None:
    with reachable_directory() as root:
        build = build_of(NEWEST_VERSION)
        worker = RedoWorker(build, redo_extension(build), redo_control_file(build), root)
        try:
            assert os.getsid(worker.process_id) == os.getsid(0), "a session is what cores are shared out to"
            outcome = worker.exchange([plain_request(number) for number in range(1500)], 20)
            assert outcome.failure is None
            assert outcome.pages == [plain_page(number) for number in range(1500)]
        finally:
            worker.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        bytes(24),
        struct.pack("<8I", 1663, 5, 1, 9, 0, 0, 0, 0),
        struct.pack("<8I", 1663, 5, 1, 0, 0xFFFFFFFF, 0, 0, 0),
        struct.pack("<8I", 1663, 5, 1, 0, 0, 2, 0, 0),
        struct.pack("<8I", 1663, 5, 1, 0, 0, 1, 0, 0),
        struct.pack("<8I", 1663, 5, 1, 0, 0, 0, 1, 0),
        struct.pack("<8I", 1663, 5, 1, 0, 0, 0, 0xFFFFFFFF, 0),
        struct.pack("<8I", 1663, 5, 1, 0, 0, 0, 0, 0) + bytes(8),
        struct.pack("<8IQQII", 1663, 5, 1, 0, 0, 0, 1, 0, 1, 2, 0xFFFFFFFF, 0),
        struct.pack("<8IQQII", 1663, 5, 1, 0, 0, 0, 1, 0, 1, 2, 24, 0),
    ],
)
def test_malformed_requests_are_refused_and_answered(body: bytes) -> None:
    with reachable_directory() as root:
        build = build_of(NEWEST_VERSION)
        worker = RedoWorker(build, redo_extension(build), redo_control_file(build), root)
        try:
            with pytest.raises(RedoWorkerError, match="malformed request"):
                worker.ask(REQUEST_HEAD.pack(len(body), ord("R")) + body)
            with pytest.raises(RedoWorkerError, match="unknown request"):
                worker.ask(REQUEST_HEAD.pack(0, ord("?")))
            assert b"errors=2" in worker.ask(STATISTICS_REQUEST)
            with pytest.raises(RedoWorkerError, match="exited with code 5"):
                worker.ask(REQUEST_HEAD.pack(0xFFFFFFF0, ord("R")))
        finally:
            worker.close()


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_blocks_and_forks_far_away(version: int) -> None:
    async def scenario() -> None:
        async with open_pool(version) as pool:
            blocks = [0, 131_071, 131_072, 5_000_000, 0xFFFFFFFE]
            requests = [
                encode_redo_request(RELATION, fork, block, plain_page(block), [])
                for fork in range(4)
                for block in blocks
            ]
            assert await pool.redo(requests, TENANT) == [
                plain_page(block) for _ in range(4) for block in blocks
            ]

    asyncio.run(scenario())


def test_workers_are_locked_in() -> None:
    """Limits and the filter of system calls hold, and a worker runs as somebody harmless."""
    with reachable_directory() as root:
        build = build_of(NEWEST_VERSION)
        worker = RedoWorker(build, redo_extension(build), redo_control_file(build), root)
        try:
            status = Path(f"/proc/{worker.process_id}/status").read_text()
            limits = Path(f"/proc/{worker.process_id}/limits").read_text()
            environment = Path(f"/proc/{worker.process_id}/environ").read_bytes().split(b"\0")
            assert worker.sandbox.is_filtered
        finally:
            worker.close()
    assert "NoNewPrivs:\t1" in status
    assert "Uid:\t0" not in status
    assert "Max core file size 0 0 bytes" in " ".join(limits.split())
    assert "Max processes 0 0 processes" in " ".join(limits.split())
    names = {variable.partition(b"=")[0] for variable in environment if variable}
    assert names <= {b"LC_ALL", b"TZ", b"LD_LIBRARY_PATH", b"LD_PRELOAD"}


def test_the_log_of_a_worker_stays_short() -> None:
    with reachable_directory() as root:
        build = build_of(NEWEST_VERSION)
        worker = RedoWorker(build, redo_extension(build), redo_control_file(build), root)
        try:
            log = worker.directory / "log"
            with log.open("ab") as file:
                file.write(bytes(LOG_SIZE_MAX - log.stat().st_size))
            assert worker.exchange([plain_request(1)], 10).failure is None
            assert log.stat().st_size == LOG_SIZE_MAX, "at the bound it is kept"
            with log.open("ab") as file:
                file.write(b"WARNING:  once more\n")
            assert worker.exchange([plain_request(2)], 10).failure is None
            assert log.stat().st_size == 0
            flags = Path(f"/proc/{worker.process_id}/fdinfo/2").read_text().split("flags:")[1].split()[0]
            assert int(flags, 8) & os.O_APPEND, "what the worker writes next would leave a hole"
        finally:
            worker.close()


def test_a_closed_pool_says_so() -> None:
    async def scenario() -> None:
        async with open_pool() as pool:
            await pool.redo([plain_request(1)], TENANT)
            await pool.close()
            with pytest.raises(RedoUnavailableError):
                await pool.redo([plain_request(1)], TENANT)

    asyncio.run(scenario())
