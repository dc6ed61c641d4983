"""[compaction_mb_s, compaction_read_p99_ratio] Merging flushes, writing images, and what readers feel of it.

The engine in this process with a local directory as object store, PostgreSQL's redo workers, and values of
real WAL: a pgbench load and TPC-B on it, ingested and flushed to L0 layers of 32 MiB each before the
clock starts. Each round is a copy of that, attached anew.

* compaction_mb_s: the merges that are due, from their plan to the manifest that names the L1 layers and no
  longer the L0: decompressed, merged, compressed, synced, uploaded. 1 MB = 10^6 bytes of values before
  compression. The note says the same of image rounds, in bytes of pages: these are rebuilt by redo, from
  a history that is all deltas.
* compaction_read_p99_ratio: p99 of random single pages of pgbench_accounts, read by READERS at a time while
  merges and rounds go on from their beginning to their end, to the p99 of the same reads before.
"""

import asyncio
import contextlib
import dataclasses
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from bench.model import Bench, Effort, Samples
from bench.page_store import TENANT, TIMELINE, ingest_history, new_timeline, storage
from bench.pgbench import BenchFailedError, Target, load
from excimer.base.keys import BLOCK_SIZE_BYTES, MAX_KEY, MIN_KEY, KeyKind, Relation, make_key
from excimer.base.lsn import MAX_LSN
from excimer.io.obstore_object_store import ObstoreObjectStore
from excimer.pageserver.initdb_import import import_initdb
from excimer.storage.engine.context import MIB, StorageContext, StorageSettings
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.engine_counters import WrittenBy
from excimer.storage.engine.page_reads import block_key
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.tenant_marker import create_tenant
from excimer.storage.engine.timeline import Timeline
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.page_truth import write_history
from tests.kit.stock_server import StockServer

IDS = ("compaction_mb_s", "compaction_read_p99_ratio")
READERS = 2
QUIET_READS = 3_000
SETTINGS = StorageSettings(flush_size_bytes=32 * MIB, image_creation_threshold=1)
SOURCE_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "full_page_writes": "off",
    "autovacuum": "off",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1d",
}
ACCOUNTS = (
    "select (select oid from pg_database where datname = 'postgres'), pg_relation_filenode(oid), relpages"
    " from pg_class where relname = 'pgbench_accounts'"
)


class Table(NamedTuple):
    first_key: bytes
    blocks: int


class Work(NamedTuple):
    """What one kind of step has done."""

    size_bytes: int
    time_s: float

    @property
    def mb_per_s(self) -> float:
        return self.size_bytes / self.time_s / 1e6


def measure(bench: Bench) -> Samples:
    root = Path(tempfile.mkdtemp(prefix="excimer-bench-"))
    root.chmod(0o755)
    try:
        return asyncio.run(_measure(bench, root))
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def _measure(bench: Bench, root: Path) -> Samples:
    table = await _write_flushes(root, bench.effort)
    merges: list[Work] = []
    rounds: list[Work] = []
    ratios: list[float] = []
    amplifications: list[float] = []
    for number in range(bench.effort.rounds):
        async with _copy_of(root, number) as timeline:
            quiet_ms = await _read_for(timeline, table, QUIET_READS)
            merged, imaged, busy_ms = await _compact(timeline, table, with_readers=True)
            ratios.append(_p99(busy_ms) / _p99(quiet_ms))
            bench.note(
                f"reads, ms: before {_shape(quiet_ms)}, while merging ({merged.mb_per_s:.0f} MB/s) and making"
                f" images ({imaged.mb_per_s:.0f} MB/s) {_shape(busy_ms)}"
            )
        async with _copy_of(root, number) as timeline:
            merged, imaged, _ = await _compact(timeline, table, with_readers=False)
            merges.append(merged)
            rounds.append(imaged)
            amplifications.append(_written(timeline) / _flushed(timeline))
    bench.note(f"merged each time: {merges[0].size_bytes / 1e6:.0f} MB of values")
    bench.note(f"images each time: {rounds[0].size_bytes / 1e6:.0f} MB of pages")
    bench.note(f"images, MB/s: {', '.join(f'{each.mb_per_s:.1f}' for each in rounds)}")
    bench.note(f"bytes of layers written for each byte flushed: {statistics.median(amplifications):.2f}")
    return {"compaction_mb_s": [each.mb_per_s for each in merges], "compaction_read_p99_ratio": ratios}


