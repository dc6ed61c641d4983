"""[tls_commit_latency_ratio, tls_tpcb_ratio] What TLS between the services costs a commit.

Two installations of three safekeepers each stand beside each other, one made with `init --tls`; the work of
`commits` goes to one and the other in turns, so that both see the same machine.
"""

import contextlib

from bench.commits import CLIENTS, one_row_script
from bench.excimer_stack import measured_stack
from bench.model import Bench, Samples
from bench.pgbench import Report, Target, interleave, load, run_pgbench

SHORT_RUNS = 3
"""So many times more rounds than other figures have, each so many times shorter: the difference is small."""


def measure(bench: Bench) -> Samples:
    effort = bench.effort
    rounds, seconds = effort.rounds * SHORT_RUNS, max(1, effort.run_s // SHORT_RUNS)

    def run_tpcb(target: Target) -> Report:
        return run_pgbench(target, clients=CLIENTS, seconds=seconds)

    def run_one_client(target: Target) -> Report:
        scale = str(effort.pgbench_scale)
        return run_pgbench(target, "-s", scale, "-f", script, clients=1, seconds=seconds)

    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(measured_stack("plain")).target
        tls = stack.enter_context(measured_stack("tls", options=["--tls"])).target
        script = stack.enter_context(one_row_script())
        for target in (plain, tls):
            load(target, effort.pgbench_scale)
            run_tpcb(target)
        single = interleave((plain, tls), rounds, run_one_client)
        tpcb = interleave((plain, tls), rounds, run_tpcb)
    for name in ("plain", "tls"):
        latencies = ", ".join(f"{each[name].latency_ms:.3f}" for each in single)
        rates = ", ".join(f"{each[name].transactions_per_s:,.0f}" for each in tpcb)
        bench.note(f"one-row update, one client, ms, {name}: {latencies}")
        bench.note(f"TPC-B, transactions per second, {name}: {rates}")
    return {
        "tls_commit_latency_ratio": [each["tls"].latency_ms / each["plain"].latency_ms for each in single],
        "tls_tpcb_ratio": [
            each["tls"].transactions_per_s / each["plain"].transactions_per_s for each in tpcb
        ],
    }
