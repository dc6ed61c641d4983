"""Page truth (S1): our storage at an LSN against a stock server recovered to that LSN, byte for byte.

A *history* is a stock cluster's beginning (as initdb left it) and all the WAL it then wrote. The
beginning is imported and the WAL ingested into a timeline; for an LSN of that history a copy of the
beginning is recovered by PostgreSQL itself up to that LSN, stopped, and its files compared with what
the timeline says.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    FORK_SUFFIXES,
    SLRU_DIRECTORIES,
    Fork,
    KeyKind,
    Relation,
    describe_key,
    kind_range,
    make_key,
    parse_key,
    relation_block_key,
    relation_path,
    relation_size_key,
    slru_block_key,
)
from excimer.base.lsn import WAL_PAGE_SIZE_BYTES, Lsn, format_lsn
from excimer.io.filesystem import LocalFilesystem
from excimer.io.object_store import MemoryObjectStore
from excimer.io.processes import run
from excimer.pageserver.basebackup_job import BasebackupSource
from excimer.pageserver.ingest import WalIngest
from excimer.pageserver.initdb_import import import_initdb
from excimer.pgformat.checkpoint_state import CheckpointState, stored_next_xid
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.native_records import apply_native
from excimer.pgformat.page_masks import map_bits
from excimer.pgformat.replication_origins import ORIGINS_PATH, parse_origins
from excimer.pgformat.wal_reader import WalReader
from excimer.pgformat.wal_segment import segment_name
from excimer.postgres import PostgresBuild, run_initdb
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.redo_pool import RedoPool
from excimer.storage.engine.tenant import NewTimeline, TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.relation_size import size_blocks
from tests.kit.stock_server import StockServer, copy_data_dir, stock_server

SEGMENT_SIZE_BYTES = 1 << 20
CHUNK_BYTES = 100_000
TENANT = TenantId("0b" * 16)
MAIN = TimelineId("22" * 16)
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "wal_level": "replica",
    "wal_keep_size": "30GB",
    "max_wal_size": "30GB",
    "min_wal_size": "8MB",
    "checkpoint_timeout": "1d",
    "shared_buffers": "32MB",
    "max_prepared_transactions": "10",
    "track_commit_timestamp": "on",
}


@dataclass(frozen=True)
class History:
    build: PostgresBuild
    beginning: Path
    """The cluster as initdb left it."""
    wal_dir: Path
    settings: Mapping[str, str]
    start_lsn: Lsn
    wal: bytes
    """From `start_lsn` up to the last checkpoint's record, exclusive."""
    record_ends: list[Lsn]


def write_history(
    build: PostgresBuild,
    root: Path,
    workload: Callable[[StockServer], None],
    settings: Mapping[str, str] | None = None,
) -> History:
    """Runs `workload` on a new stock cluster below `root`."""
    beginning, data_dir = root / "beginning", root / "data"
    run_initdb(build, beginning, wal_segment_size_mib=SEGMENT_SIZE_BYTES >> 20)
    copy_data_dir(beginning, data_dir)
    settings = SETTINGS | dict(settings or {})
    with stock_server(build, data_dir, settings) as server:
        workload(server)
    start_lsn = import_initdb(beginning, build.version).end_lsn
    wal = _read_wal(data_dir, start_lsn, build.version)
    reader = WalReader(start_lsn, build.version, SEGMENT_SIZE_BYTES)
    ends = [
        record.end_lsn
        for at in range(0, len(wal), CHUNK_BYTES)
        for record in reader.feed(wal[at : at + CHUNK_BYTES])
    ]
    return History(build, beginning, data_dir / "pg_wal", settings, start_lsn, wal, ends)


def _read_wal(data_dir: Path, start_lsn: Lsn, version: int) -> bytes:
    control = ControlFile.unpack((data_dir / "global/pg_control").read_bytes(), version)
    end = control.checkpoint_lsn
    first, last = start_lsn // SEGMENT_SIZE_BYTES, end // SEGMENT_SIZE_BYTES
    names = (segment_name(1, number, SEGMENT_SIZE_BYTES) for number in range(first, last + 1))
    data = b"".join((data_dir / "pg_wal" / name).read_bytes() for name in names)
    return data[start_lsn - first * SEGMENT_SIZE_BYTES : end - first * SEGMENT_SIZE_BYTES]


