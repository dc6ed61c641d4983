"""[tenants_start_s, tenants_rss_mib, tenants_idle_cpu_percent] A thousand tenants on one pageserver.

Each tenant has a root and two branches, the root with twenty layers in its manifest. The manifests are
written as the engine writes them; of the layers only the descriptions exist, because attaching reads
nothing else. The object store is a local directory. One real pageserver process, no broker: start is from
its launch until `/healthz` says that all tenants are attached; memory is its resident set then; idle CPU is
what it uses in the minute after the first, of one core.
"""

import random
import tempfile
import time
from pathlib import Path

from bench.model import Bench, Samples
from excimer.base.ids import TenantId, TimelineId
from excimer.pageserver.model import TenantRecord
from excimer.pageserver.tenant_records import TenantRecords
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription, Manifest, ManifestName, pack_manifest
from excimer.wire.auth import generate_key_pair
from tests.kit.pageservers import PageserverProcess

IDS = ("tenants_start_s", "tenants_rss_mib", "tenants_idle_cpu_percent")
LAYERS = 20
LAYER_WAL_BYTES = 1 << 24
GENERATION = 1


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
    records = TenantRecords(server.data_dir / "tenants")
    for _ in range(count):
        tenant_id, *timeline_ids = (f"{chance.getrandbits(128):032x}" for _ in range(4))
        home = server.object_store / "tenants" / tenant_id
        home.mkdir(parents=True)
        (home / "tenant").write_bytes(b"excimer tenant 1\n")
        root = _manifest(TenantId(tenant_id), TimelineId(timeline_ids[0]), None, chance)
        branches = [
            _manifest(TenantId(tenant_id), TimelineId(each), root, chance) for each in timeline_ids[1:]
        ]
        for manifest in (root, *branches):
            place = home / "timelines" / manifest.timeline_id
            place.mkdir(parents=True)
            (place / str(ManifestName(GENERATION, 1))).write_bytes(pack_manifest(manifest))
        records.write(TenantRecord(tenant_id=TenantId(tenant_id), generation=GENERATION))


def _manifest(
    tenant_id: TenantId, timeline_id: TimelineId, ancestor: Manifest | None, chance: random.Random
) -> Manifest:
    start, end = LAYER_WAL_BYTES, (LAYERS + 1) * LAYER_WAL_BYTES
    layers = tuple(
        LayerDescription(
            kind=LayerKind.DELTA,
            level=1,
            start_lsn=start + number * LAYER_WAL_BYTES,
            end_lsn=start + (number + 1) * LAYER_WAL_BYTES,
            first_key="00" * 18,
            last_key="ff" * 18,
            generation=GENERATION,
            fingerprint=chance.getrandbits(32),
            size_bytes=10_000_000,
            index_offset=9_900_000,
            value_count=100_000,
        )
        for number in range(LAYERS)
    )
    return Manifest(
        tenant_id=tenant_id,
        timeline_id=timeline_id,
        pg_version=18,
        system_id=7,
        wal_segment_size_bytes=1 << 24,
        oldest_lsn=start,
        disk_consistent_lsn=end,
        prev_record_lsn=end - 8,
        ancestor_timeline_id=None if ancestor is None else ancestor.timeline_id,
        ancestor_lsn=0 if ancestor is None else end,
        layers=layers if ancestor is None else (),
    )
