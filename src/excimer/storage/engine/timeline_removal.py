"""Deleting a whole timeline, so that it stays deleted (G1, D3).

::

    manifest that says *deleted*  ->  no newer generation?  ->  marker  ->  layers, manifests

A damaged timeline has no manifest that could be changed: one is made that says nothing else (`mark_deleted`).

::

    tenants/TENANT/timelines/TIMELINE/deleted          the marker: stays when all else is gone

The manifest comes before the look for a newer generation, which makes its own claim before it looks at
manifests (`claim`): of two that cross, one sees the other, so that nobody deletes what somebody serves.
The marker comes before all else goes, so that who finds no manifest any more finds the marker.

The marker stays because an older generation may still be at work and flush into the timeline: without it
that would be a timeline again, with the beginning of its history missing. What is found beside a marker is
nobody's, and removed at the next attachment. An id is therefore used once.

All calls block.
"""

from collections.abc import Iterable
from contextlib import suppress

from excimer.base.ids import TenantId, TimelineId
from excimer.io.object_store import ObjectExistsError, ObjectInfo, ObjectStoreError
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.manifest_store import (
    DELETED_MARKER,
    ManifestStore,
    check_not_overtaken,
    has_follower,
    list_timeline,
    timeline_prefix,
)
from excimer.storage.format.manifest import Manifest


def mark_deleted(
    context: StorageContext, tenant_id: TenantId, timeline_id: TimelineId, generation: int
) -> None:
    """Writes a manifest that says *deleted* and nothing else, behind whatever there is, readable or not.

    Raises `OvertakenError`, `ObjectStoreError`.
    """
    store, sequence = context.store, 0
    manifests = list_timeline(store, tenant_id, timeline_id, generation).manifests
    if manifests:
        if has_follower(store, tenant_id, timeline_id, manifests[-1]):
            raise ObjectStoreError(f"the listing of timeline {timeline_id} lags behind: try again")
        if manifests[-1].generation == generation:
            sequence = manifests[-1].sequence
    ManifestStore(store, tenant_id, timeline_id, generation, sequence).write(
        Manifest(
            tenant_id=tenant_id,
            timeline_id=timeline_id,
            pg_version=0,
            system_id=0,
            wal_segment_size_bytes=0,
            oldest_lsn=0,
            disk_consistent_lsn=0,
            prev_record_lsn=0,
            deleted=True,
        )
    )


def remove_timeline(
    context: StorageContext, tenant_id: TenantId, timeline_id: TimelineId, generation: int
) -> None:
    """Removes what object storage and the local disk have of a timeline whose manifest says *deleted*.

    Raises `OvertakenError`: it is a newer generation's, and untouched; `ObjectStoreError`, OSError: call it
    again.
    """
    check_not_overtaken(context.store, tenant_id, timeline_id, generation)
    with suppress(ObjectExistsError):
        context.store.put(_marker_name(tenant_id, timeline_id), b"excimer deleted timeline 1\n")
    remove_leftovers(context, tenant_id, timeline_id)


def remove_leftovers(context: StorageContext, tenant_id: TenantId, timeline_id: TimelineId) -> None:
    """Everything but a marker: what is beside one, or was left of an import, whose id may be used again.

    Raises `ObjectStoreError`, OSError.
    """
    prefix, marker = timeline_prefix(tenant_id, timeline_id), _marker_name(tenant_id, timeline_id)
    names = [info.name for info in context.store.list(prefix) if info.name != marker]
    context.store.delete_many(sorted(names, key=lambda name: ("/layers/" not in name, name)))
    context.filesystem.remove_tree(context.local_dir / prefix)


def deleted_timelines(infos: Iterable[ObjectInfo]) -> dict[TimelineId, bool]:
    """Of the objects of a tenant's timelines: those that have a marker, and whether anything else."""
    parts: dict[TimelineId, set[str]] = {}
    for info in infos:
        _, _, _, timeline_id, part = info.name.split("/", 4)
        parts.setdefault(TimelineId(timeline_id), set()).add(part)
    return {each: len(found) > 1 for each, found in parts.items() if DELETED_MARKER in found}


def _marker_name(tenant_id: TenantId, timeline_id: TimelineId) -> str:
    return f"{timeline_prefix(tenant_id, timeline_id)}/{DELETED_MARKER}"
