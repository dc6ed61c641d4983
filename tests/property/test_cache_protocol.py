"""The protocol of the bounded cache: every interleaving of a reader, a writer, a fetch and an evictor.

One block of one file. What each actor does between two of its steps is atomic; what the kernel's locks order
is modelled as such. The pageserver knows WAL up to `ingested`, and may be started afresh with less. A mutant
leaves one rule of `csrc/libhydrate` out, and must show a wrong page. That an evicted version is ingested is
none of these rules: readers would wait for it.
"""

import dataclasses
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any

import pytest

HOLE = -1
"""What reading a hole gives: a page of zeros."""

Step = Generator[Callable[[], bool] | None, None, None]
"""An actor: yields between steps; a condition, when it can go on only once that holds."""


class WrongPageError(AssertionError):
    pass


@dataclasses.dataclass
class World:
    """Versions of the page are numbers, which are their LSNs, too."""

    rules: frozenset[str]
    file: int = 1
    present: bool = True
    written: bool = False
    local: bool = False
    evictions: int = 0
    evicted_lsn: int = 0
    epoch: int | None = None
    locked: bool = False
    wal_end: int = 1
    ingested: int = 1
    buffer: int | None = None
    """The version in shared buffers."""
    shown: int = 1
    """The newest version that a reader may rely on: what was last written out, or has always been there."""

    def obeys(self, rule: str) -> bool:
        return rule in self.rules

    def lock(self) -> Callable[[], bool]:
        def take() -> bool:
            if self.locked:
                return False
            self.locked = True
            return True

        return take

    def unlock(self) -> None:
        self.locked = False


def fetch(world: World) -> Step:
    """Absent becomes present: by a reader, or as read-ahead."""
    seen_lsn = world.evicted_lsn
    asked_lsn = seen_lsn if world.obeys("asks as of the eviction") else 0
    yield lambda: world.ingested >= asked_lsn
    version = world.ingested
    yield None
    yield world.lock()
    is_late = world.evicted_lsn != seen_lsn and world.obeys("drops what was asked for before an eviction")
    if not is_late and (not world.present or not world.obeys("looks again under the lock")):
        world.file = version
        world.present, world.written, world.local = True, False, False
    world.unlock()


def read(world: World) -> Step:
    """PostgreSQL reads a block that is not in shared buffers; none is read while it is there."""
    yield lambda: world.buffer is None
    while True:
        least, before = world.shown, world.evictions
        while not world.present:
            yield from fetch(world)
        yield None
        version = world.file
        yield None
        if world.evictions == before or not world.obeys("looks twice"):
            break
    if version < least:
        raise WrongPageError(f"read version {version}, and {least} had been written")


def change(world: World) -> Step:
    """The block is changed in shared buffers (its WAL goes its way) and written out; then it leaves them."""
    world.wal_end += 1
    world.buffer = world.wal_end
    yield None
    version = world.buffer
    locks = world.obeys("writes under the lock")
    seen_present = world.present
    yield world.lock() if locks or not seen_present else None
    if world.obeys("marks what it writes"):
        world.written = world.local = True
    yield None
    world.file = version
    if locks or not seen_present:
        world.present = True
        world.unlock()
    world.shown = version
    world.buffer = None


def evict(world: World, rounds: int = 2) -> Step:
    """The hand comes by: evicts what may go, begins an epoch, asks PostgreSQL for the end of WAL."""
    for _ in range(rounds):
        is_settled = world.epoch is not None and world.epoch <= world.ingested
        if world.present and not world.written and (not world.local or is_settled):
            yield world.lock()
            if world.present and not world.written and (not world.local or is_settled):
                if world.local and world.obeys("raises the file's LSN"):
                    world.evicted_lsn = max(world.evicted_lsn, world.epoch or 0)
                if world.obeys("marks absent before it punches"):
                    world.present = False
                    yield None
                    world.evictions += 1
                    world.file = HOLE
                else:
                    world.file = HOLE
                    yield None
                    world.evictions += 1
                    world.present = False
            world.unlock()
            yield None
        if world.epoch is None or world.epoch <= world.ingested:
            end = world.wal_end
            if world.obeys("asks after it has cleared the marks"):
                world.written = False
                yield None
                end = world.wal_end
            else:
                yield None
                world.written = False
            world.epoch = end
            yield None


