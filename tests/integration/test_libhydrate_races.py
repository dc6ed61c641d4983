"""Two or three processes at one lazy file, in the orders that matter (H1); and that the tests would notice.

Each scenario is also run against a library with its protection taken out, where it must fail.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.hydrate_driver import LazyDirectory, Mutation, tag, tags, wait_until

PATH = "base/5/1000"
NEW = 0xABCDEF
SLOW_MS = 300


@pytest.fixture
def lazy(tmp_path: Path) -> Iterator[LazyDirectory]:
    directory = LazyDirectory(tmp_path)
    yield directory
    directory.close()


def write_during_fetch(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """A write neither waits for a fetch of its block nor is lost to it."""
    reader, writer = lazy.driver(mutation), lazy.driver(mutation)
    fd, other = reader.open(PATH), writer.open(PATH)
    lazy.server.behaviour.hang = True
    reader.begin(f"pread {fd} 500 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    assert writer.call(f"pwrite {other} 500 1 {NEW}") == "ok 8192"
    lazy.server.behaviour.hang = False
    assert reader.answer() == f"ok 8192 {NEW}"
    assert writer.read(other, 500) == [NEW]
    assert lazy.arena.statistics().kept == 1


def write_during_install(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """A write that comes between the second look and the install waits that moment, and wins."""
    reader, writer = lazy.driver(mutation), lazy.driver(mutation)
    fd, other = reader.open(PATH), writer.open(PATH)
    reader.call(f"slow_writes {SLOW_MS}")
    reader.begin(f"pread {fd} 7 1")
    assert reader.answer() == "writing"
    assert writer.call(f"pwrite {other} 7 1 {NEW}") == "ok 8192"
    reader.answer()
    assert reader.read(fd, 7) == [NEW]


def truncation_during_fetch(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """A fetch under way does not make a file longer that was cut meanwhile; the cut does not wait."""
    reader, cutter = lazy.driver(mutation), lazy.driver(mutation)
    fd, other = reader.open(PATH), cutter.open(PATH)
    lazy.server.behaviour.hang = True
    reader.begin(f"pread {fd} 100 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    assert cutter.call(f"ftruncate {other} 50") == "ok 0"
    lazy.server.behaviour.hang = False
    assert reader.answer() == "ok 0"
    assert reader.call(f"size {PATH}") == "ok 50"


def truncation_during_install(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    reader, cutter = lazy.driver(mutation), lazy.driver(mutation)
    fd, other = reader.open(PATH), cutter.open(PATH)
    reader.call(f"slow_writes {SLOW_MS}")
    reader.begin(f"pread {fd} 100 1")
    assert reader.answer() == "writing"
    assert cutter.call(f"ftruncate {other} 50") == "ok 0"
    reader.answer()
    assert reader.call(f"size {PATH}") == "ok 50"


def regrowth_during_fetch(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """Cut and lengthened again: the new blocks are local, whatever a late answer says."""
    reader, other = lazy.driver(mutation), lazy.driver(mutation)
    fd, fd2 = reader.open(PATH), other.open(PATH)
    lazy.server.behaviour.hang = True
    reader.begin(f"pread {fd} 599 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    assert other.call(f"truncate {PATH} 590") == "ok 0"
    assert other.call(f"ftruncate {fd2} 610") == "ok 0"
    lazy.server.behaviour.hang = False
    assert reader.answer() == "ok 8192 0"
    assert other.read(fd2, 590, 20) == [0] * 20


def one_fetch_for_many(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    readers = [lazy.driver(mutation) for _ in range(3)]
    descriptors = [reader.open(PATH) for reader in readers]
    lazy.server.behaviour.hang = True
    for reader, fd in zip(readers, descriptors, strict=True):
        reader.begin(f"pread {fd} 42 1")
    wait_until(lambda: len(lazy.server.requests) + lazy.arena.statistics().claim_waits == 3)
    lazy.server.behaviour.hang = False
    assert [reader.answer() for reader in readers] == [f"ok 8192 {tag(PATH, 42)}"] * 3
    assert len(lazy.server.requests) == 1


def dead_fetcher(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """Whoever waits for a process that is killed takes over."""
    victim, heir = lazy.driver(mutation), lazy.driver(mutation)
    fd, other = victim.open(PATH), heir.open(PATH)
    lazy.server.behaviour.hang = True
    victim.begin(f"pread {fd} 7 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    heir.begin(f"pread {other} 7 1")
    wait_until(lambda: lazy.arena.statistics().claim_waits == 1)
    victim.signal(signal.SIGKILL)
    wait_until(lambda: len(lazy.server.requests) == 2)
    lazy.server.behaviour.hang = False
    assert heir.answer() == f"ok 8192 {tag(PATH, 7)}"


def replacement_during_fetch(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """A file deleted during a fetch of it, and a new one of the same name: the new one stays as it is."""
    reader, other = lazy.driver(mutation), lazy.driver(mutation)
    fd = reader.open(PATH)
    lazy.server.behaviour.hang = True
    reader.begin(f"pread {fd} 3 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    assert other.call(f"unlink {PATH}") == "ok 0"
    new = other.open(PATH, "wcx")
    assert other.call(f"pwrite {new} 9 1 {NEW}") == "ok 8192"
    lazy.server.behaviour.hang = False
    reader.answer()
    assert other.read(new, 0, 10) == [*[0] * 9, NEW]
    assert reader.read(reader.open(PATH), 3) == [0]


def cut_from_outside_during_fetch(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """Even where the library does not see who cuts the file, hydration does not make it longer."""
    reader = lazy.driver(mutation)
    fd = reader.open(PATH)
    lazy.server.behaviour.hang = True
    reader.begin(f"pread {fd} 100 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    os.truncate(lazy.data_dir / PATH, 50 * 8192)
    lazy.server.behaviour.hang = False
    assert reader.answer() == "ok 0"
    assert reader.call(f"size {PATH}") == "ok 50"


def write_during_prefetch(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """What is fetched for nobody is not put over a write that came meanwhile either."""
    prefetcher, writer = lazy.driver(mutation), lazy.driver(mutation)
    other = writer.open(PATH)
    lazy.server.behaviour.hang = True
    prefetcher.begin(f"prefetch {PATH} 500,2,7,1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    assert writer.call(f"pwrite {other} 500 1 {NEW}") == "ok 8192"
    lazy.server.behaviour.hang = False
    assert prefetcher.answer() == "ok 3"
    assert writer.read(other, 500, 2) == [NEW, tag(PATH, 501)]
    assert lazy.arena.statistics().kept == 1
    assert len(lazy.server.requests) == 2


def prefetch_of_what_is_fetched_or_gone(lazy: LazyDirectory, mutation: Mutation | None = None) -> None:
    """Nobody is waited for, what is here is not asked for, and a file that went is left alone."""
    prefetcher, reader = lazy.driver(mutation), lazy.driver(mutation)
    fd = reader.open(PATH)
    lazy.server.behaviour.hang = True
    reader.begin(f"pread {fd} 7 1")
    wait_until(lambda: len(lazy.server.requests) == 1)
    assert prefetcher.call(f"prefetch {PATH} 7,1") == "ok 0"
    lazy.server.behaviour.hang = False
    reader.answer()
    assert prefetcher.call(f"prefetch {PATH} 7,1,598,100") == "ok 2"
    assert prefetcher.call("prefetch base/5/4711 0,1") == "ok 0"
    assert reader.call(f"unlink {PATH}") == "ok 0"
    assert prefetcher.call(f"prefetch {PATH} 0,5") == "ok 0"
    assert lazy.arena.statistics().read_misses == 1


SCENARIOS = [
    write_during_fetch,
    write_during_install,
    truncation_during_fetch,
    truncation_during_install,
    regrowth_during_fetch,
    one_fetch_for_many,
    dead_fetcher,
    replacement_during_fetch,
    cut_from_outside_during_fetch,
    write_during_prefetch,
    prefetch_of_what_is_fetched_or_gone,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_race(lazy: LazyDirectory, scenario: Callable[[LazyDirectory], None]) -> None:
    scenario(lazy)


NO_SECOND_LOOK = Mutation(
    "hydration.c",
    "while ((block = first_absent(file, block, end)) < end) {\n        uint64_t stop = block + 1;",
    "while (block < end) {\n        uint64_t stop = block + 1;",
)
NO_LOCK_IN_WRITES = Mutation(
    "local_changes.c",
    "hydrate_edges(fd, offset, size) < 0 || lock_install(file, range.block, range.end - range.block) < 0",
    "hydrate_edges(fd, offset, size) < 0",
)
NO_LOCK_IN_TRUNCATION = Mutation(
    "local_changes.c", "lock_install(file, first_gone, file->blocks - first_gone) < 0", "0"
)
NO_LOOK_AT_THE_SIZE = Mutation(
    "hydration.c", "end < file_blocks ? end : file_blocks", "end + 0 * file_blocks"
)
CUT_BLOCKS_STAY_ABSENT = Mutation(
    "local_changes.c", "set_present_from(file, first_gone);", "(void)set_present_from;"
)
NO_CLAIM = Mutation(
    "claims.c",
    "return record_lock(F_SETLK, F_WRLCK, CLAIMS_OFFSET + block_offset(file, block), count) == 0;",
    "return CLAIMS_OFFSET + block_offset(file, block) + (off_t)count > 0;",
)
DELETED_FILES_LIVE_ON = Mutation(
    "file_states.c",
    "        set_state(file, ARENA_GONE);\n    unlock_state(file);",
    "        set_state(file, ARENA_MADE);\n    unlock_state(file);",
)


@pytest.mark.parametrize(
    ("mutation", "scenario"),
    [
        (NO_SECOND_LOOK, write_during_fetch),
        (NO_SECOND_LOOK, write_during_prefetch),
        (NO_LOCK_IN_WRITES, write_during_install),
        (NO_LOCK_IN_TRUNCATION, truncation_during_install),
        (NO_LOOK_AT_THE_SIZE, cut_from_outside_during_fetch),
        (CUT_BLOCKS_STAY_ABSENT, regrowth_during_fetch),
        (NO_CLAIM, one_fetch_for_many),
        (DELETED_FILES_LIVE_ON, replacement_during_fetch),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_library_without_the_protection_fails(
    lazy: LazyDirectory, mutation: Mutation, scenario: Callable[[LazyDirectory, Mutation], None]
) -> None:
    with pytest.raises(AssertionError):
        scenario(lazy, mutation)


def test_readers_agree_after_all(lazy: LazyDirectory) -> None:
    """The plain case, so that the races above are not passed by a library that fetches nothing."""
    reader = lazy.driver()
    fd = reader.open(PATH)
    assert reader.read(fd, 590, 20) == tags(PATH, 590, 600)
