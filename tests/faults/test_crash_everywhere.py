"""A life of a tenant that ends at each operation of its disk or object store in turn, and goes on.

Flushes, merges, images, branches, leases, collections, evictions, a detachment, archiving, a deletion:
whatever was acknowledged before the crash is there after it, every page at every LSN that must be readable is
right, the work can be finished, and nothing that nobody names stays: the same owner finds it when it attaches
again, and so does the next.
"""

import os
from itertools import count

import pytest

from excimer.base.ids import TimelineId
from tests.kit.directories import new_memory_directory
from tests.kit.engine_oracle import LITTLE_IMPORTED
from tests.kit.engine_world import EngineWorld
from tests.kit.storage_world import MAIN

STRIDE = int(os.environ.get("EXCIMER_CRASH_STRIDE", "31"))
"""1: at every operation."""


def history(world: EngineWorld) -> None:
    grow(world, 2)
    early, late = (world.oracles[MAIN].ends[at] for at in (8, -5))
    world.branch(MAIN, early)
    first = newest(world)
    world.put(first, 25)
    world.branch(MAIN, late)
    second = newest(world)
    world.put(second, 15)
    world.lease(MAIN, world.oracles[MAIN].ends[14])
    grow(world, 2)
    world.compact(MAIN)
    world.collect(MAIN, 100)
    world.evict(MAIN, 1.0)
    world.check_some()
    world.flush(second)
    world.archive_and_back(second)
    world.detach(first)
    grow(world, 1)
    world.branch(first, world.oracles[first].last_lsn)
    world.compact(MAIN)
    world.delete(newest(world))
    world.leases.clear()
    world.collect(MAIN, 50)
    world.collect(first, 50)


def grow(world: EngineWorld, flushes: int) -> None:
    for _ in range(flushes):
        world.put(MAIN, 20)
        world.flush(MAIN)


def newest(world: EngineWorld) -> TimelineId:
    return list(world.oracles)[-1]


def live_on(world: EngineWorld) -> None:
    for timeline in world.tenant.timelines.values():
        world.runner.run(timeline.leftovers.sweep())  # of its own accord
    world.check_no_garbage()
    for timeline_id in list(world.oracles):
        world.flush(timeline_id)
        world.compact(timeline_id)
        world.collect(timeline_id, 100)
    world.check_all(moments=2)
    world.move()
    world.check_no_garbage()
    world.check_all(moments=0)


def run_with_crash(at: int, *, power_failure: bool) -> bool:
    """Whether the crash happened: when it no longer does, every operation has had its turn."""
    world = EngineWorld(new_memory_directory("excimer-crash-"), seed=5)
    try:
        world.create(LITTLE_IMPORTED)
        crashed = world.crash(lambda: history(world), at, power_failure=power_failure, again=at % 23)
        world.check_all(moments=2)
        live_on(world)
        return crashed
    finally:
        world.close()


@pytest.mark.parametrize(
    ("power_failure", "first"), [(False, 3), (True, 11)], ids=["killed", "power failure"]
)
def test_the_process_may_end_at_any_operation(power_failure: bool, first: int) -> None:
    for at in count(first if STRIDE > 1 else 1, STRIDE):
        try:
            crashed = run_with_crash(at, power_failure=power_failure)
        except AssertionError as error:
            raise AssertionError(f"after a crash at operation {at}: {error}") from error
        if not crashed:
            break
    assert at > 300, "the history does less than it did: is it still worth its name?"
