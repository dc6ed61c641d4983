"""[branch_ms] A branch at the newest LSN, by the pageserver's HTTP API, whatever the data size.

The time of `POST /v1/tenant/{t}/timeline` on a connection that is open. Measured on a real database that is
empty, on the same after a load that is about a thousand times as large, and on layer maps of 1 GB and
100 GB, of which only the descriptions exist (`synthetic_tenants`); the slowest of the four is the figure.
"""

import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import httpx

from bench.excimer_stack import measured_stack
from bench.model import Bench, Samples
from bench.pgbench import load
from bench.synthetic_tenants import LAYER_SIZE_BYTES, make_root, new_id, place_tenant
from excimer.base.ids import TenantId, TimelineId, new_timeline_id
from excimer.wire.auth import Right, generate_key_pair
from tests.kit.pageservers import PageserverProcess

BRANCHES_PER_ROUND = 5
SYNTHETIC_LAYERS = (100, 10_000)
"""1 GB and 100 GB."""


def measure(bench: Bench) -> Samples:
    rounds = bench.effort.rounds
    measured: dict[str, list[float]] = {}
    with measured_stack() as ours:
        ours.settle()
        ask = partial(_measure_branch_ms, ours.pageserver, ours.timelines_path, ours.timeline_id)
        measured["a database that is empty"] = [ask() for _ in range(rounds)]
        load(ours.target, bench.effort.pgbench_scale * 2)
        ours.settle()
        size_bytes = int(ours.target.sql("select pg_database_size('postgres')"))
        measured[f"a database that is {size_bytes / 1e6:.0f} MB"] = [ask() for _ in range(rounds)]
    measured |= _measure_synthetic(rounds)
    for what, samples in measured.items():
        bench.note(f"branch of {what}, ms: {', '.join(f'{each:.1f}' for each in samples)}")
    return {"branch_ms": [max(parts) for parts in zip(*measured.values(), strict=True)]}


def _measure_synthetic(rounds: int) -> dict[str, list[float]]:
    chance = random.Random(1)
    roots = {
        layers: make_root(TenantId(new_id(chance)), TimelineId(new_id(chance)), layers, chance)
        for layers in SYNTHETIC_LAYERS
    }
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="excimer-bench-") as directory:
        server = PageserverProcess(Path(directory), generate_key_pair())
        for root in roots.values():
            place_tenant(server, [root])
        server.start()
        try:
            headers = {"Authorization": f"Bearer {server.token(Right.MANAGE)}"}
            address = f"http://{server.http_address}/v1"
            with httpx.Client(base_url=address, headers=headers, timeout=120) as client:
                for layers, root in roots.items():
                    path = f"/tenant/{root.tenant_id}/timeline"
                    ask = partial(_measure_branch_ms, client, path, TimelineId(root.timeline_id))
                    size_gb = layers * LAYER_SIZE_BYTES / 1e9
                    measured[f"a layer map of {size_gb:.0f} GB"] = [ask() for _ in range(rounds)]
        finally:
            server.end()
    return measured


def _measure_branch_ms(pageserver: httpx.Client, path: str, ancestor_id: str) -> float:
    """The median of a few."""
    samples = []
    for _ in range(BRANCHES_PER_ROUND):
        timeline_id = new_timeline_id(random.SystemRandom())
        body = {"new_timeline_id": timeline_id, "ancestor_timeline_id": ancestor_id}
        begun = time.monotonic()
        answer = pageserver.post(path, json=body)
        samples.append((time.monotonic() - begun) * 1000)
        answer.raise_for_status()
        pageserver.delete(f"{path}/{timeline_id}").raise_for_status()
    return statistics.median(samples)
