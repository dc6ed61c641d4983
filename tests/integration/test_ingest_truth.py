"""Page truth at low level (S1): stock servers of every version, their WAL ingested, compared at several LSNs.

`EXCIMER_TRUTH_LSNS` and `EXCIMER_TRUTH_PAGES` make it a longer sweep; `EXCIMER_TRUTH_SEED` another one.
"""

import asyncio
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from excimer.base.ids import TimelineId
from excimer.base.keys import KeyKind, make_key
from excimer.base.lsn import Lsn
from excimer.pgformat.checkpoint_state import CheckpointState
from excimer.storage.engine.context import StorageSettings
from excimer.storage.engine.errors import LsnTooOldError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.plan import gc_plan
from tests.kit import ingest_workload
from tests.kit.builds import ALL_VERSIONS, NEWEST_VERSION, build_of
from tests.kit.directories import reachable_directory
from tests.kit.page_truth import (
    MAIN,
    Comparison,
    History,
    compare_history,
    ingest_history,
    truth_tenant,
    truth_timeline,
    write_history,
)

LSNS = int(os.environ.get("EXCIMER_TRUTH_LSNS", "1"))
PAGES = int(os.environ.get("EXCIMER_TRUTH_PAGES", "250"))
SEED = int(os.environ.get("EXCIMER_TRUTH_SEED", "1"))


def drawn_lsns(history: History) -> list[Lsn]:
    """Ends of records, any, and the last that a stock server can be recovered to."""
    *ends, last, _ = history.record_ends
    return [*sorted(random.Random(SEED).sample(ends, LSNS)), last]


async def ingest_and_compare(history: History, root: Path) -> Comparison:
    async with truth_timeline(history.build, root, history.beginning) as timeline:
        ingest = await ingest_history(history, timeline)
        assert ingest.last_record_lsn == timeline.last_record_lsn == history.record_ends[-1]
        assert_reloads(ingest.checkpoint_state, timeline.last_record_lsn)
        return await compare_history(history, timeline, root, drawn_lsns(history), PAGES, SEED)


def assert_reloads(state: CheckpointState, lsn: Lsn) -> None:
    assert CheckpointState.unpack(state.pack()) == state
    assert state.checkpoint.redo < lsn


@pytest.mark.slow
@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_storage_equals_a_recovered_server(version: int) -> None:
    build = build_of(version)
    with reachable_directory() as root:
        history = write_history(build, root, ingest_workload.run, ingest_workload.compression(build))
        result = asyncio.run(ingest_and_compare(history, root))
    assert not result.wrong, f"{len(result.wrong)} differences, seed {SEED}:\n" + "\n".join(result.wrong[:40])
    assert result.compared["page"] == PAGES * (LSNS + 1)
    assert all(result.compared[kind] >= 10 for kind in ("size", "SLRU page", "file", "field"))
    assert result.compared["origin"] >= 3


SMALL = StorageSettings(
    flush_size_bytes=1 << 20,
    compaction_threshold=3,
    compaction_target_size_bytes=1 << 20,
    image_layer_size_bytes=1 << 20,
    gc_horizon_bytes=0,
    lsn_lease_length_s=0.0,
)
PAST = TimelineId("33" * 16)


async def collect_move_and_compare(history: History, root: Path) -> Comparison:
    """A branch in the past; then merges, images, a collection above it, the disk lost, another owner."""
    ends = history.record_ends
    past_lsn, cutoff_lsn, last_lsn = ends[len(ends) // 5], ends[len(ends) * 9 // 10], ends[-2]
    async with truth_tenant(history.build, root, history.beginning, settings=SMALL) as tenant:
        timeline = tenant.timeline(MAIN)
        background = asyncio.ensure_future(timeline.run())
        await ingest_history(history, timeline)
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)
        await tenant.branch_timeline(PAST, MAIN, lsn=past_lsn)
        await timeline.flush()
        while await timeline.compact():
            pass
        collected = await timeline.collect_garbage(cutoff_lsn)
        assert collected.layers_removed > 0
        assert collected.held_points == 1
        await timeline.in_thread(timeline.deletions.drain)
        await tenant.close()
        elsewhere = replace(tenant.context, local_dir=root / "elsewhere")
        owner = await TenantStorage.attach(elsewhere, tenant.tenant_id, 2)
        lsns = [collected.cutoff_lsn, last_lsn]
        result = await compare_history(history, owner.timeline(MAIN), root, lsns, PAGES, SEED)
        past = await compare_history(history, owner.timeline(PAST), root, [past_lsn], PAGES, SEED)
        with pytest.raises(LsnTooOldError):
            owner.timeline(MAIN).get_value(make_key(KeyKind.CHECKPOINT), Lsn(past_lsn - 1))
        await owner.close()
    return Comparison(Lsn(0), result.compared + past.compared, result.wrong + past.wrong)


@pytest.mark.slow
def test_storage_equals_a_recovered_server_after_a_collection_and_a_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images at the cutoff are made whether they pay or not, so that history does go."""
    monkeypatch.setattr(gc_plan, "WORTH_RATIO", 0.0)
    build = build_of(NEWEST_VERSION)
    with reachable_directory() as root:
        history = write_history(build, root, ingest_workload.run, ingest_workload.compression(build))
        result = asyncio.run(collect_move_and_compare(history, root))
    assert not result.wrong, f"{len(result.wrong)} differences, seed {SEED}:\n" + "\n".join(result.wrong[:40])
    assert result.compared["page"] == PAGES * 3
