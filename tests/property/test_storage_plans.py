"""Read and compaction plans alone: over any history and any rounds a walk meets each key's newest value."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from excimer.base.keys import Relation, relation_block_key
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.compaction_plan import CompactionLimits, MergePlan, plan_merge, plan_round
from excimer.storage.plan.layer_map import LayerMap
from excimer.storage.plan.read_path import plan_read

KEYS = [relation_block_key(Relation(1663, 5, 16384), 0, number) for number in range(6)]
START = 100
LIMITS = CompactionLimits(merge_threshold=2, merged_layer_size_bytes=12, image_threshold=2)
PIECE_KEYS = 4
FILE_KEYS = 2


class PretendStore:
    """Layers as dicts: (key, LSN) of every value, or of every image."""

    def __init__(self) -> None:
        self.map = LayerMap()
        self.content: dict[str, set[tuple[bytes, int]]] = {}
        self.origins: dict[tuple[bytes, int], int] = {}
        """When the value in an image was really made."""
        self.history: dict[bytes, list[int]] = {key: [START] for key in KEYS}
        self.lsn = START
        self.damaged: set[str] = set()
        """Merges plan around these; whoever repairs them leaves a flush between merged ones."""
        images = {(key, START) for key in KEYS}
        self.map = self.map.changed(added=[self.describe(LayerKind.IMAGE, (START, START), images, 0)])

    def add(self, kind: LayerKind, start_lsn: int, end_lsn: int, content: set[tuple[bytes, int]]) -> None:
        self.map = self.map.changed(added=[self.describe(kind, (start_lsn, end_lsn), content)])

    def describe(
        self,
        kind: LayerKind,
        lsns: tuple[int, int],
        content: set[tuple[bytes, int]],
        covers_after_lsn: int | None = None,
        round_after_lsn: int | None = None,
        level: int = 0,
    ) -> LayerDescription:
        ordered = sorted(key for key, _ in content)
        layer = LayerDescription(
            kind=kind,
            start_lsn=lsns[0],
            end_lsn=lsns[1],
            first_key=ordered[0].hex(),
            last_key=ordered[-1].hex(),
            generation=1,
            fingerprint=len(self.content),
            size_bytes=len(content),
            index_offset=0,
            value_count=len(content),
            covers_after_lsn=covers_after_lsn,
            level=level,
            key_count=len(set(ordered)),
            round_after_lsn=round_after_lsn,
        )
        self.content[layer.name] = content
        return layer

    def flush(self, chance: random.Random) -> None:
        start_lsn, content = self.lsn, set()
        for _ in range(chance.randrange(1, 5)):
            self.lsn += chance.randrange(1, 4)
            key = chance.choice(KEYS)
            self.history[key].append(self.lsn)
            content.add((key, self.lsn))
        self.add(LayerKind.DELTA, start_lsn, self.lsn, content)

    def compact(self, *, leave_out: bytes | None = None) -> bool:
        """One step as the engine does it; whether there was one."""
        merge = plan_merge(self.map, LIMITS, self.damaged)
        if merge is not None:
            self.merge(merge)
            return True
        plan = plan_round(self.map, LIMITS, start_lsn=START, oldest_lsn=START, inherited_size_bytes=0)
        if plan is None:
            return False
        names = [layer.name for run in plan.sources for layer in run.descriptions]
        changed = {key for name in names for key, _ in self.content[name]}
        keys = set(KEYS) if plan.covers_after_lsn == 0 else changed
        left = sorted(key for key in keys if key >= plan.start_key)
        part, is_last = left[:PIECE_KEYS], len(left) <= PIECE_KEYS
        covers: int | None = plan.covers_after_lsn
        if leave_out in part or plan.covers_after_lsn == plan.lsn:
            covers = None
        for key in part:
            self.origins[(key, plan.lsn)] = self.newest(key, plan.lsn)
        round_after = None if is_last else plan.lsn if covers is None else covers
        added = [
            replace(piece, covers_after_lsn=covers if is_last else None, round_after_lsn=round_after)
            for piece in plan.pieces
        ]
        images = {(key, int(plan.lsn)) for key in part if key != leave_out}
        if images:
            added.append(
                self.describe(
                    LayerKind.IMAGE, (plan.lsn, plan.lsn), images, covers if is_last else None, round_after
                )
            )
        self.map = self.map.changed(added=added, removed=plan.pieces)
        return bool(added)

    def merge(self, plan: MergePlan) -> None:
        content = {entry for layer in plan.descriptions for entry in self.content[layer.name]}
        assert sum(layer.value_count for layer in plan.descriptions) == len(content)
        assert all(plan.start_lsn < lsn <= plan.end_lsn for _, lsn in content)
        added = []
        for first in range(0, len(KEYS), FILE_KEYS):
            share = {entry for entry in content if entry[0] in KEYS[first : first + FILE_KEYS]}
            if share:
                added.append(self.describe(LayerKind.DELTA, (plan.start_lsn, plan.end_lsn), share, level=1))
        self.map = self.map.changed(added=added, removed=plan.descriptions)

    def newest(self, key: bytes, lsn: int) -> int:
        return max(each for each in self.history[key] if each <= lsn)

    def find(self, key: bytes, low_lsn: int, high_lsn: int) -> int | None:
        """By walking a plan, as the engine does."""
        plan = plan_read(self.map, key, key, low_lsn, high_lsn)
        offered = []
        for visit in plan.visits:
            content = sorted(self.content[visit.layer.description.name], key=lambda entry: -entry[1])
            offered += [
                lsn for found, lsn in content if found == key and visit.low_lsn < lsn <= visit.high_lsn
            ]
        assert offered == sorted(offered, reverse=True)  # newest first; an image may repeat its value's LSN
        return self.origins.get((key, offered[0]), offered[0]) if offered else None


@settings(deadline=None)
@given(steps=st.lists(st.sampled_from("ffffccgde"), max_size=50), seed=st.integers(0, 2**32))
def test_a_walk_meets_the_newest_value(steps: list[str], seed: int) -> None:
    chance = random.Random(seed)
    store = PretendStore()
    for step in steps:
        if step == "f":
            store.flush(chance)
        elif step == "d":
            flushed = [layer.name for layer in store.map.descriptions if layer.kind is LayerKind.DELTA]
            store.damaged = set(chance.sample(flushed, min(1, len(flushed)))) if not store.damaged else set()
        elif step == "e":  # WAL without any value
            store.lsn += chance.randrange(1, 4)
        else:
            store.compact(leave_out=chance.choice(KEYS) if step == "g" else None)
    for key in KEYS:
        for lsn in range(START, store.lsn + 1):
            newest = store.newest(key, lsn)
            assert store.find(key, 0, lsn) == newest
            low = chance.randrange(START, lsn + 1)
            if newest > low:
                assert store.find(key, low, lsn) == newest
            else:
                assert store.find(key, low, lsn) in (None, newest)


def test_rounds_a_read_visits_stay_few() -> None:
    """1,000 flushes of a store of 6 keys: what a read visits does not grow with them."""
    chance = random.Random(3)
    store = PretendStore()
    for _ in range(1000):
        store.flush(chance)
        while store.compact():
            pass
        assert max(len(plan_read(store.map, key, key, 0, store.lsn).visits) for key in KEYS) <= 6


def test_an_image_splits_the_delta_it_stands_in() -> None:
    store = PretendStore()
    key = KEYS[0]
    store.add(LayerKind.DELTA, 100, 120, {(key, 105), (key, 115)})
    store.add(LayerKind.IMAGE, 110, 110, {(key, 110)})
    visits = plan_read(store.map, key, key, 0, 120).visits
    shown = [(visit.layer.is_image, visit.low_lsn, visit.high_lsn) for visit in visits]
    assert shown == [(False, 110, 120), (True, 109, 110), (False, 100, 110), (True, 99, 100)]


def test_a_merge_has_no_other_delta_in_between() -> None:
    store = PretendStore()
    key = KEYS[0]
    for lsn in (100, 110, 120, 130, 140):
        store.add(LayerKind.DELTA, lsn, lsn + 10, {(key, lsn + 5)})
    runs = store.map.delta_runs[::-1]
    store.damaged = {runs[2].descriptions[0].name}
    plan = plan_merge(store.map, LIMITS, store.damaged)
    assert plan is not None
    assert (plan.start_lsn, plan.end_lsn) == (100, 120)
    store.merge(plan)
    plan = plan_merge(store.map, LIMITS, store.damaged)
    assert plan is not None
    assert (plan.start_lsn, plan.end_lsn) == (130, 150)
    store.merge(plan)
    store.add(LayerKind.DELTA, 150, 160, {(key, 155)})
    plan = plan_merge(store.map, LIMITS)  # of L0 (120, 130] and (150, 160] the older, below a merged one
    assert plan is not None
    assert plan.end_lsn == 130