def recover(history: History, lsn: Lsn, target: Path) -> Path:
    """A copy of the beginning, recovered by PostgreSQL up to `lsn`, promoted and stopped."""
    copy_data_dir(history.beginning, target)
    run(["touch", target / "recovery.signal"])
    settings = {
        **history.settings,
        "restore_command": f'cp "{history.wal_dir}/%f" "%p"',
        "recovery_target_lsn": format_lsn(lsn),
        "recovery_target_inclusive": "off",
        "recovery_target_action": "promote",
        "hot_standby": "off",
    }
    with stock_server(history.build, target, settings):
        pass
    return target


class OnePool:
    """A redo pool for timelines of one version."""

    def __init__(self, pool: RedoPool) -> None:
        self._pool = pool

    async def redo(
        self, requests: Sequence[bytes], pg_version: int, tenant: TenantId
    ) -> Sequence[bytes | Exception]:
        return await self._pool.redo(requests, tenant)


@asynccontextmanager
async def truth_timeline(
    build: PostgresBuild, root: Path, beginning: Path, *, wal_log_hints: bool = False
) -> AsyncIterator[Timeline]:
    """A timeline of the real engine with the real redo pool, holding the imported beginning."""
    async with truth_tenant(build, root, beginning, wal_log_hints=wal_log_hints) as tenant:
        yield tenant.timeline(MAIN)


@asynccontextmanager
async def truth_tenant(
    build: PostgresBuild,
    root: Path,
    beginning: Path,
    *,
    wal_log_hints: bool = False,
    settings: StorageSettings | None = None,
) -> AsyncIterator[TenantStorage]:
    """The tenant of such a timeline, which is `MAIN`."""
    cluster = import_initdb(beginning, build.version)
    pool = RedoPool(build, root / "redo", 2, wal_log_hints=wal_log_hints)
    with ThreadPoolExecutor(4) as executor:
        context = StorageContext(
            store=MemoryObjectStore(),
            filesystem=LocalFilesystem(),
            local_dir=root / "layers",
            redo=OnePool(pool),
            apply_native=apply_native,
            executor=executor,
            settings=settings or StorageSettings(),
        )
        tenant = await TenantStorage.attach(context, TENANT, 1)
        new = NewTimeline(
            timeline_id=MAIN,
            pg_version=build.version,
            system_id=cluster.control_file.system_id,
            wal_segment_size_bytes=cluster.control_file.wal_segment_size,
            last_record_lsn=cluster.end_lsn,
            prev_record_lsn=cluster.prev_record_lsn,
        )
        await tenant.create_timeline(new, cluster.images)
        try:
            yield tenant
        finally:
            await tenant.close()
            await pool.close()


def blocking_ingest(timeline: Timeline, loop: asyncio.AbstractEventLoop) -> WalIngest:
    """For use in a thread that is not the loop's."""

    def read_pages(key: bytes, count: int, lsn: Lsn) -> bytes:
        return asyncio.run_coroutine_threadsafe(timeline.get_pages(key, count, lsn), loop).result()

    return WalIngest(timeline, read_pages=read_pages, long_xact_size_bytes=WAL_PAGE_SIZE_BYTES)


def chunks(wal: bytes, start_lsn: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[bytes, Lsn]]:
    for at in range(0, len(wal), chunk_bytes):
        yield wal[at : at + chunk_bytes], Lsn(start_lsn + at)


async def ingest_history(history: History, timeline: Timeline) -> WalIngest:
    """All of it. Chunks end wherever they end, so that reads at every LSN in them are tried."""
    ingest = blocking_ingest(timeline, asyncio.get_running_loop())

    def feed() -> None:
        for chunk, lsn in chunks(history.wal, history.start_lsn):
            ingest.ingest(chunk, lsn)

    await asyncio.to_thread(feed)
    return ingest


@dataclass
class Comparison:
    """What was compared, by kind, and what was not equal."""

    lsn: Lsn
    compared: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, kind: str, what: str, ours: object, theirs: object) -> None:
        self.compared[kind] += 1
        if ours != theirs:
            self.wrong.append(f"at {format_lsn(self.lsn)} {kind} {what}: {ours!r:.80} is not {theirs!r:.80}")


