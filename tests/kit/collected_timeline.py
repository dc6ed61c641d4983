"""A timeline whose history is collected, beside its oracle: where tests of garbage collection start from."""

import random

from excimer.base.keys import relation_block_key
from excimer.base.lsn import Lsn
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.values import pack_batch
from tests.kit.storage_oracle import FORKS, IMPORTED, RELATIONS, TimelineOracle
from tests.kit.storage_world import attach, new_main

SMALL = StorageSettings(
    flush_size_bytes=30_000,
    block_size_bytes=4000,
    image_layer_size_bytes=40_000,
    compaction_threshold=2,
    image_creation_threshold=2,
    gc_horizon_bytes=0,
    lsn_lease_length_s=0.0,
)
"""Nothing is kept for its age, and nobody waits for leases."""


async def new_tenant(context: StorageContext) -> tuple[TenantStorage, Timeline, TimelineOracle]:
    """With a main timeline."""
    tenant = await attach(context)
    return tenant, await tenant.create_timeline(new_main(), IMPORTED), TimelineOracle.imported()


async def grow(timeline: Timeline, oracle: TimelineOracle, chance: random.Random, flushes: int) -> None:
    """So many flushes of some records each, compacted as they come."""
    for _ in range(flushes):
        before = oracle.last_lsn
        oracle.next_values(chance, 30)
        for values, end_lsn in oracle.batches_after(before, 10):
            timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))
        await timeline.flush()
        while await timeline.compact():
            pass


async def check_reads(timeline: Timeline, oracle: TimelineOracle, lsn: int) -> None:
    """Every page and the size of every relation at one LSN."""
    for relation in RELATIONS:
        for fork in FORKS:
            size = oracle.size(relation, fork, lsn)
            assert timeline.size_blocks(relation_block_key(relation, fork, 0), Lsn(lsn)) == size
            for block in range(size or 0):
                key = relation_block_key(relation, fork, block)
                assert await timeline.get_pages(key, 1, Lsn(lsn)) == oracle.page(key, lsn)
