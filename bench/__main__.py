"""`python -m bench [--only ID]... [--quick]`: measures, prints a table, writes bench/results/latest.json.

`--quick` writes nothing: its figures are not for keeping. With `--only`, the other figures of the file stay.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from bench import (
    backpressure,
    branching,
    bulk_writes,
    cold_scan,
    commits,
    compaction,
    first_page,
    ingest,
    many_tenants,
    page_reads,
    prewarm,
    stack_memory,
    starting,
    tls_commits,
    waking,
    warm_reads,
)
from bench.model import FULL, GOALS, QUICK, Bench, Family, Result, make_result
from bench.report import print_table, write_results

LATEST = Path(__file__).parent / "results" / "latest.json"

FAMILIES = (
    Family(("warm_select_ratio",), warm_reads.measure),
    Family(("tpcb_quorum_ratio", "commit_latency_ratio"), commits.measure),
    Family(("tls_commit_latency_ratio", "tls_tpcb_ratio"), tls_commits.measure),
    Family(("backpressure_tps_ratio",), backpressure.measure),
    Family(("ingest_pgbench_mb_s", "ingest_copy_mb_s", "ingest_vs_recovery_ratio"), ingest.measure),
    Family(page_reads.IDS, page_reads.measure),
    Family(cold_scan.IDS, cold_scan.measure),
    Family(("prewarm_recovery_s",), prewarm.measure),
    Family(bulk_writes.IDS, bulk_writes.measure),
    Family(compaction.IDS, compaction.measure),
    Family(("branch_ms",), branching.measure),
    Family(("attach_first_page_ms",), first_page.measure),
    Family(many_tenants.IDS, many_tenants.measure),
    Family(stack_memory.IDS, stack_memory.measure),
    Family(("endpoint_start_ms", "manifest_to_row_ms"), starting.measure),
    Family(waking.WAKE_IDS, waking.measure),
    Family(("wake_20k_tables_ms",), waking.measure_tables),
    Family(("wake_storm_100_s",), waking.measure_storm),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(GOALS), help="one figure; may be repeated")
    parser.add_argument("--quick", action="store_true", help="little work, to see that it works")
    options = parser.parse_args()
    # Everything that runs is ended by the context that started it: Ctrl-C and SIGTERM unwind alike.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wanted = set(options.only or GOALS)
    console = Console(width=None if sys.stdout.isatty() else 130)
    bench = Bench(QUICK if options.quick else FULL, lambda text: console.print(f"  {text}", highlight=False))
    try:
        results = measure_all(console, bench, wanted, None if options.quick else LATEST)
    except KeyboardInterrupt:
        console.print("interrupted; everything it started has been stopped")
        return 130
    print_table(console, results)
    return 0


def measure_all(console: Console, bench: Bench, wanted: set[str], path: Path | None) -> list[Result]:
    """Writes each family's figures to `path` when it is done: an interrupted run keeps what it has."""
    results: list[Result] = []
    for family in FAMILIES:
        if wanted.isdisjoint(family.ids):
            continue
        begun = time.monotonic()
        load = os.getloadavg()[0]
        console.print(f"{', '.join(family.ids)} (load before: {load:.1f} on {os.cpu_count()} cores) …")
        samples = family.measure(bench)
        new = [make_result(GOALS[name], values) for name, values in samples.items() if name in wanted]
        results += new
        if path is not None:
            write_results(path, new)
        bench.note(f"took {time.monotonic() - begun:.0f} s")
    return results


if __name__ == "__main__":
    sys.exit(main())