class Comparer:
    """Compares one timeline at one LSN with the files of a cluster recovered to it."""

    def __init__(self, timeline: BasebackupSource, lsn: Lsn, data_dir: Path, chance: Random) -> None:
        self.timeline = timeline
        self.lsn = lsn
        self.data_dir = data_dir
        self.chance = chance
        self.result = Comparison(lsn)

    def _scan(self, kind: KeyKind) -> dict[bytes, bytes]:
        return dict(self.timeline.scan(*kind_range(kind), self.lsn))

    async def compare(self, pages: int) -> Comparison:
        """`pages` is how many pages of relations to draw; everything else is compared whole."""
        sizes = {key: size_blocks(value) for key, value in self._scan(KeyKind.RELATION_SIZE).items()}
        self.compare_sizes(sizes)
        await self.compare_slrus()
        self.compare_small_files()
        self.compare_checkpoint()
        await self.compare_pages(sizes, pages)
        return self.result

    def compare_sizes(self, sizes: dict[bytes, int]) -> None:
        """The free space map is not in WAL, and main forks of unlogged relations are no truth."""
        ours = {
            relation_path(Relation(*fields[1:4]), fields.fork): size
            for key, size in sizes.items()
            if (fields := parse_key(key)).fork != Fork.FSM
        }
        theirs = {path: size for path, size in self._files() if "_fsm" not in path}
        unlogged = {path.removesuffix("_init") for path in theirs if path.endswith("_init")}
        for path in sorted({*ours, *theirs} - unlogged):
            self.result.check("size", path, ours.get(path), theirs.get(path))

    def _files(self) -> Iterator[tuple[str, int]]:
        for directory in [self.data_dir / "global", *(self.data_dir / "base").iterdir()]:
            for file in directory.iterdir():
                name = file.name
                stem = name.split("_")[0]
                if stem.isdigit() and any(name == stem + suffix for suffix in FORK_SUFFIXES):
                    yield str(file.relative_to(self.data_dir)), file.stat().st_size // BLOCK_SIZE_BYTES

    async def compare_slrus(self) -> None:
        for slru, name in enumerate(SLRU_DIRECTORIES):
            found = {}
            for key, value in self.timeline.scan(
                make_key(KeyKind.SLRU_SIZE, slru), make_key(KeyKind.SLRU_SIZE, slru + 1), self.lsn
            ):
                found[parse_key(key).rel] = int.from_bytes(value, "little")
            files = {int(file.name, 16): file.read_bytes() for file in (self.data_dir / name).iterdir()}
            for segment in sorted({*found, *files}):
                blocks = found.get(segment)
                data = files.get(segment)
                size = None if data is None else len(data) // BLOCK_SIZE_BYTES
                self.result.check("SLRU size", f"{name}/{segment:04X}", blocks, size)
                for block in range(min(blocks or 0, size or 0)):
                    page = await self.timeline.get_pages(slru_block_key(slru, segment, block), 1, self.lsn)
                    theirs = (data or b"")[block * BLOCK_SIZE_BYTES : (block + 1) * BLOCK_SIZE_BYTES]
                    self.result.check("SLRU page", f"{name}/{segment:04X}:{block}", page, theirs)

    def compare_small_files(self) -> None:
        version = self.timeline.pg_version
        ours: dict[str, bytes] = {}
        for key, value in self._scan(KeyKind.RELATION_MAP).items():
            _, spc, db, *_ = parse_key(key)
            ours[f"base/{db}/pg_filenode.map" if spc == 1663 else "global/pg_filenode.map"] = value
        for key, value in self._scan(KeyKind.DATABASE).items():
            ours[f"base/{parse_key(key).db}/PG_VERSION"] = value
        for key, value in self._scan(KeyKind.TWO_PHASE).items():
            xid = parse_key(key).db << 32 | parse_key(key).rel
            ours[f"pg_twophase/{xid:016X}" if version >= 17 else f"pg_twophase/{xid & 0xFFFFFFFF:08X}"] = (
                value
            )
        self._compare_origins()
        patterns = ("base/*/pg_filenode.map", "global/pg_filenode.map", "base/*/PG_VERSION", "pg_twophase/*")
        theirs = {
            str(path.relative_to(self.data_dir)): path.read_bytes()
            for pattern in patterns
            for path in self.data_dir.glob(pattern)
        }
        for path in sorted({*ours, *theirs}):
            self.result.check("file", path, ours.get(path), theirs.get(path))

    def _compare_origins(self) -> None:
        """Up to which LSN at their origin transactions were applied; a file that says nothing need not be."""
        path = self.data_dir / ORIGINS_PATH
        theirs = dict(parse_origins(path.read_bytes())) if path.exists() else {}
        ours = {parse_key(key).rel: value for key, value in self._scan(KeyKind.ORIGIN).items()}
        for origin in sorted({*ours, *theirs}):
            value = ours.get(origin)
            known = None if value is None else int.from_bytes(value, "little")
            self.result.check("origin", str(origin), known, theirs.get(origin))

    def compare_checkpoint(self) -> None:
        """Fields that the recovered server's own last checkpoint took over from what it had redone."""
        version = self.timeline.pg_version
        control = ControlFile.unpack((self.data_dir / "global/pg_control").read_bytes(), version)
        value = self.timeline.get_value(make_key(KeyKind.CHECKPOINT), self.lsn)
        assert value is not None
        ours, theirs = CheckpointState.unpack(value).checkpoint, control.checkpoint
        known, wanted = stored_next_xid(ours.next_xid), stored_next_xid(theirs.next_xid)
        self.result.check("field", "next_xid", known, wanted)
        for name in (
            "next_oid",
            "next_multi",
            "next_multi_offset",
            "oldest_xid",
            "oldest_xid_db",
            "oldest_multi",
            "oldest_multi_db",
            "oldest_commit_ts_xid",
            "newest_commit_ts_xid",
        ):
            self.result.check("field", name, getattr(ours, name), getattr(theirs, name))

    async def compare_pages(self, sizes: dict[bytes, int], count: int) -> None:
        """Drawn so that small relations are not forgotten: a relation first, then a page of it."""
        forks = [
            fields for key, size in sizes.items() if size and (fields := parse_key(key)).fork != Fork.FSM
        ]
        for _ in range(count if forks else 0):
            fields = self.chance.choice(forks)
            relation = Relation(*fields[1:4])
            size = sizes[relation_size_key(relation, fields.fork)]
            block = self.chance.randrange(size)
            key = relation_block_key(relation, fields.fork, block)
            path = self.data_dir / relation_path(relation, fields.fork)
            if not path.exists():
                continue  # reported with the sizes
            with path.open("rb") as file:
                file.seek(block * BLOCK_SIZE_BYTES)
                theirs = file.read(BLOCK_SIZE_BYTES)
            await self.compare_page(key, theirs)

    async def compare_page(self, key: bytes, theirs: bytes) -> None:
        fork = parse_key(key).fork
        ours = await self.timeline.get_pages(key, 1, self.lsn)
        self.result.compared["page"] += 1
        if len(theirs) < BLOCK_SIZE_BYTES:
            missing = f"{describe_key(key)}: the stock server's file ends before it"
            self.result.wrong.append(f"at {format_lsn(self.lsn)} page {missing}")
        elif _comparable(fork, ours) != _comparable(fork, theirs):
            described = self.describe_difference(key, ours, theirs)
            self.result.wrong.append(f"at {format_lsn(self.lsn)} page {described}")

    def describe_difference(self, key: bytes, ours: bytes, theirs: bytes) -> str:
        return describe_key(key)


def _comparable(fork: int, page: bytes) -> bytes:
    """A map page nobody has set a bit in may be all zeros or have a header, as PostgreSQL pleases."""
    if fork == Fork.VM and not any(map_bits(page)):
        return b""
    return page


async def compare_history(
    history: History, timeline: Timeline, root: Path, lsns: list[Lsn], pages: int, seed: int
) -> Comparison:
    """Compares at each LSN; one sum of all."""
    total = Comparison(Lsn(0))
    for lsn in lsns:
        data_dir = await asyncio.to_thread(recover, history, lsn, root / f"recovered-{lsn:x}")
        part = await Comparer(timeline, lsn, data_dir, Random(seed ^ lsn)).compare(pages)
        total.compared += part.compared
        total.wrong += part.wrong
        shutil.rmtree(data_dir)
    return total
