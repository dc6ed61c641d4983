"""The engine against its oracle, S1 and S2: any order of puts, branches, flushes, compactions, restarts,
detachments, archivings.
"""

import asyncio
import os
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from excimer.base.ids import TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, KeyKind, Relation, kind_range, make_key
from excimer.base.keys import relation_block_key as block_key
from excimer.base.lsn import Lsn
from excimer.io.filesystem import LocalFilesystem
from excimer.io.object_store import MemoryObjectStore
from excimer.pageserver.model import TenantSizes
from excimer.pageserver.sizes import LogicalSizes, tenant_sizes
from excimer.storage.engine.context import StorageContext, StorageSettings
from excimer.storage.engine.errors import LsnTooOldError, NoSuchPageError, TimelineArchivedError
from excimer.storage.engine.tenant import TenantStorage
from excimer.storage.format.values import pack_batch
from tests.kit.storage_oracle import FORKS, IMPORTED, MAP_KEY, RELATIONS, TimelineOracle
from tests.kit.storage_world import MAIN, START, TENANT, FakeRedo, apply_native, new_main

SMALL = StorageSettings(
    flush_size_bytes=40_000,
    block_size_bytes=700,
    image_layer_size_bytes=30_000,
    compaction_target_size_bytes=4_000,
    compaction_threshold=2,
    image_creation_threshold=1,
)
TIMELINES_MAX = 4


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.executor = ThreadPoolExecutor(2)
        self.context = StorageContext(
            store=MemoryObjectStore(),
            filesystem=LocalFilesystem(),
            local_dir=self.directory,
            redo=FakeRedo(),
            apply_native=apply_native,
            executor=self.executor,
            settings=SMALL,
        )
        self.generation = 1
        self.oracles: dict[TimelineId, TimelineOracle] = {MAIN: TimelineOracle.imported()}

    @initialize()
    def create(self) -> None:
        self.tenant = self.runner.run(TenantStorage.attach(self.context, TENANT, self.generation))
        self.runner.run(self.tenant.create_timeline(new_main(), IMPORTED))

    def teardown(self) -> None:
        self.runner.close()
        self.executor.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)

    @rule(data=st.data(), count=st.integers(1, 40), seed=st.integers(0, 2**32))
    def put(self, data: st.DataObject, count: int, seed: int) -> None:
        timeline_id = self.any_timeline(data)
        oracle, timeline = self.oracles[timeline_id], self.tenant.timeline(timeline_id)
        before = oracle.last_lsn
        oracle.next_values(random.Random(seed), count)
        for values, end_lsn in oracle.batches_after(before, 10):
            if not timeline._has_room():
                self.runner.run(timeline.flush())
            timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))
        assert timeline.last_record_lsn == oracle.last_lsn

    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        timeline = self.tenant.timeline(self.any_timeline(data))
        self.runner.run(timeline.flush())
        assert timeline.remote_consistent_lsn == timeline.last_record_lsn

    @rule(data=st.data(), steps=st.integers(1, 4))
    def compact(self, data: st.DataObject, steps: int) -> None:
        timeline = self.tenant.timeline(self.any_timeline(data))
        while steps and self.runner.run(timeline.compact()):
            steps -= 1

    @precondition(lambda self: len(self.oracles) < TIMELINES_MAX)
    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        ancestor_id = self.any_timeline(data)
        ancestor = self.oracles[ancestor_id]
        lsn = data.draw(st.sampled_from([START, ancestor.ancestor_lsn, *ancestor.ends][-30:]))
        timeline_id = TimelineId(f"{len(self.oracles):032x}")
        self.runner.run(
            self.tenant.branch_timeline(timeline_id, ancestor_id, lsn=Lsn(lsn), prev_record_lsn=Lsn(lsn - 8))
        )
        self.oracles[timeline_id] = TimelineOracle(ancestor=ancestor, ancestor_lsn=lsn)

    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        """Nothing that can be read changes, so that the oracle never hears of it."""
        timeline_id = self.any_timeline(data)
        timeline = self.tenant.timeline(timeline_id)
        ancestor_id, branch_lsn = timeline.manifest.ancestor_timeline_id, timeline.ancestor_lsn
        moved = self.runner.run(self.tenant.detach_ancestor(timeline_id))
        assert timeline.ancestor is None
        assert timeline_id not in moved
        for other in self.tenant.timelines.values():
            if ancestor_id is not None and other.manifest.ancestor_timeline_id == ancestor_id:
                assert other.ancestor_lsn > branch_lsn
        assert all(self.tenant.timeline(each).ancestor is timeline for each in moved)

    @rule(data=st.data())
    def archive_and_back(self, data: st.DataObject) -> None:
        timeline_id = self.any_timeline(data)
        if self.tenant.branches(timeline_id):
            with pytest.raises(TimelineArchivedError):
                self.runner.run(self.tenant.archive_timeline(timeline_id))
            return
        self.runner.run(self.tenant.archive_timeline(timeline_id))
        self.runner.run(self.tenant.offload_timeline(timeline_id))
        with pytest.raises(TimelineArchivedError):
            self.tenant.timeline(timeline_id)
        timeline = self.runner.run(self.tenant.unarchive_timeline(timeline_id))
        assert timeline.last_record_lsn == self.oracles[timeline_id].last_lsn

    @rule()
    def sizes(self) -> None:
        """Never more than a copy of each timeline where it begins, and its WAL."""

        async def ask() -> tuple[TenantSizes, int]:
            sizes = {each: LogicalSizes(self.tenant.timelines[each], lambda: 0.0) for each in self.oracles}
            asked = await tenant_sizes(self.tenant, sizes, asyncio.get_running_loop().time())
            timelines = self.tenant.timelines.values()
            copies = [
                await sizes[each.timeline_id].at(max(each.ancestor_lsn, each.oldest_lsn))
                for each in timelines
            ]
            return asked, sum(copies)

        asked, copies = self.runner.run(ask())
        wal = sum(each.last_record_lsn - START for each in self.tenant.timelines.values())
        assert 0 < asked.synthetic_size_bytes <= copies + wal
        assert [row.timeline_id for row in asked.timelines] == sorted(self.oracles)

    @rule(keep_files=st.booleans())
    def restart(self, keep_files: bool) -> None:
        """Memory is gone, perhaps the local files too; WAL after the last manifest comes again."""
        self.runner.run(self.tenant.close())
        if not keep_files:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.context.cache.clear()
        self.generation += 1
        self.tenant = self.runner.run(TenantStorage.attach(self.context, TENANT, self.generation))
        for timeline_id, oracle in self.oracles.items():
            timeline = self.tenant.timeline(timeline_id)
            for values, end_lsn in oracle.batches_after(timeline.disk_consistent_lsn, 7):
                if not timeline._has_room():
                    self.runner.run(timeline.flush())
                timeline.put_batch(pack_batch(values), end_lsn, Lsn(end_lsn - 8))
            assert timeline.last_record_lsn == oracle.last_lsn

    @rule(data=st.data(), relation=st.sampled_from(RELATIONS), fork=st.sampled_from(FORKS))
    def read_pages(self, data: st.DataObject, relation: Relation, fork: int) -> None:
        timeline_id = self.any_timeline(data)
        oracle, timeline = self.oracles[timeline_id], self.tenant.timeline(timeline_id)
        lsn = self.any_lsn(data, oracle)
        first, count = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 6))
        key = block_key(relation, fork, first)
        size = oracle.size(relation, fork, lsn)
        reading = timeline.get_pages(key, count, Lsn(lsn))
        if size is None or first + count > size:
            with pytest.raises(NoSuchPageError):
                self.runner.run(reading)
            return
        expected = b"".join(
            oracle.page(block_key(relation, fork, block), lsn) for block in range(first, first + count)
        )
        pages = self.runner.run(reading)
        assert len(pages) == count * BLOCK_SIZE_BYTES
        assert pages == expected

    @rule(data=st.data())
    def read_values(self, data: st.DataObject) -> None:
        timeline_id = self.any_timeline(data)
        oracle, timeline = self.oracles[timeline_id], self.tenant.timeline(timeline_id)
        lsn = self.any_lsn(data, oracle)
        assert timeline.get_value(MAP_KEY, Lsn(lsn)) == oracle.value(MAP_KEY, lsn)
        start, end = kind_range(KeyKind.RELATION_SIZE)
        sizes = timeline.scan(start, end, Lsn(lsn))
        rest = timeline.scan(end, make_key(KeyKind.COMMIT_TIME), Lsn(lsn))
        if rest and rest[0][0][0] == KeyKind.SLRU_BLOCK:
            raise AssertionError("no SLRU was put")
        assert sizes + rest == oracle.scan(lsn)

    @rule(data=st.data())
    def read_before_the_history(self, data: st.DataObject) -> None:
        with pytest.raises(LsnTooOldError):
            self.tenant.timeline(self.any_timeline(data)).get_value(MAP_KEY, Lsn(START - 1))

    def any_timeline(self, data: st.DataObject) -> TimelineId:
        return data.draw(st.sampled_from(sorted(self.oracles)))

    def any_lsn(self, data: st.DataObject, oracle: TimelineOracle) -> int:
        if data.draw(st.booleans()):
            return oracle.last_lsn
        return data.draw(st.integers(START, oracle.last_lsn))


EngineMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("EXCIMER_ENGINE_EXAMPLES", "25")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestEngine = EngineMachine.TestCase
