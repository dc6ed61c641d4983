"""[tpcb_fsync_ratio, bulk_load_ratio, index_build_ratio] Writes beside plain PostgreSQL without a replica.

The peer has its own fsync and full page writes, and nobody that its commits wait for but its disk; ours has
three safekeepers and a pageserver on the same machine. TPC-B with 16 clients; a `COPY` from standard input
into a table that the same transaction did not make; `CREATE INDEX` on that table. Rates of ours over the
peer's, measured in turns.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.excimer_stack import measured_stack
from bench.model import Bench, Samples
from bench.peer import plain_postgres
from bench.pgbench import Target, interleave, load, run_pgbench

IDS = ("tpcb_fsync_ratio", "bulk_load_ratio", "index_build_ratio")
CLIENTS = 16


def measure(bench: Bench) -> Samples:
    effort = bench.effort
    with (
        measured_stack() as ours,
        plain_postgres(ours.target.build) as plain,
        tempfile.TemporaryDirectory(prefix="excimer-bench-") as folder,
    ):
        targets = (ours.target, plain)
        for target in targets:
            load(target, effort.pgbench_scale)
        rounds = interleave(
            targets, effort.rounds, lambda target: run_pgbench(target, clients=CLIENTS, seconds=effort.run_s)
        )
        tpcb = [each["excimer"].transactions_per_s / each["plain"].transactions_per_s for each in rounds]
        rows = _write_rows(Path(folder) / "rows", effort.ingest_rows)
        loads, indexes = [], []
        for number in range(effort.rounds):
            order = targets if number % 2 == 0 else targets[::-1]
            for target in order:
                target.sql("drop table if exists loaded", "create table loaded (id int, value int, pad text)")
                target.sql("checkpoint")
            copy = f"\\copy loaded from '{rows}'"
            loads.append(_ratio(order, lambda target: target.sql(copy)))  # noqa: B023
            indexes.append(_ratio(order, lambda target: target.sql("create index on loaded (value, id)")))
    for name, ratios in (("TPC-B", tpcb), ("COPY", loads), ("CREATE INDEX", indexes)):
        bench.note(f"{name}, rate of plain's: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    return {"tpcb_fsync_ratio": tpcb, "bulk_load_ratio": loads, "index_build_ratio": indexes}


def _ratio(targets: tuple[Target, ...], act: Callable[[Target], object]) -> float:
    took_s = {}
    for target in targets:
        begun = time.monotonic()
        act(target)
        took_s[target.name] = time.monotonic() - begun
    return took_s["plain"] / took_s["excimer"]


def _write_rows(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            file.write(f"{number}\t{number * 7919 % 1000003}\t{number:0100d}\n")
    path.chmod(0o644)
    path.parent.chmod(0o755)
    return path
