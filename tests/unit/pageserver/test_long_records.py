"""Records of hundreds of megabytes pass through ingest without lying in memory."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.kit.long_record", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def ingest_alone(kind: str, size_mib: int) -> dict[str, int]:
    """In a process of its own, whose peak of memory is that of the record."""
    done = run(kind, str(size_mib))
    assert done.returncode == 0, done.stderr
    sizes: dict[str, int] = json.loads(done.stdout)
    return sizes


def test_a_commit_of_17_million_subtransactions_takes_a_bit_for_each() -> None:
    sizes = ingest_alone("commit", 200)
    assert sizes["record"] > 195 * MIB
    assert sizes["kept"] < sizes["record"] // 12 // 8 + 2 * MIB
    assert sizes["grown"] < 3 * sizes["kept"] + 16 * MIB
    assert sizes["next_xid"] > 17_000_000


def test_a_prepared_transaction_takes_its_state_file_twice() -> None:
    sizes = ingest_alone("prepare", 64)
    assert sizes["record"] <= sizes["kept"] <= sizes["record"] + 1_000
    assert sizes["grown"] < 2 * sizes["record"] + 16 * MIB
    assert sizes["next_xid"] > 8_000_000


def test_a_record_for_which_there_is_no_memory_is_not_called_damaged() -> None:
    done = run("prepare", "96", "60")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("MemoryError")
