"""Tenants of any size that exist as manifests only: enough for whatever does not read pages.

The manifests are the engine's own; the layers that they name, of ten megabytes each, do not exist. On top
lies a round of images that covers all, so that there is nothing to compact.
"""

import random
from collections.abc import Sequence

from excimer.base.ids import TenantId, TimelineId
from excimer.pageserver.model import TenantRecord
from excimer.pageserver.tenant_records import TenantRecords
from excimer.storage.format.layer_file import LayerKind
from excimer.storage.format.manifest import LayerDescription, Manifest, ManifestName, pack_manifest
from tests.kit.pageservers import PageserverProcess

LAYER_SIZE_BYTES = 10_000_000
LAYER_WAL_BYTES = 1 << 24
GENERATION = 1
_FIRST_KEY, _LAST_KEY = "00" * 18, "ff" * 18


def new_id(chance: random.Random) -> str:
    return f"{chance.getrandbits(128):032x}"


def make_root(tenant_id: TenantId, timeline_id: TimelineId, layers: int, chance: random.Random) -> Manifest:
    """A timeline without ancestor that has so many layers."""
    start = LAYER_WAL_BYTES
    end = start + (layers - 1) * LAYER_WAL_BYTES
    deltas = [
        _layer(LayerKind.DELTA, lsn, lsn + LAYER_WAL_BYTES, chance)
        for lsn in range(start, end, LAYER_WAL_BYTES)
    ]
    return Manifest(
        tenant_id=tenant_id,
        timeline_id=timeline_id,
        pg_version=18,
        system_id=7,
        wal_segment_size_bytes=1 << 24,
        oldest_lsn=start,
        disk_consistent_lsn=end,
        prev_record_lsn=end - 8,
        layers=(*deltas, _layer(LayerKind.IMAGE, end, end, chance)),
    )


def make_branch(root: Manifest, timeline_id: TimelineId) -> Manifest:
    """Of the root's newest state, with nothing of its own."""
    return Manifest(
        tenant_id=root.tenant_id,
        timeline_id=timeline_id,
        pg_version=root.pg_version,
        system_id=root.system_id,
        wal_segment_size_bytes=root.wal_segment_size_bytes,
        oldest_lsn=root.disk_consistent_lsn,
        disk_consistent_lsn=root.disk_consistent_lsn,
        prev_record_lsn=root.prev_record_lsn,
        ancestor_timeline_id=root.timeline_id,
        ancestor_lsn=root.disk_consistent_lsn,
    )


def place_tenant(server: PageserverProcess, manifests: Sequence[Manifest]) -> None:
    """Into the object store of a pageserver that does not run, as attached to it."""
    tenant_id = TenantId(manifests[0].tenant_id)
    home = server.object_store / "tenants" / tenant_id
    home.mkdir(parents=True)
    (home / "tenant").write_bytes(b"excimer tenant 1\n")
    for manifest in manifests:
        place = home / "timelines" / manifest.timeline_id
        place.mkdir(parents=True)
        (place / str(ManifestName(GENERATION, 1))).write_bytes(pack_manifest(manifest))
    records = TenantRecords(server.data_dir / "tenants")
    records.write(TenantRecord(tenant_id=tenant_id, generation=GENERATION))


def _layer(kind: LayerKind, start_lsn: int, end_lsn: int, chance: random.Random) -> LayerDescription:
    return LayerDescription(
        kind=kind,
        level=0 if kind is LayerKind.IMAGE else 1,
        start_lsn=start_lsn,
        end_lsn=end_lsn,
        first_key=_FIRST_KEY,
        last_key=_LAST_KEY,
        generation=GENERATION,
        fingerprint=chance.getrandbits(32),
        size_bytes=LAYER_SIZE_BYTES,
        index_offset=LAYER_SIZE_BYTES - 100_000,
        value_count=100_000,
        covers_after_lsn=0 if kind is LayerKind.IMAGE else None,
    )