def ingest(world: World) -> Step:
    """The pageserver goes on, is killed and begins at an older place, and goes on."""
    world.ingested = world.wal_end
    yield None
    world.ingested = 1
    yield None
    world.ingested = world.wal_end


Actors = Callable[[World], Sequence[Step]]

RULES = frozenset(
    {
        "asks as of the eviction",
        "drops what was asked for before an eviction",
        "looks again under the lock",
        "looks twice",
        "writes under the lock",
        "marks what it writes",
        "raises the file's LSN",
        "marks absent before it punches",
        "asks after it has cleared the marks",
    }
)


Going = list[tuple[Step, Callable[[], bool] | None]]


def state_of(world: World, going: Going) -> Hashable:
    """Two courses that come to the same state go on alike."""
    places = []
    for actor, condition in going:
        at: Any = actor
        while at is not None and at.gi_frame is not None:
            local = tuple(
                (name, value)
                for name, value in at.gi_frame.f_locals.items()
                if isinstance(value, int | bool) or value is None
            )
            places.append((at.gi_code.co_name, at.gi_frame.f_lasti, local))
            at = at.gi_yieldfrom
        places.append(("", int(condition is None), ()))
    return dataclasses.astuple(world), tuple(places)


def follow(rules: frozenset[str], actors: Actors, choices: Sequence[int]) -> tuple[World, Going] | None:
    """Where these choices of who goes next lead; None: the last one cannot go."""
    world = World(rules)
    going: Going = [(actor, None) for actor in actors(world)]
    for index in choices:
        actor, condition = going[index]
        if condition is not None and not condition():
            return None
        try:
            going[index] = (actor, next(actor))
        except StopIteration:
            del going[index]
    return world, going


def explore(rules: frozenset[str], actors: Actors) -> int:
    """All courses; how many states they come to. Nobody waits for ever."""
    start = follow(rules, actors, [])
    assert start is not None
    seen: set[Hashable] = {state_of(*start)}
    pending: list[tuple[list[int], World, Going]] = [([], *start)]
    while pending:
        choices, world, going = pending.pop()
        can_go = False
        for index in range(len(going)):
            reached = follow(rules, actors, [*choices, index])
            if reached is None:
                continue
            can_go = True
            state = state_of(*reached)
            if state not in seen:
                seen.add(state)
                pending.append(([*choices, index], *reached))
        assert can_go or not going or world.ingested < world.evicted_lsn, "all that are left wait for ever"
    return len(seen)


def everybody(world: World) -> Sequence[Step]:
    return [ingest(world), evict(world), change(world), read(world)]


def written_before(world: World) -> Sequence[Step]:
    """The same, of a block that has been changed and written out, and whose epoch has begun."""
    world.wal_end = world.shown = world.file = 2
    world.local = True
    world.epoch = 2
    return [ingest(world), evict(world, 1), read(world), fetch_ahead(world)]


def overwritten(world: World) -> Sequence[Step]:
    """That block again, which is changed once more."""
    written_before(world)
    return [evict(world), change(world), fetch_ahead(world), read(world)]


def fetch_ahead(world: World) -> Step:
    """Read-ahead brings the block along, whether it is in shared buffers or not."""
    yield None
    if not world.present:
        yield from fetch(world)


STAGES = (everybody, written_before, overwritten)


@pytest.mark.parametrize("actors", STAGES)
def test_no_course_shows_a_wrong_page(actors: Actors) -> None:
    assert explore(RULES, actors) > 100


@pytest.mark.parametrize("left_out", sorted(RULES))
def test_each_rule_is_needed(left_out: str) -> None:
    def finds() -> None:
        for actors in STAGES:
            explore(RULES - {left_out}, actors)

    with pytest.raises(WrongPageError):
        finds()
