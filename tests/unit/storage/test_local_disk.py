"""The local disk as a cache: what goes when it is full, and that nobody notices but by waiting."""

import asyncio
import errno
import random
import shutil
import threading
from pathlib import Path

import pytest

from excimer.base.keys import MAX_KEY, MIN_KEY, Relation, relation_block_key, relation_size_key
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.io.filesystem import FaultyFilesystem
from excimer.io.object_store import FaultyObjectStore, MemoryObjectStore, ObjectStoreError
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.local_disk import LocalDisk
from excimer.storage.engine.partial_copy import LayerMissingError
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.values import Value, ValueKind
from tests.kit.storage_world import (
    MAIN,
    START,
    attach,
    in_event_loop,
    new_main,
    put,
    size_value,
    storage_context,
)

TABLE = Relation(1663, 5, 16384)
BLOCKS = 6
UNCOMPACTED = StorageSettings(compaction_threshold=1000)


class Copy:
    def __init__(self, disk: LocalDisk, name: str) -> None:
        self._disk = disk
        self.name = name
        self.last_used = 0
        self.evicted = False

    def evict(self) -> None:
        self.evicted = True

    def use(self, size_bytes: int) -> None:
        self.last_used = self._disk.next_tick()
        self.evicted = False
        self._disk.use(self, size_bytes)


def test_the_least_recently_used_goes_until_low_water() -> None:
    disk = LocalDisk(1000)
    copies = [Copy(disk, str(number)) for number in range(11)]
    for copy in copies[:10]:
        copy.use(100)
    copies[0].use(100)
    assert not any(copy.evicted for copy in copies)
    assert not disk.has_room(1)
    copies[10].use(100)
    assert [copy.name for copy in copies if copy.evicted] == ["1", "2"]
    assert (disk.size_bytes, disk.copies, disk.evictions, disk.evicted_bytes) == (900, 9, 2, 200)
    copies[10].use(5000)  # larger than all there is: it alone stays
    assert [copy.name for copy in copies if not copy.evicted] == ["10"]
    copies[10].use(0)
    assert (disk.size_bytes, disk.copies) == (0, 0)


def test_background_jobs_are_few_and_end_with_the_disk() -> None:
    disk = LocalDisk()
    done: list[int] = []
    assert disk.in_background(lambda: done.append(1))
    disk.wait_idle()
    assert done == [1]
    disk.close()
    assert not disk.in_background(lambda: done.append(2))
    disk.wait_idle()


async def fill(context: StorageContext, rounds: int) -> tuple[Timeline, list[bytes]]:
    """A timeline of `rounds` layers, and the pages of its table at the end."""
    chance = random.Random(11)
    tenant = await attach(context)
    timeline = await tenant.create_timeline(new_main(), [])
    pages = [b""] * BLOCKS
    lsn = START
    for _ in range(rounds):
        lsn = Lsn(lsn + 0x100)
        for at in range(BLOCKS):
            pages[at] = chance.randbytes(8192)
        values = [
            Value(relation_block_key(TABLE, 0, at), lsn, ValueKind.IMAGE, True, pages[at])
            for at in range(BLOCKS)
        ]
        put(timeline, [*values, size_value(relation_size_key(TABLE, 0), lsn, BLOCKS)])
        await timeline.flush()
    return timeline, pages


async def read_table(timeline: Timeline, lsn: Lsn | None = None) -> bytes:
    return await timeline.get_pages(
        relation_block_key(TABLE, 0, 0), BLOCKS, timeline.last_record_lsn if lsn is None else lsn
    )


