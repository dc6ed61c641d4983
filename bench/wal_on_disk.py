"""How much WAL safekeepers hold under pgbench: `python -m bench.wal_on_disk [--minutes 60] [--scale 20]`.

Every two seconds it compares each safekeeper's segments with what the pageserver had not flushed, as it stood
`MEMORY_S` ago: so soon a flush is to be heard of and acted upon. Ends with 1 when they hold more.

Not here: how fast it is (`bench.commits`).
"""

import argparse
import subprocess
import sys
import time
from collections import deque

from rich.console import Console

from bench.excimer_stack import MeasuredStack, measured_stack
from excimer.base.lsn import parse_lsn

SAMPLE_INTERVAL_S = 2.0
MEMORY_S = 5.0
SEGMENT_SIZE_BYTES = 16 << 20
MIB = 1 << 20

console = Console()


def wal_sizes(measured: MeasuredStack) -> list[int]:
    """What the branch's segments take at each safekeeper."""
    directories = measured.stack.directory.glob(f"safekeepers/*/*/{measured.timeline_id}")
    return [SEGMENT_SIZE_BYTES * len(list(directory.glob("0*"))) for directory in directories]


def flushed_lsn(measured: MeasuredStack) -> int:
    return parse_lsn(measured.timeline()["remote_consistent_lsn"])


def end_lsn(measured: MeasuredStack) -> int:
    return parse_lsn(measured.target.sql("select pg_current_wal_flush_lsn()").strip())


def watch(measured: MeasuredStack, load: "subprocess.Popen[str]") -> bool:
    """Whether no sample broke the promise. Prints one line a minute, and the last."""
    started, told, is_kept = time.monotonic(), 0.0, True
    flushed = deque([(started, flushed_lsn(measured))])
    most, most_unflushed = 0, 0
    while load.poll() is None:
        while len(flushed) > 1 and flushed[1][0] < time.monotonic() - MEMORY_S:
            flushed.popleft()
        sizes, unflushed = wal_sizes(measured), end_lsn(measured) - flushed[0][1]
        flushed.append((time.monotonic(), flushed_lsn(measured)))
        most, most_unflushed = max(most, *sizes), max(most_unflushed, unflushed)
        bound = 2 * unflushed + 2 * SEGMENT_SIZE_BYTES
        if max(sizes) > bound:
            is_kept = False
            console.print(f"held {max(sizes) // MIB} MiB, more than {bound // MIB} MiB")
        if time.monotonic() - told >= 60:
            told = time.monotonic()
            console.print(
                f"{told - started:6.0f} s: held {[size // MIB for size in sizes]} MiB, "
                f"not flushed {unflushed // MIB} MiB"
            )
        time.sleep(SAMPLE_INTERVAL_S)
    console.print(f"most held {most // MIB} MiB, most not flushed {most_unflushed // MIB} MiB")
    return is_kept


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.wal_on_disk", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--scale", type=int, default=20)
    chosen = parser.parse_args(arguments)
    with measured_stack() as measured:
        stack = measured.stack
        stack.check_program("pgbench", "-i", "-q", "-s", str(chosen.scale))
        begin_lsn = end_lsn(measured)
        load = stack.program("pgbench", "-c", "8", "-j", "2", "-T", str(int(chosen.minutes * 60)))
        is_kept = watch(measured, load)
        output, _ = load.communicate()
        written = end_lsn(measured) - begin_lsn
        console.print(f"written {written // MIB} MiB of WAL\n{output.strip()}")
        stack.text("endpoint", "stop", "main")
        stack.wait_until(
            lambda: max(wal_sizes(measured)) <= 2 * SEGMENT_SIZE_BYTES, "an idle branch is trimmed", 120
        )
        console.print(f"idle: held {[size // MIB for size in wal_sizes(measured)]} MiB")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
