"""[branch_ms] A branch at the newest LSN, by the pageserver's HTTP API, whatever the data size.

The time of `POST /v1/tenant/{t}/timeline` on a connection that is open. Measured on an empty history and
again after a load that is about a thousand times as large; a round's figure is the slower of the two.
"""

import random
import statistics
import time

from bench.excimer_stack import MeasuredStack, measured_stack
from bench.model import Bench, Samples
from bench.pgbench import load
from excimer.base.ids import new_timeline_id

BRANCHES_PER_ROUND = 5


def measure(bench: Bench) -> Samples:
    rounds = bench.effort.rounds
    with measured_stack() as ours:
        ours.settle()
        small = [_measure_branch_ms(ours) for _ in range(rounds)]
        load(ours.target, bench.effort.pgbench_scale * 2)
        ours.settle()
        large = [_measure_branch_ms(ours) for _ in range(rounds)]
        size_bytes = int(ours.target.sql("select pg_database_size('postgres')"))
    for what, samples in (("empty", small), (f"{size_bytes / 1e6:.0f} MB", large)):
        bench.note(f"branch of a database that is {what}, ms: {', '.join(f'{each:.1f}' for each in samples)}")
    return {"branch_ms": [max(pair) for pair in zip(small, large, strict=True)]}


def _measure_branch_ms(ours: MeasuredStack) -> float:
    """The median of a few."""
    samples = []
    for _ in range(BRANCHES_PER_ROUND):
        timeline_id = new_timeline_id(random.SystemRandom())
        body = {"new_timeline_id": timeline_id, "ancestor_timeline_id": ours.timeline_id}
        begun = time.monotonic()
        answer = ours.pageserver.post(ours.timelines_path, json=body)
        samples.append((time.monotonic() - begun) * 1000)
        answer.raise_for_status()
        ours.pageserver.delete(f"{ours.timelines_path}/{timeline_id}").raise_for_status()
    return statistics.median(samples)
