"""[prewarm_recovery_s] How soon an endpoint that starts with an empty directory is as fast as before.

`pgbench -S` with eight clients over a hot set of 1 GB, all of it local: the warm rate. Then the endpoint is
stopped, its directory is removed, it is started, and the same pgbench runs at once, while what was hot is
prefetched. The end of the first second with 90 % of the warm rate, from the start of pgbench.
"""

import re

from bench.excimer_stack import measured_stack
from bench.model import Bench, Samples
from bench.pgbench import BenchFailedError, load, run_pgbench

CLIENTS = 8
PART = 0.9
WATCHED_S = 60
WARM_UP = "select count(*), sum(abalance) from pgbench_accounts"
_PROGRESS = re.compile(r"^progress: ([0-9.]+) s, ([0-9.]+) tps", re.MULTILINE)


def measure(bench: Bench) -> Samples:
    samples = []
    with measured_stack() as ours:
        load(ours.target, bench.effort.hot_scale)
        ours.settle()
        ours.target.sql(WARM_UP)
        for _ in range(max(2, bench.effort.rounds // 2)):
            run_pgbench(ours.target, "-S", clients=CLIENTS, seconds=bench.effort.run_s)
            warm = run_pgbench(ours.target, "-S", clients=CLIENTS, seconds=bench.effort.run_s)
            ours.restart()
            arguments = ("-S", "-c", str(CLIENTS), "-j", "2", "-P", "1", "-T", str(WATCHED_S))
            output = ours.target.run("pgbench", "-n", *arguments)
            seconds = [(float(end), float(rate)) for end, rate in _PROGRESS.findall(output)]
            reached = [end for end, rate in seconds if rate >= PART * warm.transactions_per_s]
            rates = ", ".join(f"{rate:,.0f}" for _, rate in seconds[:8])
            bench.note(f"warm {warm.transactions_per_s:,.0f}; by seconds after a cold start {rates}")
            entry = ours.last_log_entry("hot blocks are fetched")
            bench.note(f"{entry['fetched']} of {entry['listed']} blocks in {entry['ms']} ms: {entry['end']}")
            if not seconds:
                raise BenchFailedError(f"pgbench's progress is not understood: {output[-2000:]}")
            samples.append(reached[0] if reached else float(WATCHED_S))
            ours.target.sql(WARM_UP)
    return {"prewarm_recovery_s": samples}
