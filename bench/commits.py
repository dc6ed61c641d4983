"""[tpcb_quorum_ratio, commit_latency_ratio] Commits that wait for two of three disks.

Excimer with three safekeepers against plain PostgreSQL with three `pg_receivewal --synchronous` and
`synchronous_standby_names = 'ANY 2 (…)'` (`peer`). TPC-B with 16 clients is compared by its rate; commit
latency by an update of one row per transaction from one client, as the mean over a run.
In both systems a commit is acknowledged when two of three independent directories have synced it. The plain
server syncs its own WAL besides, because it has nothing else to start from; a compute does not.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.excimer_stack import measured_stack
from bench.model import Bench, Samples
from bench.peer import quorum_postgres
from bench.pgbench import Report, Target, interleave, load, run_pgbench

CLIENTS = 16
ONE_ROW = (
    "\\set aid random(1, 100000 * :scale)\n"
    "update pgbench_accounts set abalance = abalance + 1 where aid = :aid;\n"
)


def measure(bench: Bench) -> Samples:
    effort = bench.effort

    def run_tpcb(target: Target) -> Report:
        target.sql("checkpoint")
        return run_pgbench(target, clients=CLIENTS, seconds=effort.run_s)

    def run_one_client(target: Target) -> Report:
        target.sql("checkpoint")
        scale = str(effort.pgbench_scale)
        return run_pgbench(target, "-s", scale, "-f", script, clients=1, seconds=effort.run_s)

    with measured_stack() as ours, quorum_postgres(ours.target.build) as plain, one_row_script() as script:
        targets = (ours.target, plain)
        for target in targets:
            load(target, effort.pgbench_scale)
            run_tpcb(target)
        tpcb = interleave(targets, effort.rounds, run_tpcb)
        single = interleave(targets, effort.rounds, run_one_client)
    for name in (target.name for target in targets):
        rates = ", ".join(f"{each[name].transactions_per_s:,.0f}" for each in tpcb)
        latencies = ", ".join(f"{each[name].latency_ms:.2f}" for each in single)
        bench.note(f"TPC-B, transactions per second, {name}: {rates}")
        bench.note(f"one-row update, one client, ms, {name}: {latencies}")
    return {
        "tpcb_quorum_ratio": [
            each["excimer"].transactions_per_s / each["plain"].transactions_per_s for each in tpcb
        ],
        "commit_latency_ratio": [each["excimer"].latency_ms / each["plain"].latency_ms for each in single],
    }


@contextlib.contextmanager
def one_row_script() -> Iterator[str]:
    """The path of pgbench's script of one update."""
    with tempfile.TemporaryDirectory(prefix="excimer-bench-") as directory:
        path = Path(directory) / "one_row.sql"
        path.write_text(ONE_ROW)
        yield str(path)
