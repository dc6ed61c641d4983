"""Records of hundreds of megabytes pass through ingest without lying in memory."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
MIB = 1 << 20


def ingest_alone(kind: str, size_mib: int) -> dict[str, int]:
    """In a process of its own, whose peak of memory is that of the record."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit.long_record", kind, str(size_mib)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
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
