"""A tenant's timelines on this pageserver: attach, create, branch, list, delete.

Attaching reads what object storage has (manifests only) and takes what the local directory still
holds of the layers. One `TenantStorage` per tenant and process; the generation is the controller's
word that no older one is to be listened to (G1).

A tenant exists from `create_tenant`, which leaves a marker object, until `delete_tenant`.

Not here: the background work, which each `Timeline.run` does in a task of the host's.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from excimer.base.errors import CorruptionError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.io.object_store import ObjectExistsError, ObjectStore
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.errors import (
    TimelineExistsError,
    TimelineHasBranchesError,
    TimelineMissingError,
)
from excimer.storage.engine.manifest_store import (
    FoundManifest,
    ManifestStore,
    find_newest_manifest,
    tenant_prefix,
    timeline_prefix,
)
from excimer.storage.engine.settings_store import LiveSettings, SettingsStore
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.manifest import Manifest
from excimer.storage.format.tenant_settings import Overrides, check_overrides
from excimer.storage.plan.branch import plan_branch


@dataclass(frozen=True, kw_only=True)
class NewTimeline:
    """What the first manifest of a timeline without ancestor says."""

    timeline_id: TimelineId
    pg_version: int
    system_id: int
    wal_segment_size_bytes: int
    last_record_lsn: Lsn
    """End of the last record that the images contain; ingest goes on from here."""
    prev_record_lsn: Lsn
    """Its start."""


def create_tenant(store: ObjectStore, tenant_id: TenantId) -> None:
    """Leaves the marker; creating a tenant that exists is fine. Blocks. Raises `ObjectStoreError`."""
    try:
        store.put(f"{tenant_prefix(tenant_id)}/tenant", b"excimer tenant 1\n")
    except ObjectExistsError:
        return


def list_tenants(store: ObjectStore) -> list[TenantId]:
    """Every tenant that has a marker. Blocks. Raises `ObjectStoreError`."""
    names = (info.name.split("/") for info in store.list("tenants"))
    return [TenantId(parts[1]) for parts in names if len(parts) == 3 and parts[2] == "tenant"]


def delete_tenant(context: StorageContext, tenant_id: TenantId) -> None:
    """Removes all objects and local files of a tenant that nobody has attached, the marker last.

    Blocks. Raises `ObjectStoreError`, OSError; a later call goes on where it stopped.
    """
    prefix = tenant_prefix(tenant_id)
    for info in context.store.list(prefix):
        if info.name != f"{prefix}/tenant":
            context.store.delete(info.name)
    context.filesystem.remove_tree(context.local_dir / prefix)
    context.store.delete(f"{prefix}/tenant")


class TenantStorage:
    """The attached timelines of one tenant. All methods belong on the event loop's thread."""

    def __init__(self, context: StorageContext, tenant_id: TenantId, generation: int) -> None:
        self.context = context
        self.tenant_id = tenant_id
        self.generation = generation
        self.timelines: dict[TimelineId, Timeline] = {}
        self.settings = LiveSettings(context.settings.tenant_defaults(), {})
        self._settings_store = SettingsStore(context.store, tenant_id, generation)
        self._changing = asyncio.Lock()

    @classmethod
    async def attach(cls, context: StorageContext, tenant_id: TenantId, generation: int) -> "TenantStorage":
        """With every timeline that object storage has. Raises `FencedError`, `CorruptionError`,
        `ObjectStoreError`.
        """
        tenant = cls(context, tenant_id, generation)
        loop = asyncio.get_running_loop()
        overrides = await loop.run_in_executor(context.executor, tenant._settings_store.read)
        tenant.settings.set(overrides)
        found = await loop.run_in_executor(context.executor, tenant._find_manifests)
        for timeline_id in _ancestors_first({each: one.manifest for each, one in found.items()}):
            tenant._open(found[timeline_id])
        for timeline in tenant.timelines.values():
            await timeline.in_thread(partial(_remove_strangers, timeline))
        return tenant

    def timeline(self, timeline_id: TimelineId) -> Timeline:
        """Raises `TimelineMissingError`."""
        try:
            return self.timelines[timeline_id]
        except KeyError:
            raise TimelineMissingError(f"tenant {self.tenant_id} has no timeline {timeline_id}") from None

    async def set_settings(self, overrides: Overrides) -> None:
        """Replaces what the tenant has chosen: durable, and live, on return.

        Raises `TenantSettingsError`, `OvertakenError`, `ObjectStoreError` (call it again).
        """
        checked = check_overrides(overrides)
        async with self._changing:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.context.executor, partial(self._settings_store.write, checked))
            self.settings.set(checked)

    async def create_timeline(self, new: NewTimeline, images: Iterable[tuple[bytes, bytes]]) -> Timeline:
        """A timeline without ancestor whose content at `last_record_lsn` is `images`: (key, whole value).

        It exists when this returns, or not at all. Raises `TimelineExistsError` and what
        `Timeline.import_images` does.
        """
        async with self._changing:
            self._check_is_new(new.timeline_id)
            manifest = Manifest(
                tenant_id=self.tenant_id,
                timeline_id=new.timeline_id,
                pg_version=new.pg_version,
                system_id=new.system_id,
                wal_segment_size_bytes=new.wal_segment_size_bytes,
                oldest_lsn=new.last_record_lsn,
                disk_consistent_lsn=new.last_record_lsn,
                prev_record_lsn=new.prev_record_lsn,
            )
            timeline = self._make(manifest, None, 0)
            await timeline.import_images(images)
            self.timelines[timeline.timeline_id] = timeline
            return timeline

    async def branch_timeline(
        self,
        timeline_id: TimelineId,
        ancestor_id: TimelineId,
        *,
        lsn: Lsn | None = None,
        prev_record_lsn: Lsn | None = None,
    ) -> Timeline:
        """A timeline whose history is the ancestor's up to `lsn`, the end of a record that starts at
        `prev_record_lsn`; without them, up to the last record put.

        Writes one small object. Raises `TimelineExistsError`, `TimelineMissingError`, `BranchPointError`,
        `NotRetainedError`, `ObjectStoreError`: then it may exist all the same, and keeps its branch point.
        """
        async with self._changing:
            self._check_is_new(timeline_id)
            ancestor = self.timeline(ancestor_id)
            position = ancestor.position
            if lsn is None:
                lsn, prev_record_lsn = position.last_record_lsn, position.prev_record_lsn
            home, now_s = ancestor.home_of(lsn), asyncio.get_running_loop().time()
            is_held = home.retention.is_held(lsn, now_s)
            manifest = plan_branch(
                ancestor.manifest,
                timeline_id,
                lsn=lsn,
                prev_record_lsn=prev_record_lsn if prev_record_lsn is not None else Lsn(0),
                oldest_lsn=lsn if is_held else Lsn(home.manifest.oldest_lsn),
                ancestor_last_record_lsn=position.last_record_lsn,
            )
            home.retention.hold_branch(timeline_id, lsn, now_s)
            timeline = self._make(manifest, ancestor, 0)
            await timeline.write_first_manifest()
            self.timelines[timeline_id] = timeline
            return timeline

    async def delete_timeline(self, timeline_id: TimelineId) -> None:
        """Removes the timeline and its objects. Stop its `run` and its ingest before.

        Raises `TimelineMissingError`, `TimelineHasBranchesError`, `ObjectStoreError` (call it again).
        """
        async with self._changing:
            timeline = self.timeline(timeline_id)
            branches = [each.timeline_id for each in self.timelines.values() if each.ancestor is timeline]
            if branches:
                raise TimelineHasBranchesError(
                    f"timeline {timeline_id} cannot be deleted: {', '.join(branches)} branch from it"
                )
            await timeline.close()
            await timeline.mark_deleted()
            await timeline.in_thread(partial(_remove_objects, self.context, self.tenant_id, timeline_id))
            del self.timelines[timeline_id]
            if timeline.ancestor is not None:
                timeline.ancestor.home_of(timeline.ancestor_lsn).retention.release_branch(timeline_id)

    async def close(self) -> None:
        """Detaches. What is only in memory is asked for again by the next who attaches."""
        for timeline in self.timelines.values():
            await timeline.close()
        self.timelines.clear()

    def _find_manifests(self) -> dict[TimelineId, FoundManifest]:
        found = {}
        store = self.context.store
        prefix = f"{tenant_prefix(self.tenant_id)}/timelines"
        for timeline_id in sorted({info.name.split("/")[3] for info in store.list(prefix)}):
            newest = find_newest_manifest(store, self.tenant_id, timeline_id, self.generation)
            if newest is None:
                continue  # created halfway: without a manifest it does not exist
            if newest.manifest.deleted:
                _remove_objects(self.context, self.tenant_id, TimelineId(timeline_id))
                continue
            found[TimelineId(timeline_id)] = newest
        return found

    def _open(self, found: FoundManifest) -> None:
        manifest = found.manifest
        ancestor = None
        if manifest.ancestor_timeline_id is not None:
            ancestor = self.timelines[TimelineId(manifest.ancestor_timeline_id)]
        sequence = found.name.sequence if found.name.generation == self.generation else 0
        timeline = self._make(manifest, ancestor, sequence)
        if ancestor is not None:
            ancestor.home_of(timeline.ancestor_lsn).retention.keep_branch(
                timeline.timeline_id, timeline.ancestor_lsn
            )
        self.timelines[timeline.timeline_id] = timeline

    def _make(self, manifest: Manifest, ancestor: Timeline | None, last_sequence: int) -> Timeline:
        manifests = ManifestStore(
            self.context.store, self.tenant_id, manifest.timeline_id, self.generation, last_sequence
        )
        return Timeline(self.context, manifest, manifests, ancestor, self.generation, self.settings)

    def _check_is_new(self, timeline_id: TimelineId) -> None:
        if timeline_id in self.timelines:
            raise TimelineExistsError(f"tenant {self.tenant_id} has a timeline {timeline_id} already")


