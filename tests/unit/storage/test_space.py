"""Space over many cycles: live pages and retained WAL, and not much more, whatever has been written.

Records here cannot be compressed, and pages only as far as a case says, so that sizes mean what they say.
"""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, Fork, Relation, relation_block_key, relation_size_key
from excimer.base.lsn import Lsn
from excimer.io.object_store import MemoryObjectStore
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.values import pack_batch
from tests.kit.storage_world import (
    MAIN,
    START,
    FakeRedo,
    attach,
    in_event_loop,
    new_main,
    record_value,
    redo_one,
    size_value,
    storage_context,
)

RELATION = Relation(1663, 5, 16384)
BLOCKS = 200
RECORD_BYTES = 400
RECORDS_PER_FLUSH = 250
CYCLES = 60
LIVE_BYTES = BLOCKS * BLOCK_SIZE_BYTES
SETTINGS = StorageSettings(
    flush_size_bytes=64 << 20,
    image_layer_size_bytes=512 << 10,
    compaction_target_size_bytes=512 << 10,
    lsn_lease_length_s=0.0,
)


class NoisyRedo(FakeRedo):
    """Pages whose first part is noise."""

    def __init__(self, noise_share: float) -> None:
        super().__init__()
        self._noise_bytes = int(BLOCK_SIZE_BYTES * noise_share)

    async def redo(
        self, requests: Sequence[bytes], pg_version: int, tenant: TenantId
    ) -> list[bytes | Exception]:
        noise = (hashlib.shake_128(redo_one(request)).digest(self._noise_bytes) for request in requests)
        return [part.ljust(BLOCK_SIZE_BYTES, b"\0") for part in noise]


class Writer:
    """Puts records that touch pages, and flushes."""

    def __init__(self, timeline: Timeline, chance: random.Random) -> None:
        self._timeline = timeline
        self._chance = chance
        self.lsn = int(timeline.last_record_lsn)

    def put(self, block: int, *, is_first: bool = False) -> None:
        self.lsn += RECORD_BYTES
        key = relation_block_key(RELATION, Fork.MAIN, block)
        text = self._chance.randbytes(RECORD_BYTES - 60)
        values = [record_value(key, self.lsn, text, will_init=is_first)]
        if is_first:
            values.append(size_value(relation_size_key(RELATION, Fork.MAIN), self.lsn, block + 1))
        self._timeline.put_batch(pack_batch(values), Lsn(self.lsn), Lsn(self.lsn - 8))

    async def fill(self) -> None:
        for block in range(BLOCKS):
            self.put(block, is_first=True)
        await self._timeline.flush()

    async def cycle(self, hot_blocks: int) -> None:
        for _ in range(RECORDS_PER_FLUSH):
            self.put(self._chance.randrange(hot_blocks))
        await self._timeline.flush()
        while await self._timeline.compact():
            pass
        key = relation_block_key(RELATION, Fork.MAIN, self._chance.randrange(hot_blocks))
        await self._timeline.get_pages(key, 1, Lsn(self.lsn))  # what a read remembers must not hold layers


def stored_bytes(objects: MemoryObjectStore, timeline_id: TimelineId) -> int:
    return sum(len(data) for name, data in objects.objects.items() if f"{timeline_id}/layers/" in name)


@pytest.mark.parametrize(
    ("noise_share", "hot_blocks", "window_flushes", "limit"),
    [
        (1.0, BLOCKS, 0, 2.0),
        (1.0, BLOCKS, 4, 2.1),  # two whole sets of images are never free of charge for a window this small
        (0.7, BLOCKS, 4, 2.0),
        (1.0, BLOCKS, 24, 2.0),
        (1.0, BLOCKS // 20, 8, 2.0),
    ],
)
@in_event_loop
async def test_space_is_at_most_twice_what_is_live_and_retained(
    tmp_path: Path, noise_share: float, hot_blocks: int, window_flushes: int, limit: float
) -> None:
    objects, redo = MemoryObjectStore(), NoisyRedo(noise_share)
    async with storage_context(tmp_path, store=objects, settings=SETTINGS, redo=redo) as context:
        tenant = await attach(context)
        await tenant.set_settings({"gc_horizon_bytes": window_flushes * RECORDS_PER_FLUSH * RECORD_BYTES})
        timeline = await tenant.create_timeline(new_main(), [])
        writer = Writer(timeline, random.Random(1))
        await writer.fill()
        for number in range(CYCLES):
            await writer.cycle(hot_blocks)
            if number % 3 == 2:
                outcome = await timeline.collect_garbage(timeline.last_record_lsn)
                await timeline.in_thread(timeline.deletions.drain)
                retained = timeline.last_record_lsn - max(START, outcome.cutoff_lsn)
                ratio = stored_bytes(objects, MAIN) / (LIVE_BYTES + retained)
                assert ratio <= limit, f"{ratio:.2f} after {number} flushes"
        assert context.counters.write_amplification < 6
        assert (context.counters.collections, context.counters.deletions_waiting) == (CYCLES // 3, 0)
