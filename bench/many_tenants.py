"""[tenants_start_s, tenants_rss_mib, tenants_idle_cpu_percent] A thousand tenants on one pageserver.

Each tenant has a root and two branches, the root with twenty layers in its manifest; of these only the
descriptions exist, because attaching reads nothing else (`synthetic_tenants`). The object store is a local
directory. One real pageserver process, no broker: start is from its launch until `/healthz` says that all
tenants are attached; memory is its resident set then; idle CPU is what it uses in the half minute after the
first, of one core.
"""

import random
import tempfile
import time
from pathlib import Path

from bench.model import Bench, Samples
from bench.synthetic_tenants import make_branch, make_root, new_id, place_tenant
from excimer.base.ids import TenantId, TimelineId
from excimer.wire.auth import generate_key_pair
from tests.kit.pageservers import PageserverProcess

IDS = ("tenants_start_s", "tenants_rss_mib", "tenants_idle_cpu_percent")
LAYERS = 20


def measure(bench: Bench) -> Samples:
    samples: Samples = {name: [] for name in IDS}
    with tempfile.TemporaryDirectory(prefix="excimer-bench-") as directory:
        server = PageserverProcess(Path(directory), generate_key_pair())
        _make_tenants(server, bench.effort.tenants)
        for _ in range(bench.effort.rounds):
            began = time.monotonic()
            server.start()
            try:
                samples["tenants_start_s"].append(time.monotonic() - began)
                samples["tenants_rss_mib"].append(server.rss_bytes() / (1 << 20))
                time.sleep(bench.effort.idle_s)
                before = server.cpu_s()
                time.sleep(bench.effort.idle_s)
                samples["tenants_idle_cpu_percent"].append(
                    100 * (server.cpu_s() - before) / bench.effort.idle_s
                )
                server.stop()
            finally:
                server.end()
    bench.note(f"tenants: {bench.effort.tenants:,}, timelines: {3 * bench.effort.tenants:,}")
    return samples


def _make_tenants(server: PageserverProcess, count: int) -> None:
    chance = random.Random(1)
    for _ in range(count):
        root = make_root(TenantId(new_id(chance)), TimelineId(new_id(chance)), LAYERS, chance)
        place_tenant(server, [root, *(make_branch(root, TimelineId(new_id(chance))) for _ in range(2))])
