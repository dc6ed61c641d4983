"""Page truth at low level (S1): stock servers of every version, their WAL ingested, compared at several LSNs.

`EXCIMER_TRUTH_LSNS` and `EXCIMER_TRUTH_PAGES` make it a longer sweep; `EXCIMER_TRUTH_SEED` another one.
"""

import asyncio
import os
import random
from pathlib import Path

import pytest

from excimer.base.lsn import Lsn
from excimer.pgformat.checkpoint_state import CheckpointState
from tests.kit import ingest_workload
from tests.kit.builds import ALL_VERSIONS, build_of
from tests.kit.directories import reachable_directory
from tests.kit.page_truth import (
    Comparison,
    History,
    compare_history,
    ingest_history,
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