@in_event_loop
async def test_reads_go_on_while_layers_are_evicted(tmp_path: Path) -> None:
    """The disk holds three layers of eight, and no block stays in memory."""
    disk = LocalDisk(160_000)
    async with storage_context(tmp_path, local_disk=disk, settings=UNCOMPACTED) as context:
        timeline, pages = await fill(context, 8)
        context.cache.size_bytes_max = 0
        assert disk.size_bytes <= 160_000
        assert disk.evictions >= 4
        ends = [START + 0x100 * (number + 1) for number in range(8)]
        expected = {lsn: await read_table(timeline, Lsn(lsn)) for lsn in ends}
        assert expected[ends[-1]] == b"".join(pages)

        async def reader(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(40):
                lsn = chance.choice(ends)
                assert await read_table(timeline, Lsn(lsn)) == expected[lsn]

        await asyncio.gather(*(reader(seed) for seed in range(4)))
        disk.wait_idle()
        assert disk.evictions > 20
        on_disk = sum(path.stat().st_size for path in timeline.home.local_dir.iterdir())
        assert on_disk <= 200_000, "what was evicted is still there"


@in_event_loop
async def test_local_files_that_vanish_are_fetched_again(tmp_path: Path) -> None:
    """While it runs: what is open goes on, the rest comes from object storage, new layers are written."""
    async with storage_context(tmp_path / "local", settings=UNCOMPACTED) as context:
        timeline, pages = await fill(context, 3)
        shutil.rmtree(tmp_path / "local")
        assert await read_table(timeline) == b"".join(pages)
        lsn = Lsn(timeline.last_record_lsn + 0x100)
        put(timeline, [Value(relation_block_key(TABLE, 0, 0), lsn, ValueKind.IMAGE, True, pages[1])])
        await timeline.flush()
        shutil.rmtree(tmp_path / "local")
        await timeline.close()
        again = (await attach(context, 2)).timeline(MAIN)
        assert await read_table(again) == b"".join([pages[1], *pages[1:]])


@in_event_loop
async def test_a_layer_that_vanishes_before_its_upload_is_written_again(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    away = False

    def fault(operation: str, name: str) -> None:
        if away and operation == "put_file":
            raise ObjectStoreError("away")

    store = FaultyObjectStore(objects, fault)
    async with storage_context(tmp_path / "local", store=store, settings=UNCOMPACTED) as context:
        timeline, pages = await fill(context, 1)
        lsn = Lsn(timeline.last_record_lsn + 0x100)
        put(timeline, [Value(relation_block_key(TABLE, 0, 0), lsn, ValueKind.IMAGE, True, pages[1])])
        away = True
        with pytest.raises(ObjectStoreError):
            await timeline.flush()
        assert (context.uploads.failures, context.uploads.retries) == (1, 3)
        shutil.rmtree(tmp_path / "local")
        away = False
        await timeline.flush()
        assert context.uploads.layers_pending == 0
        assert context.uploads.layers_uploaded == 2
        again = (await attach(context, 2)).timeline(MAIN)
        assert await read_table(again) == b"".join([pages[1], *pages[1:]])


@in_event_loop
async def test_a_full_file_system_costs_copies_and_no_flush(tmp_path: Path) -> None:
    """It holds 160 kB, which the bound does not know; all of them copies that are in object storage."""
    directory = tmp_path / "local"

    def full(operation: str, path: Path) -> None:
        taken = sum(each.stat().st_size for each in directory.rglob("*") if each.is_file())
        if operation == "write" and taken > 160_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    disk = LocalDisk()
    async with storage_context(
        directory, filesystem=FaultyFilesystem(full), settings=UNCOMPACTED, local_disk=disk
    ) as context:
        timeline, pages = await fill(context, 3)

        async def write_on() -> None:
            for _ in range(3):
                lsn = Lsn(timeline.last_record_lsn + 0x100)
                put(timeline, [Value(relation_block_key(TABLE, 0, 0), lsn, ValueKind.IMAGE, True, pages[0])])
                await timeline.flush()

        with pytest.raises(OSError, match="No space"):
            await write_on()
        assert disk.evictions >= 1
        await timeline.flush()
        assert timeline.disk_consistent_lsn == timeline.last_record_lsn
        assert await read_table(timeline) == b"".join([pages[0], *pages[1:]])


@in_event_loop
async def test_a_layer_missing_in_object_storage_fails_only_the_reads_that_need_it(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path / "one", store=objects, settings=UNCOMPACTED) as context:
        timeline, pages = await fill(context, 3)
        ends = [START + 0x100 * (number + 1) for number in range(3)]
        by_end = {layer.end_lsn: layer for layer in timeline.manifest.layers}
        lost = timeline.home.object_name(by_end[ends[1]])
        await timeline.close()
    objects.delete(lost)
    async with storage_context(tmp_path / "two", store=objects, settings=UNCOMPACTED) as context:
        timeline = (await attach(context, 2)).timeline(MAIN)
        assert await read_table(timeline) == b"".join(pages)
        await read_table(timeline, Lsn(ends[0]))
        with pytest.raises(LayerMissingError, match=lost):
            await read_table(timeline, Lsn(ends[1]))
        assert await read_table(timeline) == b"".join(pages)


class Together(MemoryObjectStore):
    """Answers requests for parts of layers only when so many have come."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__()
        self.objects = objects
        self.crowd: threading.Barrier | None = None

    def get_range(self, name: str, start: int, end: int) -> bytes:
        if self.crowd is not None:
            self.crowd.wait(30)
        return super().get_range(name, start, end)


@in_event_loop
async def test_a_read_of_several_layers_that_are_not_here_fetches_them_together(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path / "one", store=objects, settings=UNCOMPACTED) as context:
        timeline, pages = await fill(context, 1)
        last = relation_block_key(TABLE, 0, BLOCKS - 1)
        for number in range(3):  # from the first block to beyond the size's key: in every read's way
            lsn = Lsn(timeline.last_record_lsn + 0x100)
            block = Value(relation_block_key(TABLE, 0, 0), lsn, ValueKind.IMAGE, True, pages[number])
            put(timeline, [block, size_value(relation_size_key(TABLE, 1), lsn, number)])
            await timeline.flush()
        await timeline.close()
    store = Together(objects.objects)
    async with storage_context(tmp_path / "two", store=store, settings=UNCOMPACTED) as context:
        timeline = (await attach(context, 2)).timeline(MAIN)
        store.crowd = threading.Barrier(4)
        size = await asyncio.to_thread(timeline.size_blocks, last, timeline.last_record_lsn)
        assert size == BLOCKS
        store.crowd = None
        assert await timeline.get_pages(last, 1, timeline.last_record_lsn) == pages[-1]
        assert context.local_disk.fetches == 4


@in_event_loop
async def test_what_is_here_is_counted_at_attachment_and_strangers_go(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects, settings=UNCOMPACTED) as context:
        timeline, _ = await fill(context, 3)
        taken = context.local_disk.size_bytes
        assert taken == sum(layer.size_bytes for layer in timeline.manifest.layers)
        directory = timeline.home.local_dir
    (directory / f"{timeline.manifest.layers[0].name}.partial").write_bytes(b"some")
    disk = LocalDisk()
    async with storage_context(tmp_path, store=objects, settings=UNCOMPACTED, local_disk=disk) as context:
        tenant = await attach(context, 2)
        assert disk.size_bytes == taken
        names = {path.name for path in directory.iterdir()}
        assert names == {layer.name for layer in tenant.timeline(MAIN).manifest.layers}
        for file in tenant.timeline(MAIN).stack.files.values():
            assert list(file.blocks(MIN_KEY, MAX_KEY, 0, MAX_LSN))
        assert disk.fetches == 0
        await tenant.close()
        assert disk.size_bytes == 0
