"""Timelines by example: values in, pages out, from memory, from files, through branches and restarts."""

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from excimer.base.errors import CorruptionError, FencedError
from excimer.base.ids import TimelineId
from excimer.base.keys import (
    BLOCK_SIZE_BYTES,
    Fork,
    KeyKind,
    Relation,
    kind_range,
    make_key,
    relation_block_key,
    relation_size_key,
)
from excimer.base.lsn import Lsn
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.errors import (
    IngestPausedError,
    LsnTimeoutError,
    LsnTooOldError,
    NoSuchPageError,
    PageRebuildError,
    TimelineExistsError,
    TimelineHasBranchesError,
    TimelineMissingError,
)
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.values import Value, ValueKind
from excimer.storage.plan.branch import BranchPointError
from tests.kit.storage_world import (
    MAIN,
    START,
    FakeRedo,
    attach,
    expected_page,
    image_of,
    in_event_loop,
    new_main,
    put,
    record_value,
    size_value,
    storage_context,
)

TABLE = Relation(1663, 5, 16384)
SIZE = relation_size_key(TABLE, Fork.MAIN)
VM_SIZE = relation_size_key(TABLE, Fork.VM)
BRANCH = TimelineId("22" * 16)


def block(number: int, fork: Fork = Fork.MAIN) -> bytes:
    return relation_block_key(TABLE, fork, number)


def image(key: bytes, lsn: int, text: bytes) -> Value:
    return Value(key, lsn, ValueKind.IMAGE, True, image_of(text))


IMPORTED = [(SIZE, (4).to_bytes(4, "little")), (block(0), image_of(b"0")), (block(1), image_of(b"1")),
            (block(2), bytes(BLOCK_SIZE_BYTES))]  # fmt: skip


def history() -> list[Value]:
    return [
        record_value(block(0), 0x1010, b"first"),
        size_value(SIZE, 0x1020, 6),
        record_value(block(5), 0x1020, b"new page", will_init=True),
        record_value(block(0), 0x1030, b"second record, of a length that needs padding"),
        record_value(block(5), 0x1038, b"x"),
        image(block(1), 0x1040, b"replaced"),
        record_value(block(1), 0x1048, b"after it"),
    ]


async def check_history(timeline: Timeline) -> None:
    base = image(block(0), 0x1000, b"0")
    chain = [base, record_value(block(0), 0x1010, b"first")]
    assert await timeline.get_pages(block(0), 1, START) == image_of(b"0")
    assert await timeline.get_pages(block(0), 1, Lsn(0x102F)) == expected_page(chain)
    chain.append(record_value(block(0), 0x1030, b"second record, of a length that needs padding"))
    replaced = [image(block(1), 0x1040, b"replaced"), record_value(block(1), 0x1048, b"after it")]
    init = [
        record_value(block(5), 0x1020, b"new page", will_init=True),
        record_value(block(5), 0x1038, b"x"),
    ]
    assert await timeline.get_pages(block(0), 6, Lsn(0x1048)) == (
        expected_page(chain) + expected_page(replaced) + bytes(3 * BLOCK_SIZE_BYTES) + expected_page(init)
    )
    with pytest.raises(NoSuchPageError, match=r"16384 main 4 is not there at LSN 0/1010: it has 4 blocks"):
        await timeline.get_pages(block(3), 3, Lsn(0x1010))