async def _write_flushes(root: Path, effort: Effort) -> Table:
    """Into `root`/objects and `root`/local."""
    found: list[str] = []

    def workload(server: StockServer) -> None:
        target = Target("source", server.build, server.port)
        load(target, effort.pgbench_scale)
        target.run("pgbench", "-n", "-c", "8", "-j", "2", "-t", str(effort.ingest_transactions // 8))
        server.sql("checkpoint")
        found.extend(str(value) for value in server.sql(ACCOUNTS)[0])

    build = build_of(NEWEST_VERSION)
    history = await asyncio.to_thread(write_history, build, root / "history", workload, SOURCE_SETTINGS)
    async with _context(root / "source") as context:
        create_tenant(context.store, TENANT)
        tenant = await TenantStorage.attach(context, TENANT, 1)
        cluster = import_initdb(history.beginning, build.version)
        new = new_timeline(history, cluster.end_lsn, cluster.prev_record_lsn)
        timeline = await tenant.create_timeline(new, cluster.images)
        await ingest_history(timeline, history, cluster.end_lsn)
        await timeline.flush()
        await tenant.close()
    shutil.rmtree(root / "history")
    database, node, pages = found
    relation = Relation(1663, int(database), int(node))
    return Table(make_key(KeyKind.RELATION_BLOCK, *relation), int(pages))


@contextlib.asynccontextmanager
async def _context(root: Path) -> AsyncIterator[StorageContext]:
    async with storage(root, ObstoreObjectStore(f"file://{root / 'objects'}")) as context:
        yield dataclasses.replace(context, settings=SETTINGS)


@contextlib.asynccontextmanager
async def _copy_of(root: Path, number: int) -> AsyncIterator[Timeline]:
    copy = root / f"round-{number}"
    for part in ("objects", "layers"):
        shutil.copytree(root / "source" / part, copy / part)
    try:
        async with _context(copy) as context:
            tenant = await TenantStorage.attach(context, TENANT, 2)
            yield tenant.timeline(TIMELINE)
            await tenant.close()
    finally:
        shutil.rmtree(copy)


async def _compact(timeline: Timeline, table: Table, *, with_readers: bool) -> tuple[Work, Work, list[float]]:
    """All merges, all rounds, and how long reads took meanwhile, in milliseconds."""
    stop = asyncio.Event()
    reading = [_read_until(timeline, table, stop) for _ in range(READERS if with_readers else 0)]
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(each, name=f"reader {at}") for at, each in enumerate(reading)]
        merged_files, merge_s, imaged = await _compact_all(timeline)
        stop.set()
    merged = Work(sum(map(_raw_size_bytes, merged_files)), merge_s)
    if not merged.size_bytes or not imaged.size_bytes:
        raise BenchFailedError("there was nothing to compact")
    return merged, imaged, [latency for reader in readers for latency in reader.result()]


async def _compact_all(timeline: Timeline) -> tuple[list[DiskLayer], float, Work]:
    """The layers that merges have replaced, and how long that took; what rounds did."""
    written = timeline.context.counters.written_bytes
    merged: list[DiskLayer] = []
    merge_s, imaged = 0.0, Work(0, 0.0)
    while True:
        before, merged_bytes = timeline.stack.files, written[WrittenBy.MERGE]
        begun = time.monotonic()
        if not await timeline.compact():
            return merged, merge_s, imaged
        time_s = time.monotonic() - begun
        after = timeline.stack.files
        if written[WrittenBy.MERGE] != merged_bytes:
            merged += [before[name] for name in before.keys() - after.keys()]
            merge_s += time_s
        else:
            new = sum(after[name].description.value_count for name in after.keys() - before.keys())
            imaged = Work(imaged.size_bytes + new * BLOCK_SIZE_BYTES, imaged.time_s + time_s)


def _raw_size_bytes(file: DiskLayer) -> int:
    """Of a layer's values, uncompressed. Also of one that is replaced: nobody deletes it here."""
    return sum(map(len, file.blocks(MIN_KEY, MAX_KEY, 0, MAX_LSN, cached=False)))


async def _read_for(timeline: Timeline, table: Table, count: int) -> list[float]:
    stop = asyncio.Event()
    readers = [_read_until(timeline, table, stop, count // READERS) for _ in range(READERS)]
    return [latency for part in await asyncio.gather(*readers) for latency in part]


async def _read_until(
    timeline: Timeline, table: Table, stop: asyncio.Event, count: int | None = None
) -> list[float]:
    """Milliseconds that each read of a random page took."""
    chance = random.Random(7)
    latencies: list[float] = []
    while not stop.is_set() and (count is None or len(latencies) < count):
        key = block_key(table.first_key, chance.randrange(table.blocks))
        begun = time.perf_counter()
        await timeline.get_pages(key, 1, timeline.last_record_lsn)
        latencies.append((time.perf_counter() - begun) * 1000)
    return latencies


def _p99(latencies: list[float]) -> float:
    return statistics.quantiles(latencies, n=100)[98]


def _shape(latencies: list[float]) -> str:
    return f"p50 {statistics.median(latencies):.2f} p99 {_p99(latencies):.2f}"


def _flushed(timeline: Timeline) -> int:
    """What was flushed, before this process came: the sources of the merges."""
    return timeline.context.counters.merged_bytes


def _written(timeline: Timeline) -> int:
    return _flushed(timeline) + sum(timeline.context.counters.written_bytes.values())
