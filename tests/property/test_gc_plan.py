"""Garbage collection's plans beside an obvious twin, over any layer map and any retained LSNs (S3)."""

import os
import random
from collections.abc import Iterator

from hypothesis import example, given, settings
from hypothesis import strategies as st

from excimer.base.keys import MAX_KEY, MIN_KEY
from excimer.base.lsn import Lsn
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.gc_plan import find_bottom_round, plan_gc, removable_layers
from excimer.storage.plan.layer_map import LayerMap
from excimer.storage.plan.read_path import Visit, plan_read
from excimer.storage.plan.retention import RetainedLsns
from tests.property.test_storage_plans import KEYS, START, PretendStore

END = 60
EXAMPLES = int(os.environ.get("EXCIMER_GC_EXAMPLES", "150"))
lsns = st.integers(1, END)


def describe(
    kind: LayerKind, start_lsn: int, end_lsn: int, keys: tuple[int, int], covers: int | None
) -> LayerDescription:
    return LayerDescription(
        kind=kind,
        start_lsn=start_lsn,
        end_lsn=end_lsn,
        first_key=KEYS[keys[0]].hex(),
        last_key=KEYS[keys[1]].hex(),
        generation=1,
        fingerprint=0,
        size_bytes=1,
        index_offset=0,
        value_count=1,
        covers_after_lsn=covers,
    )


@st.composite
def layer_maps(draw: st.DrawFn) -> LayerMap:
    """Deltas one after the other, some missing; images anywhere, covering anything below them."""
    ends = sorted(draw(st.sets(lsns, max_size=12)))
    keys = st.tuples(st.integers(0, 2), st.integers(3, 5))
    layers = [
        describe(LayerKind.DELTA, start, end, draw(keys), None)
        for start, end in zip([0, *ends], ends, strict=False)
        if draw(st.integers(0, 5))
    ]
    for lsn in draw(st.sets(lsns, max_size=8)):
        covers = draw(st.none() | st.just(0) | st.integers(0, lsn - 1))
        layers.append(describe(LayerKind.IMAGE, lsn, lsn, draw(keys), covers))
    return LayerMap.from_descriptions(layers)


@st.composite
def retained_lsns(draw: st.DrawFn) -> RetainedLsns:
    cutoff = draw(lsns)
    points = sorted(draw(st.sets(st.integers(0, cutoff - 1), max_size=4)))
    return RetainedLsns(Lsn(cutoff), tuple(Lsn(point) for point in points))


def all_retained(retained: RetainedLsns) -> Iterator[int]:
    yield from retained.points
    yield from range(retained.cutoff_lsn, END + 2)


def needed_slowly(layer_map: LayerMap, retained: RetainedLsns) -> set[str]:
    """The twin: what reads of all keys at each retained LSN visit, one after the other."""
    plans = (plan_read(layer_map, MIN_KEY, MAX_KEY, 0, lsn) for lsn in all_retained(retained))
    return {visit.layer.description.name for plan in plans for visit in plan.visits}


@settings(deadline=None, max_examples=EXAMPLES)
@given(layer_map=layer_maps(), retained=retained_lsns(), data=st.data())
def test_reads_at_retained_lsns_visit_what_they_did(
    layer_map: LayerMap, retained: RetainedLsns, data: st.DataObject
) -> None:
    removable = removable_layers(layer_map, retained)
    names = {layer.name for layer in removable}
    below = {layer.name for layer in layer_map.descriptions if layer.end_lsn <= retained.cutoff_lsn}
    assert names == below - needed_slowly(layer_map, retained)
    kept = layer_map.changed(removed=removable)
    first, last = sorted(data.draw(st.tuples(st.sampled_from(KEYS), st.sampled_from(KEYS))))
    low = data.draw(st.integers(0, END))
    for lsn in all_retained(retained):
        for low_lsn in {0, min(low, lsn)}:
            before = plan_read(layer_map, first, last, low_lsn, lsn)
            after = plan_read(kept, first, last, low_lsn, lsn)
            assert _shown(after.visits) == _shown(before.visits)
            assert after.continues_in_ancestor == before.continues_in_ancestor


def _shown(visits: list[Visit]) -> list[tuple[str, int, int]]:
    return [(visit.layer.description.name, visit.low_lsn, visit.high_lsn) for visit in visits]


class CollectedStore(PretendStore):
    """A pretended store whose history is collected; `retained` is what must still be read."""

    def __init__(self) -> None:
        super().__init__()
        self.cutoff = START
        self.points: set[int] = set()

    def hold(self, chance: random.Random) -> None:
        self.points.add(chance.randrange(self.cutoff, self.lsn + 1))

    def release(self, chance: random.Random) -> None:
        if self.points:
            self.points.discard(chance.choice(sorted(self.points)))

    def collect(self, cutoff: int, *, always_worth_it: bool) -> None:
        self.cutoff = max(self.cutoff, cutoff)
        bottom = find_bottom_round(self.map, self.retained(), start_lsn=0)
        if bottom is not None and (always_worth_it or bottom.is_worth_it(len(KEYS), image_size_bytes=1)):
            lsn = bottom.plan.lsn
            for key in KEYS:
                self.origins[key, lsn] = self.newest(key, lsn)
            images = {(key, int(lsn)) for key in KEYS}
            self.map = self.map.changed(added=[self.describe(LayerKind.IMAGE, (lsn, lsn), images, 0)])
        self.map = self.map.changed(removed=plan_gc(self.map, self.retained()).removable)

    def retained(self) -> RetainedLsns:
        below = tuple(Lsn(point) for point in sorted(self.points) if point < self.cutoff)
        above = tuple(Lsn(point) for point in sorted(self.points) if point >= self.cutoff)
        return RetainedLsns(Lsn(self.cutoff), below, above)

    def check(self) -> None:
        for lsn in (*self.retained().points, *range(self.cutoff, self.lsn + 1)):
            for key in KEYS:
                assert self.find(key, 0, lsn) == self.newest(key, lsn)


@settings(deadline=None, max_examples=EXAMPLES)
@given(steps=st.lists(st.sampled_from("fffffcchrgG"), max_size=40), seed=st.integers(0, 2**32))
@example(steps=list("fffffccccfffffccccfffffccccGffffffccccG"), seed=1)
def test_retained_values_survive_any_history(steps: list[str], seed: int) -> None:
    chance = random.Random(seed)
    store = CollectedStore()
    for step in steps:
        match step:
            case "f":
                store.flush(chance)
            case "c":
                store.compact()
            case "h":
                store.hold(chance)
            case "r":
                store.release(chance)
            case _:
                cutoff = chance.randrange(store.cutoff, store.lsn + 1)
                store.collect(cutoff, always_worth_it=step == "G")
    store.check()


def test_space_stays_bounded_over_a_long_history() -> None:
    """3,000 flushes of 6 keys, the newest 100 LSNs retained, a branch held for a while now and then."""
    chance = random.Random(5)
    store = CollectedStore()
    largest = 0
    for number in range(3000):
        store.flush(chance)
        while store.compact():
            pass
        if number % 100 == 0:
            store.hold(chance)
        if number % 250 == 0:
            store.points.clear()
        if number % 10 == 0:
            store.collect(store.lsn - 100, always_worth_it=False)
            largest = max(largest, sum(layer.size_bytes for layer in store.map.descriptions))
    store.check()
    assert largest < 200