@in_event_loop
async def test_reads_from_memory_from_files_and_after_a_restart(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        put(timeline, history())
        await check_history(timeline)
        await timeline.flush()
        assert timeline.stack.open.value_count == 0
        assert timeline.disk_consistent_lsn == timeline.remote_consistent_lsn == 0x1048
        await check_history(timeline)
        again = (await attach(context, generation=2)).timeline(MAIN)
        assert (again.last_record_lsn, again.prev_record_lsn) == (0x1048, 0x1040)
        await check_history(again)


@in_event_loop
async def test_missing_local_files_are_brought_again(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        put(timeline, history())
        await timeline.flush()
        for path in timeline.home.local_dir.iterdir():
            path.unlink()
        await check_history((await attach(context, generation=2)).timeline(MAIN))


@in_event_loop
async def test_a_branch_sees_its_ancestor_up_to_the_branch_point(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        main = await tenant.create_timeline(new_main(), IMPORTED)
        put(main, history())
        branch = await tenant.branch_timeline(BRANCH, MAIN, lsn=Lsn(0x1030), prev_record_lsn=Lsn(0x1028))
        assert (branch.last_record_lsn, branch.prev_record_lsn) == (0x1030, 0x1028)
        put(branch, [record_value(block(1), 0x1040, b"on the branch")])
        mine = [image(block(1), 0x1000, b"1"), record_value(block(1), 0x1040, b"on the branch")]
        assert await branch.get_pages(block(1), 1, Lsn(0x1040)) == expected_page(mine)
        assert await branch.get_pages(block(1), 1, Lsn(0x1030)) == image_of(b"1")
        replaced = [image(block(1), 0x1040, b"replaced"), record_value(block(1), 0x1048, b"after it")]
        assert await main.get_pages(block(1), 1, Lsn(0x1048)) == expected_page(replaced)
        await main.flush()
        await branch.flush()
        again = await attach(context, generation=2)
        assert await again.timeline(BRANCH).get_pages(block(1), 1, Lsn(0x1040)) == expected_page(mine)
        with pytest.raises(TimelineHasBranchesError):
            await again.delete_timeline(MAIN)
        await again.delete_timeline(BRANCH)
        with pytest.raises(TimelineMissingError):
            (await attach(context, generation=3)).timeline(BRANCH)


@in_event_loop
async def test_refused_branches(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        await tenant.create_timeline(new_main(), IMPORTED)
        for lsn in (0xFF8, 0x1008):
            with pytest.raises(BranchPointError, match="from 0/1000 to 0/1000"):
                await tenant.branch_timeline(BRANCH, MAIN, lsn=Lsn(lsn), prev_record_lsn=Lsn(0))
        with pytest.raises(TimelineExistsError):
            await tenant.branch_timeline(MAIN, MAIN)


@in_event_loop
async def test_refused_reads(tmp_path: Path) -> None:
    redo = FakeRedo()
    async with storage_context(tmp_path, redo=redo) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        put(timeline, history())
        with pytest.raises(LsnTimeoutError):
            await timeline.get_pages(block(0), 1, Lsn(0x1049))
        with pytest.raises(LsnTooOldError):
            await timeline.get_pages(block(0), 1, Lsn(0xFFF))
        with pytest.raises(NoSuchPageError, match="it does not exist"):
            await timeline.get_pages(relation_block_key(Relation(1663, 5, 1), 0, 0), 1, START)
        put(timeline, [size_value(SIZE, 0x1050, None)])
        with pytest.raises(NoSuchPageError, match="it does not exist"):
            await timeline.get_pages(block(0), 1, Lsn(0x1050))
        redo.fail_next = ValueError("PANIC: invalid lp")
        with pytest.raises(PageRebuildError, match=r"block 1663/5/16384 main 0 .* 0/1048: PANIC: invalid lp"):
            await timeline.get_pages(block(0), 1, Lsn(0x1048))
        await check_history(timeline)


@in_event_loop
async def test_native_chains_and_mixed_chains(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        key = block(0, Fork.VM)
        chain = [
            Value(key, 0x1010, ValueKind.NATIVE, False, b"set"),
            Value(key, 0x1018, ValueKind.NATIVE, False, b"clear"),
            record_value(key, 0x1020, b"by redo"),
            Value(key, 0x1028, ValueKind.NATIVE, False, b"set again"),
            record_value(key, 0x1030, b"by redo again"),
        ]
        put(timeline, [size_value(VM_SIZE, 0x1008, 2), *chain])
        for end in range(len(chain) + 1):
            lsn = Lsn(0x1008 + 8 * end)
            expected = expected_page(chain[:end]) + bytes(BLOCK_SIZE_BYTES)
            assert await timeline.get_pages(key, 2, lsn) == expected


@in_event_loop
async def test_a_damaged_native_record_names_its_block(tmp_path: Path) -> None:
    def refuse(page: bytearray, payload: bytes, lsn: int) -> None:
        raise CorruptionError("native record has unknown operation 99")

    async with storage_context(tmp_path) as context:
        context = dataclasses.replace(context, apply_native=refuse)
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        key = block(1, Fork.VM)
        put(timeline, [size_value(VM_SIZE, 0x1008, 2), Value(key, 0x1010, ValueKind.NATIVE, False, b"c")])
        with pytest.raises(PageRebuildError, match=r"vm 1 .* operation 99 \(made at 0/1010\)"):
            await timeline.get_pages(block(0, Fork.VM), 2, Lsn(0x1010))


@in_event_loop
async def test_scan_and_get_value(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        timeline = await tenant.create_timeline(new_main(), IMPORTED)
        put(timeline, [size_value(VM_SIZE, 0x1010, 1), size_value(SIZE, 0x1018, 9)])
        await timeline.flush()
        put(timeline, [size_value(VM_SIZE, 0x1020, None), size_value(SIZE, 0x1028, 10)])
        sizes = kind_range(KeyKind.RELATION_SIZE)
        four, nine, ten, one = ((number).to_bytes(4, "little") for number in (4, 9, 10, 1))
        for _ in range(2):  # the second time from the cache
            assert timeline.scan(*sizes, START) == [(SIZE, four)]
            assert timeline.scan(*sizes, Lsn(0x1018)) == [(SIZE, nine), (VM_SIZE, one)]
            assert timeline.scan(*sizes, Lsn(0x1028)) == [(SIZE, ten)]
            assert timeline.get_value(SIZE, Lsn(0x1028)) == ten
            assert timeline.get_value(SIZE, Lsn(0x1027)) == nine
            assert timeline.get_value(VM_SIZE, Lsn(0x1028)) is None
            assert timeline.get_value(VM_SIZE, Lsn(0x101F)) == one
            assert timeline.get_value_and_lsn(SIZE, Lsn(0x1020)) == (0x1018, nine)
        branch = await tenant.branch_timeline(BRANCH, MAIN, lsn=Lsn(0x1020), prev_record_lsn=Lsn(0x1018))
        assert branch.get_value(SIZE, Lsn(0x1020)) == nine
        assert branch.scan(*sizes, Lsn(0x1020)) == [(SIZE, nine)]
        assert branch.get_value(make_key(KeyKind.CHECKPOINT), Lsn(0x1020)) is None


@in_event_loop
async def test_values_of_the_ancestor_are_not_cached_past_their_time(tmp_path: Path) -> None:
    """Found by the oracle: a value cached for an LSN below the branch point served above it."""
    async with storage_context(tmp_path) as context:
        tenant = await attach(context)
        main = await tenant.create_timeline(new_main(), IMPORTED)
        put(main, [size_value(SIZE, 0x1010, 5)])
        put(main, [size_value(SIZE, 0x1020, 6)])
        branch = await tenant.branch_timeline(BRANCH, MAIN)
        put(branch, [size_value(VM_SIZE, 0x1030, 1)])
        sizes = [branch.size_blocks(block(0), Lsn(lsn)) for lsn in (0x1000, 0x1010, 0x1020, 0x1030)]
        assert sizes == [4, 5, 6, 6]


@in_event_loop
async def test_what_was_dropped_before_a_complete_round_was_there_before(tmp_path: Path) -> None:
    """Found by the model: images of all live keys are without it, which says nothing about earlier."""
    settings = StorageSettings(compaction_threshold=1, image_creation_threshold=1)
    async with storage_context(tmp_path, settings=settings) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), [])
        put(timeline, [size_value(VM_SIZE, 0x1010, 3), size_value(SIZE, 0x1018, 4)])
        put(timeline, [size_value(VM_SIZE, 0x1020, None), size_value(SIZE, 0x1028, None)])
        put(timeline, [Value(make_key(KeyKind.RELATION_MAP), 0x1030, ValueKind.IMAGE, True, b"map")])
        assert timeline.size_blocks(block(0, Fork.VM), Lsn(0x1018)) == 3  # and is in the cache
        await timeline.flush()
        assert await timeline.compact()
        assert await timeline.compact()
        assert has_image_at(timeline, 0x1030)
        for lsn, vm_blocks, blocks in ((0x1030, None, None), (0x1018, 3, 4), (0x1030, None, None)):
            assert timeline.size_blocks(block(0, Fork.VM), Lsn(lsn)) == vm_blocks
            assert timeline.size_blocks(block(0), Lsn(lsn)) == blocks


@in_event_loop
async def test_waiting_for_an_lsn(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        with pytest.raises(LsnTimeoutError, match="has not reached LSN 0/1010, it is at 0/1000"):
            await timeline.wait_for_lsn(Lsn(0x1010), 0.01)
        async with asyncio.TaskGroup() as group:
            group.create_task(timeline.wait_for_lsn(Lsn(0x1010), 5))
            await asyncio.sleep(0)
            await asyncio.to_thread(put, timeline, [size_value(SIZE, 0x1010, 5)])


@in_event_loop
async def test_ingest_pauses_when_nothing_becomes_durable(tmp_path: Path) -> None:
    settings = StorageSettings(flush_size_bytes=100_000, frozen_layers_max=2)
    async with storage_context(tmp_path, settings=settings) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        lsn = 0x1000
        with suppress(IngestPausedError):
            while lsn < 0x2000:
                put(timeline, [image(block(0), lsn + 8, b"%d" % lsn)])
                lsn += 8
        assert timeline.last_record_lsn == lsn < 0x2000
        waiting = asyncio.ensure_future(timeline.wait_for_room())
        await timeline.flush()
        await waiting
        put(timeline, [image(block(0), lsn + 8, b"more")])
        assert await timeline.get_pages(block(0), 1, Lsn(lsn + 8)) == image_of(b"more")


@in_event_loop
async def test_run_flushes_by_size(tmp_path: Path) -> None:
    settings = StorageSettings(flush_size_bytes=100_000)
    async with storage_context(tmp_path, settings=settings) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        running = asyncio.ensure_future(timeline.run())
        for number in range(40):  # from another thread, which waits while flushes are behind
            await asyncio.to_thread(put, timeline, [image(block(0), 0x1008 + 8 * number, b"%d" % number)])
        async with asyncio.timeout(10):
            while timeline.disk_consistent_lsn == START:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


def has_image_at(timeline: Timeline, lsn: int) -> bool:
    return any(layer.is_image and layer.end_lsn == lsn for layer in timeline.stack.disk.layers)


class CountingExecutor(ThreadPoolExecutor):
    def __init__(self) -> None:
        super().__init__(2)
        self.count = 0

    def submit(self, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        return super().submit(*arguments, **named)

    async def wait_quiet(self) -> None:
        """What there was to do at first has been done."""
        before = -1
        while before != self.count:
            before = self.count
            await asyncio.sleep(0.1)


@in_event_loop
async def test_an_idle_timeline_wakes_up_for_nothing(tmp_path: Path) -> None:
    settings = StorageSettings(flush_interval_s=0.01)
    async with storage_context(tmp_path, settings=settings) as context:
        executor = CountingExecutor()
        counting = dataclasses.replace(context, executor=executor)
        timeline = await (await attach(counting)).create_timeline(new_main(), IMPORTED)
        running = asyncio.ensure_future(timeline.run())
        async with asyncio.timeout(30):
            await executor.wait_quiet()
        before = executor.count
        await asyncio.sleep(0.2)
        assert executor.count == before
        flushed = asyncio.Event()
        timeline.on_flushed = flushed.set
        for lsn in (0x1008, 0x1010):
            flushed.clear()
            put(timeline, [image(block(0), lsn, b"more")])
            async with asyncio.timeout(10):
                await flushed.wait()
            assert timeline.disk_consistent_lsn == lsn
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        executor.shutdown()


@in_event_loop
async def test_run_compacts_and_reads_get_short(tmp_path: Path) -> None:
    async with storage_context(
        tmp_path, settings=StorageSettings(compaction_threshold=2, image_creation_threshold=1)
    ) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        running = asyncio.ensure_future(timeline.run())
        chain = [image(block(0), START, b"0")]
        for number in range(4):
            chain.append(record_value(block(0), 0x1008 + 8 * number, b"%d" % number))
            put(timeline, [chain[-1]])
            await timeline.flush()
        async with asyncio.timeout(10):
            while not has_image_at(timeline, 0x1020):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await timeline.get_pages(block(0), 1, Lsn(0x1020)) == expected_page(chain)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


@in_event_loop
async def test_an_overtaken_timeline_stops_running(tmp_path: Path) -> None:
    settings = StorageSettings(flush_interval_s=0.02)
    async with storage_context(tmp_path, settings=settings) as context:
        first = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        twin = (await attach(context)).timeline(MAIN)
        put(twin, history())
        await twin.flush()
        put(first, [image(block(0), 0x1010, b"stale")])
        async with asyncio.timeout(10):
            with pytest.raises(FencedError, match="must stop"):
                await first.run()


@in_event_loop
async def test_an_older_generation_is_fenced(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        first = await (await attach(context, generation=1)).create_timeline(new_main(), IMPORTED)
        twin = (await attach(context, generation=1)).timeline(MAIN)
        second = (await attach(context, generation=2)).timeline(MAIN)
        put(second, history())
        await second.flush()
        with pytest.raises(FencedError, match="generation 2"):
            await attach(context, generation=1)
        put(first, [image(block(0), 0x1010, b"stale")])
        await first.flush()  # harmless: nobody reads generation 1 any more
        put(twin, [image(block(0), 0x1010, b"stale too")])
        with pytest.raises(FencedError, match="must stop"):
            await twin.flush()
        await check_history((await attach(context, generation=3)).timeline(MAIN))


@in_event_loop
async def test_values_out_of_order_are_refused(tmp_path: Path) -> None:
    async with storage_context(tmp_path) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        put(timeline, history())
        for lsn in (0x1048, 0x1000):
            with pytest.raises(ValueError, match=r"LSN|put before"):
                put(timeline, [image(block(0), lsn, b"again")])
        await check_history(timeline)
