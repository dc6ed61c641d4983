"""A page read visits at most ten layers at p99, however long a workload goes on; what that costs in writes.

Flushes and a few steps of compaction take turns, so that flushes pile up behind long rounds of images as
they do when both run at the same time. Nothing here depends on time. First the plans alone, over many
thousand pages (`tests.kit.pretend_layers`); then the engine, which must also yield the right pages.
EXCIMER_AMPLIFICATION_FLUSHES makes it longer.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from excimer.base.keys import Fork, relation_size_key
from excimer.storage.engine.context import StorageSettings
from excimer.storage.format.values import Value, ValueKind
from excimer.storage.plan.compaction_plan import CompactionLimits
from tests.kit.pretend_layers import TABLE, PretendLayers, block
from tests.kit.storage_world import (
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

FLUSHES = int(os.environ.get("EXCIMER_AMPLIFICATION_FLUSHES", "200"))
ENGINE_FLUSHES = max(50, FLUSHES // 20)
BLOCKS = 12_000
CHANGES = 240
"""Records in a flush."""
STEPS_PER_FLUSH = 2
VISITS_P99_MAX = 10
VISITS_MAX = 12

Pick = Callable[[random.Random, int, int], int]


def uniform(chance: random.Random, flush: int, blocks: int) -> int:
    return chance.randrange(blocks)


def skewed(chance: random.Random, flush: int, blocks: int) -> int:
    """Nine of ten changes go to one block of fifty."""
    return chance.randrange(blocks // 50 if chance.random() < 0.9 else blocks)


def moving(chance: random.Random, flush: int, blocks: int) -> int:
    """A hot place that wanders, as in every growing table: it leaves cold blocks in old rounds behind."""
    return (flush * blocks // 500 + chance.randrange(blocks // 50)) % blocks


@pytest.mark.parametrize(("pick", "images_max"), [(uniform, 3.0), (skewed, 1.2), (moving, 1.0)])
def test_plans_keep_reads_short_for_ever(pick: Pick, images_max: float) -> None:
    """And write so many images at most for each page changed."""
    chance = random.Random(1)
    # A piece of a round holds as many pages as two flushes change, a merged file as five flushes.
    limits = CompactionLimits(merge_threshold=4, merged_layer_size_bytes=500 * CHANGES, image_threshold=2)
    layers = PretendLayers(BLOCKS, limits, file_keys=2 * CHANGES)
    visits: list[int] = []
    for flush in range(FLUSHES):
        layers.flush({pick(chance, flush, BLOCKS) for _ in range(CHANGES)})
        for _ in range(STEPS_PER_FLUSH):
            visits += [layers.visits(chance.randrange(BLOCKS)) for _ in range(5)]
            if not layers.compact():
                break
    visits.sort()
    p99 = visits[len(visits) * 99 // 100]
    images = layers.image_keys / layers.flushed_keys
    print(
        f"{pick.__name__}: visits p50 {visits[len(visits) // 2]}, p99 {p99}, most {visits[-1]}; "
        f"{images:.2f} images written for each page changed in a flush"
    )
    assert p99 <= VISITS_P99_MAX
    assert visits[-1] <= VISITS_MAX
    assert images <= images_max


@pytest.mark.parametrize("pick", [uniform, skewed])
def test_the_engine_keeps_reads_short(tmp_path: Path, pick: Pick) -> None:
    run_engine(tmp_path, pick)


@in_event_loop
async def run_engine(tmp_path: Path, pick: Pick) -> None:
    blocks, changes = 300, 40
    chance = random.Random(5)
    chains = [[Value(block(at), 0, ValueKind.IMAGE, True, image_of(b"%d" % at))] for at in range(blocks)]
    size = size_value(relation_size_key(TABLE, Fork.MAIN), 0, blocks)
    images = [(chain[0].key, chain[0].payload) for chain in chains]
    small = StorageSettings(block_size_bytes=2000, image_layer_size_bytes=600_000)
    async with storage_context(tmp_path, settings=small) as context:
        timeline = await (await attach(context)).create_timeline(
            new_main(), [*images, (size.key, size.payload)]
        )
        for flush in range(ENGINE_FLUSHES):
            lsn, values = int(timeline.last_record_lsn), []
            for _ in range(changes):
                lsn += 8
                number = pick(chance, flush, blocks)
                values.append(record_value(block(number), lsn, chance.randbytes(20)))
                chains[number].append(values[-1])
            put(timeline, values)
            await timeline.flush()
            for _ in range(STEPS_PER_FLUSH):
                number = chance.randrange(blocks)
                page = await timeline.get_pages(block(number), 1, timeline.last_record_lsn)
                assert page == expected_page(chains[number])
                if not await timeline.compact():
                    break
    reads = dict(context.counters.visits)
    assert sum(count for bound, count in reads.items() if bound is None or bound > VISITS_P99_MAX) == 0
    print(f"{pick.__name__}: write amplification {context.counters.write_amplification:.1f}")
    assert 1 < context.counters.write_amplification < 10
