"""A timeline to read pages from: one large table in image layers, and one whose every page has ten records to
redo.

Made as it would come about, in this process: a plain PostgreSQL writes the history, our ingest and redo
turn it into pages. Everything as of one LSN is then the beginning of a second timeline, which so has it in
image layers, and the WAL after that LSN, ten updates of each row of a table with one row per page, is
ingested on top and flushed to one delta layer. It lies in a local directory as object store, for whoever
attaches it next.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from bench.pgbench import Target, load
from excimer._native.native_apply import apply_native
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    MAX_KEY,
    KeyKind,
    Relation,
    kind_range,
    make_key,
    parse_key,
)
from excimer.base.lsn import Lsn, parse_lsn
from excimer.io.filesystem import LocalFilesystem
from excimer.io.object_store import MemoryObjectStore, ObjectStore
from excimer.io.obstore_object_store import ObstoreObjectStore
from excimer.pageserver.ingest import WalIngest
from excimer.pageserver.initdb_import import import_initdb
from excimer.pgformat.control_file import ControlFile
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.redo_pool import RedoPool
from excimer.storage.engine.tenant import NewTimeline, TenantStorage
from excimer.storage.engine.tenant_marker import create_tenant
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.relation_size import size_blocks
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.page_truth import History, OnePool, write_history
from tests.kit.stock_server import StockServer

TENANT = TenantId("be" * 16)
TIMELINE = TimelineId("c4" * 16)
RECORDS = 10
READ_BLOCKS = 128
INGEST_CHUNK_BYTES = 1 << 20
_SIZE_KINDS = {KeyKind.RELATION_SIZE: KeyKind.RELATION_BLOCK, KeyKind.SLRU_SIZE: KeyKind.SLRU_BLOCK}

UPDATED = (
    # Rows of a tenth of a page and a fill factor of a tenth: one row per page, and room for ten versions.
    "create table updated(key int, value int, filler text) with (fillfactor = 10);"
    "alter table updated alter filler set storage plain;"
    "insert into updated select g, 0, repeat('u', 700) from generate_series(1, {rows}) g;"
    "vacuum (freeze) updated; checkpoint"
)
# In one transaction: what it replaces is not yet dead, so no page is pruned.
UPDATES = "begin;" + "update updated set value = value + 1;" * RECORDS + "commit; checkpoint"
FILE_OF = "select reltablespace, pg_relation_filenode(oid), relpages from pg_class where relname = '{name}'"


class Table(NamedTuple):
    first_key: bytes
    blocks: int


class PageStore(NamedTuple):
    objects: Path
    """Root of the object store."""
    lsn: Lsn
    images: Table
    """All of it in image layers."""
    updated: Table
    """Each page an image and `RECORDS` records."""


async def make_page_store(root: Path, *, scale: int, updated_rows: int) -> PageStore:
    """Needs PostgreSQL and some tens of seconds. `root` is a new directory that anybody may enter."""
    marks: dict[str, str] = {}

    def workload(server: StockServer) -> None:
        load(Target("source", server.build, server.port), scale)
        server.sql(UPDATED.format(rows=updated_rows))
        marks["images"] = server.sql("select pg_current_wal_flush_lsn()")[0][0]
        marks["database"] = server.sql("select oid from pg_database where datname = 'postgres'")[0][0]
        for name in ("pgbench_accounts", "updated"):
            marks[name] = "/".join(server.sql(FILE_OF.format(name=name))[0])
        server.sql(UPDATES)

    build = build_of(NEWEST_VERSION)
    history = await asyncio.to_thread(
        write_history, build, root / "history", workload, {"listen_addresses": "127.0.0.1"}
    )
    lsn = parse_lsn(marks["images"])
    async with storage(root / "first", MemoryObjectStore()) as context:
        first = await _ingested(context, history)
        images = [image async for image in _images(first, lsn)]
    objects = root / "objects"
    async with storage(root / "second", ObstoreObjectStore(f"file://{objects}")) as context:
        end_lsn = await _write_timeline(context, history, lsn, images)
    tables = [_table(marks, name) for name in ("pgbench_accounts", "updated")]
    return PageStore(objects, end_lsn, *tables)


@asynccontextmanager
async def storage(
    local_dir: Path, store: ObjectStore, *, redo_workers: int = 2
) -> AsyncIterator[StorageContext]:
    pool = RedoPool(build_of(NEWEST_VERSION), local_dir / "redo", redo_workers)
    try:
        with ThreadPoolExecutor(8) as executor:
            yield StorageContext(
                store=store,
                filesystem=LocalFilesystem(),
                local_dir=local_dir / "layers",
                redo=OnePool(pool),
                apply_native=apply_native,
                executor=executor,
            )
    finally:
        await pool.close()


def _table(marks: dict[str, str], name: str) -> Table:
    _, node, pages = marks[name].split("/")
    relation = Relation(1663, int(marks["database"]), int(node))
    return Table(make_key(KeyKind.RELATION_BLOCK, *relation), int(pages))


async def _ingested(context: StorageContext, history: History) -> Timeline:
    tenant = await TenantStorage.attach(context, TENANT, 1)
    cluster = import_initdb(history.beginning, history.build.version)
    new = new_timeline(history, cluster.end_lsn, cluster.prev_record_lsn)
    timeline = await tenant.create_timeline(new, cluster.images)
    await ingest_history(timeline, history, cluster.end_lsn)
    return timeline


async def _write_timeline(
    context: StorageContext, history: History, lsn: Lsn, images: Sequence[tuple[bytes, bytes]]
) -> Lsn:
    create_tenant(context.store, TENANT)
    tenant = await TenantStorage.attach(context, TENANT, 1)
    prev_lsn = max(end for end in history.record_ends if end < lsn)
    timeline = await tenant.create_timeline(new_timeline(history, lsn, prev_lsn), images)
    await ingest_history(timeline, history, lsn)
    await timeline.flush()
    return timeline.last_record_lsn


def new_timeline(history: History, lsn: Lsn, prev_record_lsn: Lsn) -> NewTimeline:
    """The history as of `lsn`, where the record that starts at `prev_record_lsn` ends."""
    control = ControlFile.unpack(
        (history.beginning / "global/pg_control").read_bytes(), history.build.version
    )
    return NewTimeline(
        timeline_id=TIMELINE,
        pg_version=history.build.version,
        system_id=control.system_id,
        wal_segment_size_bytes=control.wal_segment_size,
        last_record_lsn=lsn,
        prev_record_lsn=prev_record_lsn,
    )


async def ingest_history(timeline: Timeline, history: History, start_lsn: Lsn) -> None:
    """All WAL from `start_lsn` on. Flushes whenever there is a full layer; the rest stays in memory."""
    loop = asyncio.get_running_loop()

    def read_pages(key: bytes, count: int, lsn: Lsn) -> bytes:
        return asyncio.run_coroutine_threadsafe(timeline.get_pages(key, count, lsn), loop).result()

    ingest = await asyncio.to_thread(WalIngest, timeline, read_pages=read_pages)
    for chunk, chunk_lsn in _chunks(history, start_lsn):
        await asyncio.to_thread(ingest.ingest, chunk, chunk_lsn)
        if timeline.stack.frozen:
            await timeline.flush()


def _chunks(history: History, start_lsn: Lsn) -> Iterator[tuple[bytes, Lsn]]:
    wal = memoryview(history.wal)
    for at in range(start_lsn - history.start_lsn, len(wal), INGEST_CHUNK_BYTES):
        yield bytes(wal[at : at + INGEST_CHUNK_BYTES]), Lsn(history.start_lsn + at)


async def _images(timeline: Timeline, lsn: Lsn) -> AsyncIterator[tuple[bytes, bytes]]:
    """Every key alive at `lsn` and its value."""
    ranges = (
        kind_range(KeyKind.RELATION_SIZE),
        (make_key(KeyKind.SLRU_SIZE), MAX_KEY),
    )
    for key, value in [pair for each in ranges for pair in timeline.scan(*each, lsn)]:
        yield key, value
        fields = parse_key(key)
        block_kind = _SIZE_KINDS.get(KeyKind(fields.kind))
        if block_kind is None:
            continue
        size = size_blocks(value)
        for block in range(0, size, READ_BLOCKS):
            count = min(READ_BLOCKS, size - block)
            pages = await timeline.get_pages(make_key(block_kind, *fields[1:5], block), count, lsn)
            for at in range(count):
                page = pages[at * BLOCK_SIZE_BYTES : (at + 1) * BLOCK_SIZE_BYTES]
                yield make_key(block_kind, *fields[1:5], block + at), page
