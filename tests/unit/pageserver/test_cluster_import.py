"""Imports by example: small clusters in, values out; what is refused or cut short leaves nothing."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from excimer.base.errors import ExcimerError
from excimer.base.ids import TimelineId
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    KeyKind,
    Relation,
    make_key,
    origin_key,
    relation_block_key,
    relation_size_key,
    slru_size_key,
    two_phase_key,
)
from excimer.base.lsn import Lsn
from excimer.io.object_store import MemoryObjectStore
from excimer.pageserver.cluster_images import ClusterBuiltDifferentlyError, ClusterImages
from excimer.pageserver.cluster_import import (
    ClusterImport,
    DatabaseCopiedError,
    ImportIncompleteError,
    TablespacesError,
)
from excimer.pageserver.endpoints.import_api import SenderLostError
from excimer.pageserver.running_imports import ImportBrokenOffError, RunningImports
from excimer.pgformat.checkpoint_state import CheckpointState
from excimer.pgformat.cluster_files import ClusterFileError, identify_file
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.replication_origins import (
    ORIGINS_PATH,
    OriginProgress,
    OriginsFileError,
    pack_origins,
)
from excimer.pgformat.tar_stream import END_OF_TAR, pack_file_header, padding
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.format.relation_size import FIRST_BIRTH_LSN, RelationSize, pack_relation_size
from excimer.wire.import_stream import (
    FilesEnd,
    ImportBegin,
    ImportStreamError,
    encode_begin,
    encode_end,
    encode_files_end,
    encode_tar,
)
from tests.kit.control_files import CHECKPOINT, CONTROL, SEGMENT
from tests.kit.storage_world import attach, image_of, in_event_loop, storage_context

MAIN = TimelineId("11" * 16)
START = Lsn(0x2000128)
OURS = msgspec.structs.replace(CONTROL, block_size=BLOCK_SIZE_BYTES, system_id=77)
THEIRS = msgspec.structs.replace(
    OURS,
    data_checksum_version=1,
    checkpoint=msgspec.structs.replace(CHECKPOINT, timeline=3, prev_timeline=2, next_xid=(5 << 32) + 750),
)
PAGES = [image_of(b"0"), bytes(BLOCK_SIZE_BYTES), image_of(b"2")]
FILES = {
    "PG_VERSION": b"18\n",
    "base/5/PG_VERSION": b"18\n",
    "base/5/pg_filenode.map": b"map",
    "base/5/16384": b"".join(PAGES) + b"half a block",
    "base/5/16384.1": b"",
    "base/5/16385": image_of(b"unlogged"),
    "base/5/16385_init": image_of(b"empty"),
    "base/5/t3_16386": image_of(b"temporary"),
    "base/pgsql_tmp/pgsql_tmp7.0": b"sorted",
    "pg_xact/0000": image_of(b"clog"),
    "pg_twophase/00000005000002EC": b"prepared",
    ORIGINS_PATH: pack_origins([OriginProgress(7, Lsn(0xA_0000_9000))]),
    "postgresql.conf": b"fsync = off",
    "global/pg_control": THEIRS.pack(),
}
BEGIN = ImportBegin(
    pg_version=18,
    system_id=77,
    wal_segment_size_bytes=SEGMENT,
    start_lsn=START,
    prev_record_lsn=Lsn(0x2000080),
)
TABLE = Relation(1663, 5, 16384)


def tar(files: dict[str, bytes]) -> bytes:
    members = (pack_file_header(path, len(data)) + data + padding(len(data)) for path, data in files.items())
    return b"".join(members) + END_OF_TAR


def stream(files: dict[str, bytes], *, begin: ImportBegin = BEGIN, readable_lsn: int = START) -> bytes:
    parts = [encode_begin(begin), encode_tar(tar(files))]
    return b"".join([*parts, encode_files_end(FilesEnd(readable_lsn=Lsn(readable_lsn))), encode_end()])


async def chunks(data: bytes, size: int = 5000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def new_job(tenant: TenantStorage, threads: ThreadPoolExecutor, ours: ControlFile = OURS) -> ClusterImport:
    return ClusterImport(tenant, MAIN, threads, lambda _: ours)


@in_event_loop
async def test_a_cluster_becomes_a_timeline(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        async with storage_context(tmp_path) as context:
            tenant = await attach(context)
            job = new_job(tenant, threads)
            made = await job.run(chunks(stream(FILES)))
            timeline = await tenant.finish_import(made, job.readable_lsn)
            assert (timeline.system_id, timeline.wal_segment_size_bytes) == (77, SEGMENT)
            assert (timeline.last_record_lsn, timeline.prev_record_lsn) == (START, 0x2000080)
            assert await timeline.get_pages(relation_block_key(TABLE, 0, 0), 3, START) == b"".join(PAGES)
            sizes = dict(timeline.scan(make_key(KeyKind.RELATION_SIZE), make_key(KeyKind.SLRU_BLOCK), START))
            unlogged = Relation(1663, 5, 16385)
            assert sizes == {
                relation_size_key(TABLE, 0): pack_relation_size(RelationSize(3, FIRST_BIRTH_LSN)),
                relation_size_key(unlogged, 3): pack_relation_size(RelationSize(1, FIRST_BIRTH_LSN)),
            }
            assert timeline.get_value(slru_size_key(0, 0), START) == (1).to_bytes(4, "little")
            assert timeline.get_value(two_phase_key((5 << 32) + 748), START) == b"prepared"
            assert timeline.get_value(origin_key(7), START) == (0xA_0000_9000).to_bytes(8, "little")
            control = timeline.get_value(make_key(KeyKind.CONTROL_FILE), START) or b""
            assert ControlFile.unpack(control, 18).data_checksum_version == 0
            state = CheckpointState.unpack(timeline.get_value(make_key(KeyKind.CHECKPOINT), START) or b"")
            assert (state.checkpoint.timeline, state.checkpoint.next_xid) == (1, (5 << 32) + 750)
            await timeline.close()


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (stream(FILES)[:-5], ImportStreamError, "before the import is complete"),
        (stream(FILES)[:30_000], ImportStreamError, "before the import is complete"),
        (stream(FILES, readable_lsn=START + 8), ImportIncompleteError, "consistent only from 0/2000130 on"),
        (stream({**FILES, "pg_tblspc/16400": b""}), TablespacesError, "tablespaces"),
        (stream({"PG_VERSION": b"18"}), ClusterFileError, "no global/pg_control"),
        (stream({**FILES, "global/pg_control": b"x" * 8192}), ClusterFileError, "checksum is wrong"),
        (
            stream(FILES, begin=msgspec.structs.replace(BEGIN, system_id=78)),
            ClusterFileError,
            "another cluster than the stream says",
        ),
        (stream({**FILES, ORIGINS_PATH: FILES[ORIGINS_PATH][:-1]}), OriginsFileError, "no whole number"),
        (stream({**FILES, ORIGINS_PATH: b"x" + FILES[ORIGINS_PATH][1:]}), OriginsFileError, "is damaged"),
        (encode_tar(b""), ImportStreamError, "files come after the beginning"),
        (encode_begin(BEGIN) * 2, ImportStreamError, "begins twice"),
        (encode_begin(BEGIN) + encode_end(), ImportStreamError, "before the files do"),
        (b"garbage", ImportStreamError, "does not belong here"),
    ],
)
def test_what_is_wrong_or_cut_short_leaves_nothing(
    tmp_path: Path, data: bytes, error: type[ExcimerError], says: str
) -> None:
    @in_event_loop
    async def story() -> None:
        store = MemoryObjectStore()
        with ThreadPoolExecutor(1) as threads:
            async with storage_context(tmp_path, store=store) as context:
                tenant = await attach(context)
                job, imports = new_job(tenant, threads), RunningImports()
                with pytest.raises(error, match=says):
                    async with imports.running(tenant, MAIN, job):
                        await job.run(chunks(data))
                assert not store.objects
                assert not imports.progress()

    story()


@in_event_loop
async def test_a_cluster_of_another_build_is_refused(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        async with storage_context(tmp_path) as context:
            tenant = await attach(context)
            job = new_job(tenant, threads, msgspec.structs.replace(OURS, block_size=16384))
            with pytest.raises(ClusterBuiltDifferentlyError, match=r"has block size 8192, .* has 16384"):
                async with RunningImports().running(tenant, MAIN, job):
                    await job.run(chunks(stream(FILES)))


@in_event_loop
async def test_an_import_is_broken_off_when_its_tenant_is_detached(tmp_path: Path) -> None:
    sent = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield stream(FILES)[:-5]
        sent.set()
        await asyncio.Event().wait()

    store = MemoryObjectStore()
    with ThreadPoolExecutor(1) as threads:
        async with storage_context(tmp_path, store=store) as context:
            tenant = await attach(context)
            job, imports = new_job(tenant, threads), RunningImports()

            async def importing() -> None:
                with pytest.raises(ImportBrokenOffError):
                    async with imports.running(tenant, MAIN, job):
                        await job.run(slow())

            async with asyncio.TaskGroup() as group:
                group.create_task(importing())
                await sent.wait()
                assert store.objects
                assert [each.timeline_id for each in imports.progress()] == [MAIN]
                await imports.break_off()
            assert not store.objects


class SlowRemoval(MemoryObjectStore):
    """Removing waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.is_removing, self.go_on = threading.Event(), threading.Event()

    def delete(self, name: str) -> None:
        self.is_removing.set()
        assert self.go_on.wait(10)
        super().delete(name)


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_an_import_that_is_being_removed_is_waited_for(tmp_path: Path, is_cancelled: bool) -> None:
    """Its sender has gone, and the timeline is deleted twice before all of it is removed; or the process is
    told to stop.
    """

    async def broken() -> AsyncIterator[bytes]:
        yield stream(FILES)[:-5]
        raise SenderLostError("gone")

    @in_event_loop
    async def story() -> None:
        store = SlowRemoval()
        with ThreadPoolExecutor(2) as threads:
            async with storage_context(tmp_path, store=store) as context:
                tenant = await attach(context)
                job, imports = new_job(tenant, threads), RunningImports()

                async def importing() -> None:
                    with pytest.raises(asyncio.CancelledError if is_cancelled else SenderLostError):
                        async with imports.running(tenant, MAIN, job):
                            await job.run(broken())

                async with asyncio.TaskGroup() as group:
                    task = group.create_task(importing())
                    await asyncio.to_thread(store.is_removing.wait, 10)
                    if is_cancelled:
                        task.cancel()
                    deletions = [group.create_task(imports.break_off(MAIN)) for _ in range(2)]
                    await asyncio.sleep(0)
                    assert not any(each.done() for each in deletions)
                    store.go_on.set()
                assert not imports.progress()
                assert not store.objects

    story()


