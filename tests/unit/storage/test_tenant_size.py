"""The examples of docs/architecture/sizes.md, and that the formula finds the least of all ways."""

import itertools
import random
from collections.abc import Sequence

import pytest

from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.storage.plan.tenant_size import (
    Method,
    SizePoint,
    TimelineHistory,
    plan_points,
    sizes_wanted,
    synthetic_size,
)

MAIN, DEV, TEST = TimelineId("11" * 16), TimelineId("22" * 16), TimelineId("33" * 16)
GB = 1_000_000_000


def history(
    timeline_id: TimelineId,
    start: int,
    cutoff: int,
    head: int,
    *,
    home: TimelineId | None = None,
    held: Sequence[int] = (),
    branch_points: Sequence[int] = (),
) -> TimelineHistory:
    return TimelineHistory(
        timeline_id,
        home,
        Lsn(start),
        Lsn(cutoff),
        Lsn(head),
        frozenset(Lsn(each) for each in held),
        frozenset(Lsn(each) for each in branch_points),
    )


def size_of(*histories: TimelineHistory, logical: int) -> int:
    sizes = {(each.timeline_id, lsn): logical for each in histories for lsn in sizes_wanted(each)}
    return synthetic_size(plan_points(histories, sizes)).size_bytes


def test_one_branch_costs_its_size_at_the_cutoff_and_the_wal_since() -> None:
    assert size_of(history(MAIN, 0, 40 * GB, 43 * GB), logical=10 * GB) == 13 * GB


def test_a_database_that_nobody_writes_costs_its_size() -> None:
    assert size_of(history(MAIN, 0, 5 * GB, 5 * GB), logical=10 * GB) == 10 * GB


def test_a_young_branch_costs_only_its_own_wal() -> None:
    main = history(MAIN, 0, 40 * GB, 43 * GB, branch_points=[42 * GB])
    dev = history(DEV, 42 * GB, 42 * GB, 44 * GB, home=MAIN)
    assert size_of(main, dev, logical=10 * GB) == 15 * GB


def test_an_old_branch_costs_the_wal_to_the_cutoff_or_a_copy_whichever_is_less() -> None:
    """main's branch point lies below its cutoff: 8 GB of WAL to the cutoff are less than 10 GB."""
    main = history(MAIN, 0, 40 * GB, 43 * GB, branch_points=[32 * GB])
    dev = history(DEV, 32 * GB, 32 * GB, 33 * GB, home=MAIN)
    assert size_of(main, dev, logical=10 * GB) == 10 * GB + 8 * GB + 3 * GB + 1 * GB
    ancient = history(MAIN, 0, 40 * GB, 43 * GB, branch_points=[2 * GB])
    old = history(DEV, 2 * GB, 2 * GB, 3 * GB, home=MAIN)
    assert size_of(ancient, old, logical=10 * GB) == 10 * GB + 10 * GB + 3 * GB + 1 * GB


def test_a_lease_below_the_cutoff_keeps_one_lsn() -> None:
    held = history(MAIN, 0, 40 * GB, 43 * GB, held=[39 * GB])
    assert size_of(held, logical=10 * GB) == 10 * GB + 1 * GB + 3 * GB


def test_branches_of_a_branch() -> None:
    main = history(MAIN, 0, 10 * GB, 10 * GB, branch_points=[10 * GB])
    dev = history(DEV, 10 * GB, 10 * GB, 12 * GB, home=MAIN, branch_points=[11 * GB])
    test = history(TEST, 11 * GB, 11 * GB, 11 * GB, home=DEV)
    points = plan_points(
        [main, dev, test],
        {(MAIN, Lsn(10 * GB)): GB, (DEV, Lsn(10 * GB)): GB, (TEST, Lsn(11 * GB)): 2 * GB},
    )
    found = synthetic_size(points)
    assert found.size_bytes == 3 * GB
    assert found.methods.count(Method.SNAPSHOT) == 1


def test_no_history_is_readable_without_any_snapshot() -> None:
    with pytest.raises(ValueError, match="no point"):
        synthetic_size([SizePoint(None, 0, None, True)])


def test_the_formula_finds_the_least_of_all_ways() -> None:
    chance = random.Random(1)
    for _ in range(300):
        points = [SizePoint(None, chance.randrange(10), chance.randrange(1, 30), False)]
        for number in range(1, chance.randrange(2, 7)):
            parent = chance.randrange(number)
            lsn = points[parent].lsn + chance.randrange(12)
            size = chance.choice([None, chance.randrange(1, 30)])
            points.append(SizePoint(parent, lsn, size, chance.random() < 0.4))
        assert synthetic_size(points).size_bytes == least(points)


def least(points: list[SizePoint]) -> int:
    """Every assignment of methods, tried."""
    costs = []
    for methods in itertools.product(Method, repeat=len(points)):
        cost = 0
        for point, method in zip(points, methods, strict=True):
            has_parent = point.parent is not None and methods[point.parent] is not Method.NOTHING
            if method is Method.NOTHING:
                allowed = not point.is_needed
            elif method is Method.SNAPSHOT:
                allowed = point.size_bytes is not None and (point.parent is None or not point.is_needed)
                cost += point.size_bytes or 0
            else:
                allowed = has_parent
                cost += point.lsn - points[point.parent].lsn if point.parent is not None else 0
            if not allowed:
                break
        else:
            costs.append(cost)
    return min(costs)