def _ancestors_first(manifests: dict[TimelineId, Manifest]) -> list[TimelineId]:
    """Every timeline after its ancestor. Raises `CorruptionError` if one is missing."""
    ordered: dict[TimelineId, None] = {}
    for timeline_id in manifests:
        line = []
        at: TimelineId | None = timeline_id
        while at is not None and at not in ordered:
            if at not in manifests or at in line:
                raise CorruptionError(
                    f"timeline {timeline_id} needs its ancestor {at}, which has no manifest"
                )
            line.append(at)
            ancestor = manifests[at].ancestor_timeline_id
            at = None if ancestor is None else TimelineId(ancestor)
        ordered |= dict.fromkeys(reversed(line))
    return list(ordered)


def _remove_strangers(timeline: Timeline) -> None:
    """Local files that the manifest does not name: left by a crash, or by another generation."""
    filesystem, directory = timeline.context.filesystem, timeline.home.local_dir
    for name in filesystem.list_files(directory):
        if name not in timeline.stack.files:
            filesystem.remove(directory / name)


def _remove_objects(context: StorageContext, tenant_id: TenantId, timeline_id: TimelineId) -> None:
    """Layers first, then manifests from the oldest on, so that the one that says *deleted* goes last."""
    prefix = timeline_prefix(tenant_id, timeline_id)
    infos = context.store.list(prefix)
    for info in sorted(infos, key=lambda info: ("/layers/" not in info.name, info.name)):
        context.store.delete(info.name)
    context.filesystem.remove_tree(context.local_dir / prefix)
