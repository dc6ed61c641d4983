"""[getpage_image_per_s, getpage_image_p50_us, getpage_redo10_per_s, getpage_seq_mb_s] GetPage, at the socket.

What is measured is the whole page service: a real pageserver process with default settings, asked over TCP
on the loopback by a client in another process with the frames a compute sends (`page_client`), at "the
newest LSN". The client keeps 32 requests under way on one connection, as many as libhydrate does, and
checks every answer's head. Pages of both kinds are compared with what the engine gives before the clock
starts.

* image: single random blocks of pgbench_accounts, all in image layers. The pageserver is bound to one
  core, with its redo workers and threads; the client has the others. The blocks asked for are a hot set of
  80 MB that fits the cache of decompressed blocks (128 MiB), and each has been read once. The latency is
  that of one request at a time. The note says what random reads over the whole table cost, which does not
  fit that cache: they come from local files in the page cache, 24 KB decompressed for each page.
* redo10: single random blocks of a table whose every page is an image and ten records in a delta layer,
  each heap update records of one row (`page_store`). The pageserver has all cores: redo is done in
  processes of their own.
* seq: the whole table, 128 blocks a request as a compute's read-ahead asks, four under way, first block to
  last; as it does not fit the cache, all of it is decompressed from local files in the page cache. All
  cores.

A note gives the same at the engine's boundary: `Timeline.get_pages` from 32 coroutines, in this process,
on one core.
"""

import asyncio
import contextlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.cores import away_from_it, bound_to_one_core, cpu_s
from bench.model import Bench, Samples
from bench.page_client import BenchPageClient, page_requests
from bench.page_store import TENANT, TIMELINE, PageStore, Table, make_page_store, storage
from bench.pgbench import BenchFailedError
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.io.obstore_object_store import ObstoreObjectStore
from excimer.storage.engine.page_reads import PageRead, block_key
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.wire.auth import Right, generate_key_pair
from excimer.wire.page_service import NEWEST_LSN
from tests.kit.pageservers import PageserverProcess

DEPTH = 32
HOT_BLOCKS = 10_000
SEQUENTIAL_BLOCKS = 128
SEQUENTIAL_DEPTH = 4
LATENCY_REQUESTS = 4_000
CHECKED_BLOCKS = 200
IDS = ("getpage_image_per_s", "getpage_image_p50_us", "getpage_redo10_per_s", "getpage_seq_mb_s")


def measure(bench: Bench) -> Samples:
    root = Path(tempfile.mkdtemp(prefix="excimer-bench-"))
    root.chmod(0o755)
    try:
        effort = bench.effort
        store = asyncio.run(
            make_page_store(root, scale=2 * effort.pgbench_scale, updated_rows=effort.redo_pages)
        )
        bench.note(f"{store.images.blocks} blocks in images, {store.updated.blocks} with ten records")
        checked = asyncio.run(_measure_engine(bench, store, root / "engine"))
        samples: Samples = {name: [] for name in IDS}
        with _pageserver(store, root / "bound", 3, bound=True) as served, away_from_it():
            _check_content(store, checked, served.client)
            _measure_images(bench, store, served, samples)
        with _pageserver(store, root / "free", 4, bound=False) as served:
            _check_content(store, checked, served.client)
            _measure_redo(bench, store, served, samples)
            _measure_sequential(bench, store, served, samples)
        return samples
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _pageserver(store: PageStore, directory: Path, generation: int, *, bound: bool) -> Iterator["Served"]:
    server = PageserverProcess(directory, generate_key_pair(), object_store_url=f"file://{store.objects}")
    try:
        with bound_to_one_core() if bound else contextlib.nullcontext():
            server.start()
        server.created("/tenant", {"tenant_id": TENANT, "generation": generation})
        token = server.token(Right.READ_PAGES, tenant_id=TENANT)
        client = BenchPageClient(server.page_address, TENANT, TIMELINE, token)
        with contextlib.closing(client):
            yield Served(client, server)
    finally:
        server.end()


class Served(NamedTuple):
    client: BenchPageClient
    server: PageserverProcess

    def cpu_s(self) -> float:
        """Of the pageserver so far; redo workers not counted."""
        return cpu_s(self.server.process)


def _measure_images(bench: Bench, store: PageStore, served: Served, samples: Samples) -> None:
    client = served.client
    hot = min(HOT_BLOCKS, store.images.blocks)
    requests = bench.effort.getpage_requests
    client.run(_requests(store, store.images, range(hot)), 1, DEPTH)
    whole, cpu_us = [], []
    for number in range(bench.effort.rounds):
        blocks = _random_blocks(hot, requests, number)
        before_s = served.cpu_s()
        taken = client.run(_requests(store, store.images, blocks), 1, DEPTH)
        cpu_us.append((served.cpu_s() - before_s) / requests * 1e6)
        samples["getpage_image_per_s"].append(requests / taken)
        latencies = client.latencies(_requests(store, store.images, blocks[:LATENCY_REQUESTS]))
        samples["getpage_image_p50_us"].append(statistics.median(latencies) * 1e6)
    for number in range(bench.effort.rounds):
        blocks = _random_blocks(store.images.blocks, requests, number)
        whole.append(requests / client.run(_requests(store, store.images, blocks), 1, DEPTH))
    bench.note(f"random images, hot, per second: {_listed(samples['getpage_image_per_s'])}")
    bench.note(f"random images, hot, us of the pageserver's CPU each: {_listed(cpu_us)}")
    bench.note(f"random images, whole table, per second: {_listed(whole)}")
    bench.note(f"one at a time, median us: {_listed(samples['getpage_image_p50_us'])}")


