"""The indexed layer map plans the same visits as a look at every layer, and stays cheap with many."""

import random
from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from excimer.base.keys import Relation, relation_block_key
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription
from excimer.storage.plan.layer_map import LayerMap, PlacedLayer
from excimer.storage.plan.read_path import plan_read

RELATION = Relation(1663, 5, 16384)


def key(number: int) -> bytes:
    return relation_block_key(RELATION, 0, number)


def describe(
    kind: LayerKind,
    lsns: tuple[int, int],
    keys: tuple[int, int],
    *,
    covers_after_lsn: int | None = None,
    level: int = 0,
    fingerprint: int = 0,
) -> LayerDescription:
    return LayerDescription(
        kind=kind,
        start_lsn=lsns[0],
        end_lsn=lsns[1],
        first_key=key(keys[0]).hex(),
        last_key=key(keys[1]).hex(),
        generation=1,
        fingerprint=fingerprint,
        size_bytes=1,
        index_offset=0,
        value_count=1,
        covers_after_lsn=covers_after_lsn,
        level=level,
    )


def plan_slowly(
    layers: Iterable[PlacedLayer], first_key: bytes, last_key: bytes, low_lsn: int, high_lsn: int
) -> tuple[list[tuple[str, int, int]], bool]:
    """The definition: (layer name, low, high) of each visit; whether the ancestor comes next."""
    near = [layer for layer in layers if layer.first_key <= last_key and layer.last_key >= first_key]
    deltas = [layer for layer in near if not layer.is_image]
    steps = {
        (-layer.end_lsn, layer.end_lsn if layer.covers_after_lsn is None else layer.covers_after_lsn)
        for layer in layers
        if layer.is_image and low_lsn < layer.end_lsn <= high_lsn
    }
    visits: list[tuple[str, int, int]] = []

    def visit_deltas(low: int, high: int) -> None:
        pieces = [
            (layer, max(layer.start_lsn, low), min(layer.end_lsn, high))
            for layer in deltas
            if max(layer.start_lsn, low) < min(layer.end_lsn, high)
        ]
        pieces.sort(key=lambda piece: (-piece[2], piece[0].first_key))
        visits.extend((layer.description.name, start, end) for layer, start, end in pieces)

    upper_lsn = high_lsn
    for negative_lsn, covers in sorted(steps):
        lsn = -negative_lsn
        if lsn > upper_lsn:
            continue
        visit_deltas(lsn, upper_lsn)
        images = [
            layer
            for layer in near
            if layer.is_image
            and layer.end_lsn == lsn
            and covers == (lsn if layer.covers_after_lsn is None else layer.covers_after_lsn)
        ]
        images.sort(key=lambda layer: layer.first_key)
        visits += [(layer.description.name, lsn - 1, lsn) for layer in images]
        if covers == 0:
            return visits, False
        upper_lsn = covers
    visit_deltas(low_lsn, upper_lsn)
    return visits, True


def random_layers(chance: random.Random) -> list[LayerDescription]:
    """Flushes and merges without overlap in LSNs, and images that cover more, less or nothing."""
    layers = []
    lsn = 10
    for number in range(chance.randrange(12)):
        end_lsn = lsn + chance.randrange(1, 20)
        cuts = sorted({0, 20, *(chance.randrange(20) for _ in range(chance.randrange(4)))})
        for first, after in pairwise(cuts):
            if chance.random() < 0.9:
                keys = (first, after - 1)
                layers.append(
                    describe(LayerKind.DELTA, (lsn, end_lsn), keys, level=1, fingerprint=100 * number + first)
                )
        lsn = end_lsn + (chance.randrange(5) if chance.random() < 0.2 else 0)
    rounds = [
        (at, chance.choice([None, 0, chance.randrange(at)]))
        for at in (chance.randrange(10, lsn + 1) for _ in range(chance.randrange(6)))
    ]
    for number, (at, covers) in enumerate(dict.fromkeys(rounds)):
        first = chance.randrange(20)
        middle = chance.randrange(first, 20)
        for keys in ((first, middle), (middle + 1, 20)):
            layers.append(
                describe(
                    LayerKind.IMAGE, (at, at), keys, covers_after_lsn=covers, fingerprint=10_000 + number
                )
            )
    return layers


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**32))
def test_the_index_plans_what_a_look_at_every_layer_plans(seed: int) -> None:
    chance = random.Random(seed)
    descriptions = random_layers(chance)
    layer_map = LayerMap.from_descriptions(chance.sample(descriptions, len(descriptions)))
    for _ in range(20):
        first = chance.randrange(21)
        last = chance.randrange(first, 22)
        high = chance.randrange(5, 300)
        low = chance.choice([0, chance.randrange(high)])
        plan = plan_read(layer_map, key(first), key(last), low, high)
        shown = [(visit.layer.description.name, visit.low_lsn, visit.high_lsn) for visit in plan.visits]
        assert (shown, plan.continues_in_ancestor) == plan_slowly(
            layer_map.layers, key(first), key(last), low, high
        )


class CountingKey(bytes):
    """Counts how often any of them is compared."""

    compared = 0

    def __lt__(self, other: bytes) -> bool:
        CountingKey.compared += 1
        return bytes.__lt__(self, other)

    def __le__(self, other: bytes) -> bool:
        CountingKey.compared += 1
        return bytes.__le__(self, other)

    def __gt__(self, other: bytes) -> bool:
        CountingKey.compared += 1
        return bytes.__gt__(self, other)

    def __ge__(self, other: bytes) -> bool:
        CountingKey.compared += 1
        return bytes.__ge__(self, other)


def ten_thousand_layers() -> LayerMap:
    """100 merges cut into 60 layers each, a round of 80 after every other, and 3 flushes on top."""
    layers = []
    for number in range(100):
        lsns = (100 * number, 100 * number + 100)
        layers += [
            describe(LayerKind.DELTA, lsns, (100 * at, 100 * at + 99), level=1, fingerprint=at)
            for at in range(60)
        ]
        if number % 2:
            covers = lsns[1] - 200
            layers += [
                describe(
                    LayerKind.IMAGE,
                    (lsns[1], lsns[1]),
                    (75 * at, 75 * at + 74),
                    covers_after_lsn=covers,
                    fingerprint=1000 + at,
                )
                for at in range(80)
            ]
    layers += [describe(LayerKind.DELTA, (10_000 + at, 10_001 + at), (0, 5999)) for at in range(3)]
    assert len(layers) > 10_000
    return LayerMap.from_descriptions(layers)


def test_a_read_of_ten_thousand_layers_compares_few_keys() -> None:
    layer_map = ten_thousand_layers()
    wanted = CountingKey(key(2345))
    CountingKey.compared = 0
    visits = plan_read(layer_map, wanted, wanted, 0, 9_950).visits
    assert [visit.high_lsn for visit in visits[:3]] == [9_950, 9_900, 9_800]
    assert len(visits) == 2 + 49  # two deltas, and then from each round to the one before
    assert CountingKey.compared <= 20 * len(visits)
