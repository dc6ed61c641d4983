"""Many processes at a few lazy files, one killed every few milliseconds, against a model of every block.

Each round is short and starts with nothing hydrated, because the interesting time is over when all blocks
are present. EXCIMER_TORTURE_ROUNDS makes it longer.
"""

import os
import random
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.compute.arena import ArenaFile, ArenaSettings, build_arena
from tests.kit.fake_page_server import FakePageServer
from tests.kit.hydrate_driver import TENANT, TIMELINE, Mutation, program

ROUNDS = int(os.environ.get("EXCIMER_TORTURE_ROUNDS", "5"))
ROUND_S = 1
PROCESSES = 6
KILL_EVERY_MS = 20
FILES = 3
BLOCKS = 600

NO_SECOND_LOOK = Mutation(
    "hydration.c",
    "while ((block = first_absent(file, block, end)) < end) {\n        uint64_t stop = block + 1;",
    "while (block < end) {\n        uint64_t stop = block + 1;",
)


@pytest.fixture(scope="module")
def pages_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pages = tmp_path_factory.mktemp("pages")
    (pages / "base/5").mkdir(parents=True)
    for file in range(FILES):
        tags = (struct.pack("<Q", (file + 1) << 32 | block) for block in range(BLOCKS))
        content = b"".join(tag * (BLOCK_SIZE_BYTES // 8) for tag in tags)
        (pages / f"base/5/{1000 + file}").write_bytes(content)
    return pages


NO_SECOND_LOOK_AFTER_READS = Mutation(
    "interposed_transfer.c",
    "if (file_evictions(fd) == evictions)\n        return true;",
    "if (file_evictions(fd) == evictions || evictions != 0)\n        return true;",
)
NO_LOCK_FOR_WRITES_OF_PRESENT_BLOCKS = Mutation(
    "local_changes.c",
    "    if (is_evictable(file) && offset >= 0 && size > 0)",
    "    if (is_evictable(file) && offset < 0)",
)


def run_round(
    root: Path, pages: Path, mutation: Mutation | None, *, evicts: bool = False
) -> "subprocess.CompletedProcess[str]":
    data_dir, arena_path = root / "data", root / "arena"
    data_dir.mkdir(parents=True)
    if evicts:  # what is written is written there, too
        pages = Path(shutil.copytree(pages, root / "pages"))
    seed = random.SystemRandom().randrange(1 << 30)
    with FakePageServer(pages) as server:
        server.behaviour.delay_s = 0.005
        files = [ArenaFile(f"base/5/{1000 + file}", BLOCKS) for file in range(FILES)]
        settings = ArenaSettings(server.address, TENANT, TIMELINE, "token", read_ahead_blocks=8)
        arena = build_arena(arena_path, files=files, settings=settings, data_dir=data_dir, evicts=evicts)
        result = subprocess.run(
            [
                program("torture", mutation),
                *map(str, (PROCESSES, ROUND_S, KILL_EVERY_MS, seed)),
                *([str(pages)] if evicts else []),
            ],
            cwd=data_dir,
            env=os.environ
            | {"EXCIMER_ARENA": str(arena_path), "EXCIMER_FORCE": "1", "ASAN_OPTIONS": "detect_leaks=0"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        print(f"seed {seed}: {result.stdout}{result.stderr}{arena.statistics()}")
        arena.close()
    return result


def test_no_block_is_ever_wrong(tmp_path: Path, pages_dir: Path) -> None:
    for number in range(ROUNDS):
        result = run_round(tmp_path / str(number), pages_dir, None)
        assert result.returncode == 0, result.stderr
        assert "Sanitizer" not in result.stderr
        assert int(re.findall(r"kills (\d+)", result.stdout)[0]) > 0


@pytest.mark.parametrize("mutation", [NO_SECOND_LOOK], ids=["no second look"])
def test_the_torture_finds_a_broken_library(tmp_path: Path, pages_dir: Path, mutation: Mutation) -> None:
    results = (run_round(tmp_path / str(number), pages_dir, mutation) for number in range(30))
    assert any(result.returncode == 1 for result in results)


def test_no_block_is_ever_wrong_while_others_are_evicted(tmp_path: Path, pages_dir: Path) -> None:
    evicted = 0
    for number in range(ROUNDS):
        result = run_round(tmp_path / str(number), pages_dir, None, evicts=True)
        assert result.returncode == 0, result.stderr
        assert "Sanitizer" not in result.stderr
        evicted += int(re.findall(r"evicted (\d+)", result.stdout)[0])
    assert evicted > 0


@pytest.mark.parametrize(
    "mutation",
    [NO_SECOND_LOOK_AFTER_READS, NO_LOCK_FOR_WRITES_OF_PRESENT_BLOCKS],
    ids=["no second look after reads", "no lock for writes"],
)
def test_the_torture_finds_what_eviction_breaks(tmp_path: Path, pages_dir: Path, mutation: Mutation) -> None:
    results = (run_round(tmp_path / str(number), pages_dir, mutation, evicts=True) for number in range(30))
    assert any(result.returncode == 1 for result in results)