def _measure_redo(bench: Bench, store: PageStore, served: Served, samples: Samples) -> None:
    client = served.client
    cpu_us = []
    blocks = store.updated.blocks
    client.run(_requests(store, store.updated, range(blocks)), 1, DEPTH)
    requests = bench.effort.getpage_requests // 4
    for number in range(bench.effort.rounds):
        chosen = _requests(store, store.updated, _random_blocks(blocks, requests, number))
        before_s = served.cpu_s()
        taken = client.run(chosen, 1, DEPTH)
        cpu_us.append((served.cpu_s() - before_s) / requests * 1e6)
        samples["getpage_redo10_per_s"].append(requests / taken)
    bench.note(f"pages with ten records, per second: {_listed(samples['getpage_redo10_per_s'])}")
    bench.note(f"pages with ten records, us of the pageserver's CPU each: {_listed(cpu_us)}")


def _measure_sequential(bench: Bench, store: PageStore, served: Served, samples: Samples) -> None:
    firsts = range(0, store.images.blocks - SEQUENTIAL_BLOCKS + 1, SEQUENTIAL_BLOCKS)
    requests = _requests(store, store.images, firsts, SEQUENTIAL_BLOCKS)
    for _ in range(bench.effort.rounds + 1):
        taken = served.client.run(requests, SEQUENTIAL_BLOCKS, SEQUENTIAL_DEPTH)
        size = len(firsts) * SEQUENTIAL_BLOCKS * BLOCK_SIZE_BYTES
        samples["getpage_seq_mb_s"].append(size / taken / 1e6)
    del samples["getpage_seq_mb_s"][0]  # it made the local copies
    bench.note(f"sequential, MB/s: {_listed(samples['getpage_seq_mb_s'])}")


def _requests(store: PageStore, table: Table, blocks: Sequence[int], count: int = 1) -> list[bytes]:
    return page_requests(table.first_key, blocks, count, NEWEST_LSN, store.lsn)


def _random_blocks(blocks: int, count: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(blocks) for _ in range(count)]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)


def _check_content(store: PageStore, checked: "list[CheckedPages]", client: BenchPageClient) -> None:
    for table, blocks, pages in checked:
        for request, page in zip(_requests(store, table, blocks), pages, strict=True):
            if client.pages(request, 1) != page:
                raise BenchFailedError("the page service answers with another page than the engine")


class CheckedPages(NamedTuple):
    """What the engine gives, read in worker threads."""

    table: Table
    blocks: list[int]
    pages: list[bytes]


async def _pages_to_check(timeline: Timeline, store: PageStore, table: Table) -> CheckedPages:
    blocks = _random_blocks(table.blocks, CHECKED_BLOCKS, 1)
    reads = [PageRead(timeline, block_key(table.first_key, block), 1, store.lsn) for block in blocks]
    return CheckedPages(table, blocks, [await read.run() for read in reads])


@contextlib.asynccontextmanager
async def _attached(store: PageStore, local_dir: Path) -> AsyncIterator[Timeline]:
    async with storage(local_dir, ObstoreObjectStore(f"file://{store.objects}")) as context:
        tenant = await TenantStorage.attach(context, TENANT, 2)
        yield tenant.timeline(TIMELINE)
        await tenant.close()


async def _measure_engine(bench: Bench, store: PageStore, local_dir: Path) -> list[CheckedPages]:
    requests, hot = bench.effort.getpage_requests, min(HOT_BLOCKS, store.images.blocks)
    with bound_to_one_core():
        async with _attached(store, local_dir) as timeline:
            await _read_all(timeline, store, store.images, range(hot))
            taken = await _read_all(timeline, store, store.images, _random_blocks(hot, requests, 1))
            bench.note(f"engine alone, random images, hot, per second: {requests / taken:,.0f}")
            redo = _random_blocks(store.updated.blocks, requests // 4, 1)
            await _read_all(timeline, store, store.updated, redo)
            taken = await _read_all(timeline, store, store.updated, redo)
            rate = len(redo) / taken
            bench.note(f"engine alone, pages with ten records, one core, per second: {rate:,.0f}")
            return [await _pages_to_check(timeline, store, table) for table in (store.images, store.updated)]


async def _read_all(timeline: Timeline, store: PageStore, table: Table, blocks: Sequence[int]) -> float:
    keys = iter([block_key(table.first_key, block) for block in blocks])

    async def reader() -> None:
        for key in keys:
            await timeline.get_pages(key, 1, store.lsn)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(DEPTH):
            group.create_task(reader(), name=f"reader {number}")
    return time.perf_counter() - begun
