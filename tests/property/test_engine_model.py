"""The engine against its oracle (S1, S2, S3, G1): whatever happens, in any order."""

import os
from dataclasses import replace
from functools import partial

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from excimer.base.ids import TimelineId
from excimer.storage.engine.timeline import Timeline
from tests.kit.directories import new_memory_directory
from tests.kit.engine_oracle import FILES, IMPORTED, LITTLE_IMPORTED, BlockFile
from tests.kit.engine_world import SMALL, EngineWorld, compact_wholly, sweep_suspected
from tests.kit.storage_world import START

EXAMPLES = int(os.environ.get("EXCIMER_ENGINE_EXAMPLES", "60"))
STEPS = 50
TIMELINES_MAX = 4

SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize="EXCIMER_ENGINE_EXAMPLES" not in os.environ,
    database=None,
    phases=(Phase.generate,),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


class EngineMachine(RuleBasedStateMachine):
    limits = SMALL

    def __init__(self) -> None:
        super().__init__()
        self.world = EngineWorld(new_memory_directory("excimer-engine-"), self.limits)

    @initialize(seed=st.integers(0, 2**32), much=st.booleans())
    def create(self, seed: int, much: bool) -> None:
        self.world.chance.seed(seed)
        self.world.create(IMPORTED if much else LITTLE_IMPORTED)

    def teardown(self) -> None:
        self.world.close()

    @rule(data=st.data(), records=st.integers(1, 60))
    def put(self, data: st.DataObject, records: int) -> None:
        self.world.put(self.any_timeline(data), records)

    @rule(data=st.data(), records=st.integers(1, 60))
    def put_and_freeze(self, data: st.DataObject, records: int) -> None:
        timeline_id = self.any_timeline(data)
        self.world.put(timeline_id, records)
        self.world.freeze(timeline_id)

    @rule(data=st.data(), records=st.integers(0, 60))
    def put_and_flush(self, data: st.DataObject, records: int) -> None:
        timeline_id = self.any_timeline(data)
        self.world.put(timeline_id, records)
        self.world.flush(timeline_id)

    @rule(data=st.data(), flushes=st.integers(0, 3))
    def compact(self, data: st.DataObject, flushes: int) -> None:
        timeline_id = self.any_timeline(data)
        for _ in range(flushes):
            self.world.put(timeline_id, 15)
            self.world.flush(timeline_id)
        self.world.compact(timeline_id)

    @precondition(lambda self: len(self.world.oracles) < TIMELINES_MAX)
    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        ancestor_id = self.any_timeline(data)
        self.world.branch(ancestor_id, self.any_record_end(data, ancestor_id))

    @precondition(lambda self: len(self.world.oracles) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self.world.delete(data.draw(st.sampled_from(self.leaves())))

    @rule(keep_files=st.booleans())
    def restart(self, keep_files: bool) -> None:
        self.world.restart(keep_files=keep_files)

    @rule(
        data=st.data(),
        operations=st.integers(1, 30),
        power_failure=st.booleans(),
        again=st.one_of(st.just(0), st.integers(1, 30)),
    )
    def crash(self, data: st.DataObject, operations: int, power_failure: bool, again: int) -> None:
        timeline_id = self.any_timeline(data)
        world = self.world
        for _ in range(2):
            world.put(timeline_id, 10)
            world.flush(timeline_id)
        world.put(timeline_id, 10)
        steps = {
            "flush": lambda: world.flush(timeline_id),
            "compact": lambda: world.compact(timeline_id),
            "read": lambda: world.check_some(),
            "archive": lambda: world.archive_and_back(timeline_id),
            "collect": lambda: world.collect(timeline_id, 200),
            "detach": lambda: world.detach(timeline_id),
            "sweep": lambda: world.sweep(timeline_id),
        }
        if len(world.oracles) < TIMELINES_MAX:
            steps["branch"] = lambda: world.branch(timeline_id, world.oracles[timeline_id].last_lsn)
        if len(world.oracles) > 1:
            steps["delete"] = lambda: world.delete(self.leaves()[-1])
        step = steps[data.draw(st.sampled_from(sorted(steps)))]
        world.crash(step, operations, power_failure=power_failure, again=again)

    @rule(data=st.data(), operations=st.integers(1, 12), power_failure=st.booleans())
    def crash_in_flush(self, data: st.DataObject, operations: int, power_failure: bool) -> None:
        timeline_id = self.any_timeline(data)
        self.world.put(timeline_id, 10)
        flush = partial(self.world.flush, timeline_id)
        self.world.crash(flush, operations, power_failure=power_failure)

    @rule(data=st.data(), kept_bytes=st.integers(0, 800), flushes=st.integers(0, 3))
    def collect(self, data: st.DataObject, kept_bytes: int, flushes: int) -> None:
        """Preferably where there are branch points."""
        with_branches = [each for each in self.world.served if self.world.tenant.branches(each)]
        timeline_id = data.draw(st.sampled_from(with_branches or self.world.served))
        for _ in range(flushes):
            self.world.put(timeline_id, 15)
            self.world.flush(timeline_id)
        self.world.collect(timeline_id, kept_bytes)
        self.world.check_all(moments=0)

    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        timeline_id = self.any_timeline(data)
        self.world.lease(timeline_id, self.any_record_end(data, timeline_id))

    @precondition(lambda self: any(self.world.leases.values()))
    @rule()
    def let_go_of_leases(self) -> None:
        self.world.leases.clear()

    @rule(data=st.data())
    def sweep(self, data: st.DataObject) -> None:
        self.world.sweep(self.any_timeline(data))

    @rule(data=st.data(), share=st.floats(0.1, 1.0))
    def evict(self, data: st.DataObject, share: float) -> None:
        self.world.evict(self.any_timeline(data), share)

    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        self.world.detach(self.any_timeline(data))

    @rule(data=st.data())
    def archive_and_back(self, data: st.DataObject) -> None:
        self.world.archive_and_back(self.any_timeline(data))

    @rule()
    def move(self) -> None:
        self.world.move()

    @precondition(lambda self: self.world.former is not None)
    @rule(act=st.sampled_from((Timeline.flush, compact_wholly, sweep_suspected)))
    def former_acts(self, act: object) -> None:
        assert act in (Timeline.flush, compact_wholly, sweep_suspected)
        self.world.former_acts(act)

    @rule(data=st.data(), file=st.sampled_from(FILES), first=st.integers(0, 8), count=st.integers(1, 6))
    def read(self, data: st.DataObject, file: BlockFile, first: int, count: int) -> None:
        timeline_id = self.any_timeline(data)
        oldest_lsn, last_lsn = self.world.readable_lsns(timeline_id)
        self.world.check_blocks(timeline_id, file, first, count, data.draw(st.integers(oldest_lsn, last_lsn)))

    @rule(data=st.data())
    def read_before_the_history(self, data: st.DataObject) -> None:
        timeline_id = self.any_timeline(data)
        self.world.check_below(timeline_id, self.world.readable_lsns(timeline_id)[0] - 1)
        self.world.check_below(timeline_id, START - 1)

    @rule()
    def read_everything(self) -> None:
        self.world.check_all(moments=2)

    @invariant()
    def reads_are_the_oracles(self) -> None:
        self.world.check_some()

    def any_timeline(self, data: st.DataObject) -> TimelineId:
        return data.draw(st.sampled_from(self.world.served))

    def any_record_end(self, data: st.DataObject, timeline_id: TimelineId) -> int:
        oldest_lsn, last_lsn = self.world.readable_lsns(timeline_id)
        oracle = self.world.oracles[timeline_id]
        ends = [end for end in (oracle.ancestor_lsn, *oracle.ends) if oldest_lsn <= end <= last_lsn]
        return data.draw(st.sampled_from(ends[-30:]))

    def leaves(self) -> list[TimelineId]:
        """Timelines nobody branches from; while one is damaged, such damaged ones."""
        tenant = self.world.tenant
        candidates = tenant.damaged or self.world.oracles
        return [each for each in candidates if not tenant.branches(each)]


class ManyFilesMachine(EngineMachine):
    """Merged runs are of many files, and compaction may be left halfway."""

    limits = replace(SMALL, compaction_target_size_bytes=4_000)

    @rule(data=st.data(), steps=st.integers(1, 3))
    def compact_partly(self, data: st.DataObject, steps: int) -> None:
        self.world.compact_partly(self.any_timeline(data), steps)

    @rule()
    def sizes(self) -> None:
        self.world.check_sizes()


EngineMachine.TestCase.settings = SETTINGS
TestEngine = EngineMachine.TestCase
ManyFilesMachine.TestCase.settings = settings(SETTINGS, max_examples=EXAMPLES // 4)
TestEngineOfManyFiles = ManyFilesMachine.TestCase