@in_event_loop
async def test_a_database_copied_during_the_backup_ends_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as threads:
        async with storage_context(tmp_path) as context:
            tenant = await attach(context)
            job = new_job(tenant, threads)
            made = await job.run(chunks(stream(FILES)))
            key = relation_block_key(TABLE, 0, 0)
            assert await asyncio.to_thread(job._read_pages, key, 1, START) == PAGES[0]
            job.readable_lsn = Lsn(START + 8)
            with pytest.raises(DatabaseCopiedError):
                job._read_pages(key, 1, START)
            await tenant.abort_import(made)


def test_prepared_transactions_of_the_epoch_before() -> None:
    """Before PostgreSQL 17 a file's name lacks the epoch."""
    added: dict[bytes, bytes] = {}
    images = ClusterImages(16, added.__setitem__)
    control = msgspec.structs.replace(THEIRS, control_version=1300, char_signedness=None)
    for path, data in (("pg_twophase/FFFFFFF0", b"old"), ("pg_twophase/00000010", b"new")):
        file = identify_file(path)
        assert file is not None
        images.begin_file(file)
        images.feed(data)
        images.end_file()
    file = identify_file("global/pg_control")
    assert file is not None
    images.begin_file(file)
    images.feed(control.pack())
    images.end_file()
    images.finish()
    assert added[two_phase_key((4 << 32) + 0xFFFFFFF0)] == b"old"
    assert added[two_phase_key((5 << 32) + 0x10)] == b"new"
