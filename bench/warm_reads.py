"""[warm_select_ratio] Reads of data that the compute has: what lazy hydration costs once it is done.

`pgbench -S` with two clients against an endpoint and against the same PostgreSQL build with the same settings
on a plain directory. Every page is local before the first round; the tables are larger than the
shared buffers, so that a part of the reads goes through libhydrate's `pread`.
"""

from bench.excimer_stack import measured_stack
from bench.model import Bench, Samples
from bench.peer import plain_postgres
from bench.pgbench import Report, Target, interleave, load, run_pgbench

CLIENTS = 2
WARM_UP = "select count(*), sum(abalance) from pgbench_accounts"


def measure(bench: Bench) -> Samples:
    effort = bench.effort

    def run(target: Target) -> Report:
        return run_pgbench(target, "-S", clients=CLIENTS, seconds=effort.run_s)

    with measured_stack() as ours, plain_postgres(ours.target.build) as plain:
        targets = (ours.target, plain)
        for target in targets:
            load(target, effort.pgbench_scale)
        ours.settle()
        ours.restart()
        for target in targets:
            target.sql("checkpoint", WARM_UP)
            run(target)
        rounds = interleave(targets, effort.rounds, run)
    for name in (target.name for target in targets):
        rates = ", ".join(f"{each[name].transactions_per_s:,.0f}" for each in rounds)
        bench.note(f"pgbench -S, transactions per second, {name}: {rates}")
    ratios = [each["excimer"].transactions_per_s / each["plain"].transactions_per_s for each in rounds]
    return {"warm_select_ratio": ratios}
