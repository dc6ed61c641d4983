"""Ingest is slowed by how far compaction is behind: decided by a pure function, obeyed by `put_batch`."""

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.lsn import Lsn
from excimer.io.object_store import MemoryObjectStore
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.layer_file import DamagedLayerError
from excimer.storage.format.values import pack_batch
from excimer.storage.plan.ingest_throttle import FULL_SPEED_BYTES_PER_S, ThrottleLimits, plan_put_delay_s
from tests.kit.storage_oracle import IMPORTED, TimelineOracle
from tests.kit.storage_world import attach, in_event_loop, new_main, storage_context

LIMITS = ThrottleLimits(slow_from=8, slowest_from=24, delay_max_s=2.0)
MIB = 1 << 20


def test_no_delay_while_compaction_keeps_up() -> None:
    assert [plan_put_delay_s(count, 100 * MIB, LIMITS) for count in range(9)] == [0.0] * 9


def test_half_way_is_half_the_speed() -> None:
    batch = MIB
    delay_s = plan_put_delay_s(16, batch, LIMITS)
    assert batch / (batch / FULL_SPEED_BYTES_PER_S + delay_s) == FULL_SPEED_BYTES_PER_S / 2


def test_the_slowest_is_not_a_stop() -> None:
    assert [plan_put_delay_s(count, 1, LIMITS) for count in (24, 25, 1000)] == [2.0] * 3


@given(count=st.integers(0, 40), size=st.integers(0, 200 * MIB), more=st.integers(0, 10))
def test_it_never_falls_with_more_layers_or_larger_batches(count: int, size: int, more: int) -> None:
    delay_s = plan_put_delay_s(count, size, LIMITS)
    assert 0.0 <= delay_s <= plan_put_delay_s(count + more, size, LIMITS) <= LIMITS.delay_max_s
    assert delay_s <= plan_put_delay_s(count, size + more, LIMITS)


HOURS_S = 7200.0


def behind() -> StorageSettings:
    """Two L0 layers, and ingest waits so long that only an end of the wait lets the test pass."""
    return StorageSettings(
        compaction_threshold=2, throttle_from_layers=1, throttle_full_layers=2, throttle_delay_s_max=HOURS_S
    )


async def fall_behind(timeline: Timeline, oracle: TimelineOracle) -> None:
    for _ in range(2):
        put_next(timeline, oracle)
        await timeline.flush()
    assert timeline.stack.disk.level_zero_count == 2


def put_next(timeline: Timeline, oracle: TimelineOracle) -> None:
    values = oracle.next_values(random.Random(oracle.last_lsn), 3)
    end_lsn = Lsn(oracle.last_lsn)
    timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))


@in_event_loop
async def test_put_batch_waits_until_compaction_has_caught_up(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=behind()) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        oracle = TimelineOracle.imported()
        await fall_behind(timeline, oracle)
        async with asyncio.timeout(30):
            putting = asyncio.create_task(asyncio.to_thread(put_next, timeline, oracle))
            while context.counters.delayed_puts == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert await timeline.compact()
            await putting
        assert (context.counters.delayed_puts, context.counters.delayed_puts_s) == (1, HOURS_S)


@in_event_loop
async def test_a_closed_timeline_lets_its_writer_go(tmp_path: Path) -> None:
    async with storage_context(tmp_path, settings=behind()) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        oracle = TimelineOracle.imported()
        await fall_behind(timeline, oracle)
        async with asyncio.timeout(30):
            putting = asyncio.create_task(asyncio.to_thread(put_next, timeline, oracle))
            while context.counters.delayed_puts == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await timeline.close()
            (outcome,) = await asyncio.gather(putting, return_exceptions=True)
        assert isinstance(outcome, Exception)


@in_event_loop
async def test_nobody_waits_for_a_compaction_that_is_stuck(tmp_path: Path) -> None:
    objects = MemoryObjectStore()
    async with storage_context(tmp_path, store=objects, settings=behind()) as context:
        timeline = await (await attach(context)).create_timeline(new_main(), IMPORTED)
        oracle = TimelineOracle.imported()
        await fall_behind(timeline, oracle)
        layer = timeline.stack.disk.delta_runs[-1].descriptions[0]
        timeline.stack.files[layer.name].remove_local()
        objects.objects[timeline.home.object_name(layer)] = bytes(layer.size_bytes)
        with pytest.raises(DamagedLayerError):
            await timeline.compact()
        async with asyncio.timeout(30):
            await asyncio.to_thread(put_next, timeline, oracle)
        assert context.counters.delayed_puts == 0
        await timeline.flush()
        assert await timeline.compact()  # without the damaged one
        assert timeline.stack.disk.level_zero_count == 1
        assert layer.name in timeline.stack.files
