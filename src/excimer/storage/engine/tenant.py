"""A tenant's timelines on this pageserver: attach, create, import, branch, list, delete.

Attaching reads what object storage has (manifests only) and takes what the local directory still
holds of the layers. One `TenantStorage` per tenant and process; the generation is the controller's
word that no older one is to be listened to (G1).

A tenant exists from `create_tenant`, which leaves a marker object, until `delete_tenant`.

An *archived* timeline is a manifest that says so: it takes no task, no file and a few hundred bytes of
memory here, while its layers stay in object storage. Archived branches still hold their branch
points (`branch_points`), and everything that an unarchived timeline reads is unarchived.

Not here: the background work, which each `Timeline.run` does in a task of the host's.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import msgspec

from excimer.base.errors import CorruptionError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.io.object_store import ObjectExistsError, ObjectInfo, ObjectStore
from excimer.storage.engine.archived_timeline import ArchivedTimeline
from excimer.storage.engine.claim import claim_newest
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.detach_job import DetachJob
from excimer.storage.engine.errors import (
    TimelineArchivedError,
    TimelineBusyError,
    TimelineExistsError,
    TimelineHasBranchesError,
    TimelineMissingError,
)
from excimer.storage.engine.layer_stack import Ancestry
from excimer.storage.engine.manifest_store import (
    FoundManifest,
    ManifestStore,
    check_not_overtaken,
    tenant_prefix,
    timeline_prefix,
)
from excimer.storage.engine.settings_store import LiveSettings, SettingsStore
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.timeline_import import TimelineImport
from excimer.storage.engine.timeline_removal import deleted_timelines, remove_leftovers, remove_timeline
from excimer.storage.format.manifest import Manifest
from excimer.storage.format.tenant_settings import Overrides, check_overrides
from excimer.storage.plan.branch import ROOT, Origin, branch_points, plan_branch
from excimer.storage.plan.detach import is_reparented

_Result = TypeVar("_Result")


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
        self.archived: dict[TimelineId, ArchivedTimeline] = {}
        self._unsure: dict[TimelineId, Origin] = {}
        """Branches whose first manifest was sent and not confirmed: if they exist, they will be read."""
        self._deleted: set[TimelineId] = set()
        """Ids that are not used again."""
        self._changing = asyncio.Lock()
        self._detaching: set[TimelineId] = set()

    @classmethod
    async def attach(cls, context: StorageContext, tenant_id: TenantId, generation: int) -> "TenantStorage":
        """With every timeline that object storage has. Raises `FencedError`, `CorruptionError`,
        `ObjectStoreError`.
        """
        tenant = cls(context, tenant_id, generation)
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(context.executor, tenant._settings_store.read)
        try:
            found = await tenant._find_manifests()
        finally:
            await asyncio.wait([reading])
        tenant.settings.set(reading.result())
        for timeline_id in _ancestors_first({each: one.manifest for each, one in found.items()}):
            if found[timeline_id].manifest.archived:
                tenant.archived[timeline_id] = ArchivedTimeline.of(found[timeline_id].manifest)
            else:
                tenant._open(found[timeline_id])
        for timeline in tenant.timelines.values():
            await timeline.in_thread(partial(_take_stock, timeline))
        await loop.run_in_executor(context.executor, tenant._forget_archived_files)
        tenant._hold_branch_points()
        for timeline in list(tenant.timelines.values()):
            await tenant._reparent_siblings(timeline)
        return tenant

    def timeline(self, timeline_id: TimelineId) -> Timeline:
        """Raises `TimelineMissingError`, `TimelineArchivedError`."""
        try:
            return self.timelines[timeline_id]
        except KeyError:
            if timeline_id in self.archived:
                raise TimelineArchivedError(
                    f"timeline {timeline_id} is archived: unarchive it first"
                ) from None
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

    def may_exist(self, timeline_id: TimelineId) -> bool:
        """Whether making this branch failed in a way that may have made it: make it again, or delete it."""
        return timeline_id in self._unsure

    def branches(self, timeline_id: TimelineId) -> list[TimelineId]:
        """The timelines that leave it, archived ones included."""
        return [each for each, origin in self._origins().items() if origin.ancestor_id == timeline_id]

    def _origins(self) -> dict[TimelineId, Origin]:
        origins = dict(self._unsure)
        for archived in self.archived.values():
            origins[archived.timeline_id] = Origin(archived.ancestor_timeline_id, archived.ancestor_lsn)
        for each in self.timelines.values():
            ancestry = each.stack.ancestry
            origins[each.timeline_id] = (
                ROOT if ancestry is None else Origin(ancestry.timeline.timeline_id, ancestry.lsn)
            )
        return origins

    def _hold_branch_points(self) -> None:
        """Every branch point is held where the history lies that is read there (S3), and only there."""
        points = branch_points(self._origins())
        for timeline in self.timelines.values():
            timeline.retention.set_branches(points.get(timeline.timeline_id, {}))

    async def create_timeline(self, new: NewTimeline, images: Iterable[tuple[bytes, bytes]]) -> Timeline:
        """A timeline without ancestor whose content at `last_record_lsn` is `images`: (key, whole value).

        It exists when this returns, or not at all. Raises `TimelineExistsError` and what
        `TimelineCommits.import_images` does.
        """
        async with self._changing:
            self._check_is_new(new.timeline_id)
            timeline = self._make(self._root_manifest(new), None)
            await timeline.commits.import_images(images)
            self.timelines[timeline.timeline_id] = timeline
            return timeline

    async def begin_import(self, new: NewTimeline) -> TimelineImport:
        """A timeline without ancestor, made in pieces: its content as of `new.last_record_lsn`, then WAL.

        It exists, for others too, when `finish_import` returns. Raises `TimelineExistsError`,
        `ObjectStoreError`.
        """
        self._check_is_new(new.timeline_id)
        manifest = msgspec.structs.replace(self._root_manifest(new), importing_generation=self.generation)
        made = TimelineImport(self._make(manifest, None))
        await made.begin()
        return made

    async def finish_import(self, made: TimelineImport, readable_lsn: Lsn) -> Timeline:
        """All that was put becomes durable, and the timeline one of this tenant's, readable from
        `readable_lsn` on. Raises `TimelineExistsError`, `ObjectStoreError` (call `abort_import` then).
        """
        async with self._changing:
            self._check_is_new(made.timeline.timeline_id)
            await made.complete(readable_lsn)
            self.timelines[made.timeline.timeline_id] = made.timeline
            return made.timeline

    async def abort_import(self, made: TimelineImport) -> None:
        """Removes it. Raises `ObjectStoreError`: whoever attaches the tenant next removes it then."""
        await made.close(partial(remove_leftovers, self.context, self.tenant_id, made.timeline.timeline_id))

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
            timeline = self._make(manifest, ancestor)
            try:
                await timeline.commits.write_first_manifest()
            except RetryableError:
                self._unsure[timeline_id] = Origin(ancestor_id, lsn)
                raise
            self._unsure.pop(timeline_id, None)
            self.timelines[timeline_id] = timeline
            return timeline

    async def delete_timeline(self, timeline_id: TimelineId) -> None:
        """Removes the timeline and its objects. Stop its `run` and its ingest before.

        Raises `TimelineMissingError`, `TimelineHasBranchesError`, `ObjectStoreError` (call it again),
        `OvertakenError`: it is a newer generation's, and untouched.
        """
        async with self._changing:
            branches = self.branches(timeline_id)
            if branches:
                raise TimelineHasBranchesError(
                    f"timeline {timeline_id} cannot be deleted: {', '.join(branches)} branch from it"
                )
            self.check_not_detaching(timeline_id)
            await self._in_thread(
                partial(check_not_overtaken, self.context.store, self.tenant_id, timeline_id, self.generation)
            )
            if timeline_id in self.archived:
                await self._rewrite_archived(timeline_id, _as_deleted)
            elif timeline_id not in self._unsure:
                timeline = self.timeline(timeline_id)
                await timeline.close()
                await timeline.commits.mark_deleted()
            await self._in_thread(partial(self._remove, timeline_id))
            self.archived.pop(timeline_id, None)
            self.timelines.pop(timeline_id, None)
            self._unsure.pop(timeline_id, None)
            self._hold_branch_points()

    async def archive_timeline(self, timeline_id: TimelineId) -> None:
        """Makes it durable, and that it is archived. It is served until `offload_timeline`.

        Repeatable. Raises `TimelineMissingError`, `TimelineArchivedError` while branches of it are not
        archived, `TimelineBusyError`, `ObjectStoreError`.
        """
        async with self._changing:
            if timeline_id in self.archived:
                return
            timeline = self.timeline(timeline_id)
            self.check_not_detaching(timeline_id)
            live = [each.timeline_id for each in self.timelines.values() if each.ancestor is timeline]
            if live:
                raise TimelineArchivedError(
                    f"timeline {timeline_id} cannot be archived before its branches: {', '.join(live)}"
                )
            await timeline.flush()
            await timeline.commits.rewrite(
                lambda manifest: msgspec.structs.replace(manifest, archived=True), timeline.stack.ancestry
            )

    async def offload_timeline(self, timeline_id: TimelineId) -> None:
        """Lets go of an archived timeline's memory and local files. Stop its `run` and its ingest before."""
        async with self._changing:
            timeline = self.timelines.get(timeline_id)
            if timeline is None or not timeline.manifest.archived:
                return
            await timeline.close()
            self.archived[timeline_id] = ArchivedTimeline.of(timeline.manifest)
            del self.timelines[timeline_id]
            await self._in_thread(partial(self._remove_local, timeline_id))

    async def unarchive_timeline(self, timeline_id: TimelineId) -> Timeline:
        """Reads it from object storage again. Repeatable.

        Raises `TimelineMissingError`, `TimelineArchivedError` while its ancestor is archived,
        `ObjectStoreError`, `FencedError`, `CorruptionError`.
        """
        async with self._changing:
            archived = self.archived.get(timeline_id)
            if archived is None:
                return self.timeline(timeline_id)
            if archived.ancestor_timeline_id in self.archived:
                raise TimelineArchivedError(
                    f"timeline {timeline_id} cannot be unarchived before its ancestor, "
                    f"{archived.ancestor_timeline_id}"
                )
            found = await self._rewrite_archived(timeline_id, _as_unarchived)
            if found is None:
                raise TimelineMissingError(f"tenant {self.tenant_id} has no timeline {timeline_id}")
            del self.archived[timeline_id]
            timeline = self._open(found)
            self._hold_branch_points()
            return timeline

    async def detach_ancestor(self, timeline_id: TimelineId) -> list[TimelineId]:
        """Makes a branch a root, and the ancestor's branches that left it at or below the same point
        branches of this one: their ids. Every read before, meanwhile and after is answered alike.

        A root is left as it is. Repeatable, also after a crash. Raises `TimelineMissingError`,
        `TimelineBusyError`, and what `DetachJob.prepare` does.
        """
        timeline = self.timeline(timeline_id)
        self.check_not_detaching(timeline_id)
        self._detaching.add(timeline_id)
        try:
            job = DetachJob(timeline)
            is_done = timeline.ancestor is None
            while not is_done:
                await job.prepare()
                async with timeline.compaction_lock, self._changing:
                    self._hold_inherited(timeline)
                    before = timeline.stack.ancestry
                    is_done = await timeline.commits.rewrite(lambda _: job.manifest(), None)
                    if is_done:
                        _hold_for_readers(timeline, before)
                        timeline.retention.inherit(timeline.manifest.oldest_lsn)
                    self._hold_branch_points()
            async with self._changing:
                return await self._reparent_siblings(timeline)
        finally:
            self._detaching.discard(timeline_id)

    def _hold_inherited(self, detaching: Timeline) -> None:
        """What its ancestors hold for whoever reads through it, it will have to hold as a root."""
        origins = self._origins()
        origins[detaching.timeline_id] = ROOT
        for branch_id, lsn in branch_points(origins).get(detaching.timeline_id, {}).items():
            detaching.retention.keep_branch(branch_id, lsn)
        ancestor = detaching.ancestor
        while ancestor is not None:
            detaching.retention.copy_leases(ancestor.retention)
            ancestor = ancestor.ancestor

    async def _reparent_siblings(self, detached: Timeline) -> list[TimelineId]:
        """What `detach_ancestor` ends with; goes on where a crash or an error stopped it."""
        if detached.manifest.detachment is None:
            return []
        parent, moved = detached.timeline_id, []
        for sibling in list(self.timelines.values()):
            ancestry = sibling.stack.ancestry
            if ancestry is not None and is_reparented(sibling.manifest, detached.manifest):
                change = partial(_with_ancestor, ancestor_id=parent)
                detached.retention.keep_branch(sibling.timeline_id, ancestry.lsn)
                await sibling.commits.rewrite(change, Ancestry(detached, ancestry.lsn))
                _hold_for_readers(sibling, ancestry)
                moved.append(sibling.timeline_id)
        for archived in list(self.archived.values()):
            if is_reparented(archived, detached.manifest):
                await self._rewrite_archived(
                    archived.timeline_id, partial(_with_ancestor, ancestor_id=parent)
                )
                self.archived[archived.timeline_id] = replace(archived, ancestor_timeline_id=parent)
                moved.append(archived.timeline_id)
        self._hold_branch_points()
        await detached.commits.rewrite(
            lambda manifest: msgspec.structs.replace(manifest, detachment=None), None
        )
        return sorted(moved)

    async def _rewrite_archived(
        self, timeline_id: TimelineId, change: Callable[[Manifest], Manifest]
    ) -> FoundManifest | None:
        """The newest manifest of an archived timeline, changed and durable; None if it is (being) deleted."""

        def rewrite() -> FoundManifest | None:
            found = claim_newest(self.context.store, self.tenant_id, timeline_id, self.generation)
            if found is None or found.manifest.deleted:
                return None
            manifest = change(found.manifest)
            name = self._manifest_store(found).write(manifest)
            return FoundManifest(name, manifest)

        return await self._in_thread(rewrite)

    async def close(self) -> None:
        """Detaches. What is only in memory is asked for again by the next who attaches."""
        for timeline in self.timelines.values():
            await timeline.close()
        self.timelines.clear()
        self.archived.clear()

    async def _find_manifests(self) -> dict[TimelineId, FoundManifest]:
        """Of all timelines at the same time. Waits for all of them, and raises then."""
        prefix = f"{tenant_prefix(self.tenant_id)}/timelines"
        infos = await self._in_thread(partial(self.context.store.list, prefix))
        deleted = deleted_timelines(infos)
        for each, has_leftovers in deleted.items():
            if has_leftovers:
                await self._in_thread(partial(remove_leftovers, self.context, self.tenant_id, each))
        self._deleted |= deleted.keys()
        listed: dict[TimelineId, list[ObjectInfo]] = {}
        for info in infos:
            listed.setdefault(TimelineId(info.name.split("/")[3]), []).append(info)
        there = sorted(listed.keys() - deleted.keys())
        claims = [self._in_thread(partial(self._claim, each, listed[each])) for each in there]
        outcomes = await asyncio.gather(*claims, return_exceptions=True)
        found = {}
        for timeline_id, outcome in zip(there, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                found[timeline_id] = outcome
        return found

    def _claim(self, timeline_id: TimelineId, listed: list[ObjectInfo]) -> FoundManifest | None:
        """None if the timeline does not exist, or does so no longer."""
        newest = claim_newest(self.context.store, self.tenant_id, timeline_id, self.generation, listed)
        if newest is None:
            return None  # created halfway: without a manifest it does not exist
        importing_generation = newest.manifest.importing_generation
        if importing_generation == self.generation:
            remove_leftovers(self.context, self.tenant_id, timeline_id)
            return None
        if newest.manifest.deleted or importing_generation:  # which may still be at it
            self._remove(timeline_id)
            return None
        return newest

    def _remove(self, timeline_id: TimelineId) -> None:
        remove_timeline(self.context, self.tenant_id, timeline_id, self.generation)
        self._deleted.add(timeline_id)

    def _open(self, found: FoundManifest) -> Timeline:
        manifest = found.manifest
        ancestor = None
        if manifest.ancestor_timeline_id is not None:
            ancestor = self.timelines[TimelineId(manifest.ancestor_timeline_id)]
        timeline = Timeline(
            self.context, manifest, self._manifest_store(found), ancestor, self.generation, self.settings
        )
        self.timelines[timeline.timeline_id] = timeline
        return timeline

    def _make(self, manifest: Manifest, ancestor: Timeline | None) -> Timeline:
        manifests = ManifestStore(self.context.store, self.tenant_id, manifest.timeline_id, self.generation)
        return Timeline(self.context, manifest, manifests, ancestor, self.generation, self.settings)

    def _manifest_store(self, found: FoundManifest) -> ManifestStore:
        """Goes on behind what was found."""
        sequence = found.name.sequence if found.name.generation == self.generation else 0
        return ManifestStore(
            self.context.store, self.tenant_id, found.manifest.timeline_id, self.generation, sequence
        )

    def _forget_archived_files(self) -> None:
        for timeline_id in self.archived:
            self._remove_local(timeline_id)

    def _remove_local(self, timeline_id: TimelineId) -> None:
        prefix = timeline_prefix(self.tenant_id, timeline_id)
        self.context.filesystem.remove_tree(self.context.local_dir / prefix)

    async def _in_thread(self, function: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self.context.executor, function)

    def check_not_detaching(self, timeline_id: TimelineId) -> None:
        """Raises `TimelineBusyError`."""
        if timeline_id in self._detaching:
            raise TimelineBusyError(f"timeline {timeline_id} is being detached from its ancestor: try again")

    def _root_manifest(self, new: NewTimeline) -> Manifest:
        return Manifest(
            tenant_id=self.tenant_id,
            timeline_id=new.timeline_id,
            pg_version=new.pg_version,
            system_id=new.system_id,
            wal_segment_size_bytes=new.wal_segment_size_bytes,
            oldest_lsn=new.last_record_lsn,
            disk_consistent_lsn=new.last_record_lsn,
            prev_record_lsn=new.prev_record_lsn,
        )

    def _check_is_new(self, timeline_id: TimelineId) -> None:
        if timeline_id in self.timelines or timeline_id in self.archived:
            raise TimelineExistsError(f"tenant {self.tenant_id} has a timeline {timeline_id} already")
        if timeline_id in self._deleted:
            raise TimelineExistsError(
                f"tenant {self.tenant_id} had a timeline {timeline_id}, which was deleted: choose another id"
            )


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


def _hold_for_readers(timeline: Timeline, before: Ancestry | None) -> None:
    """A read that began while the timeline had another ancestor goes on to that one at the old point."""
    if before is not None:
        retention = before.timeline.home_of(before.lsn).retention
        retention.hold_while(timeline.deletions.are_readers_left(), before.lsn)


def _as_deleted(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, deleted=True)


def _as_unarchived(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, archived=False)


def _with_ancestor(manifest: Manifest, *, ancestor_id: TimelineId) -> Manifest:
    return msgspec.structs.replace(manifest, ancestor_timeline_id=ancestor_id)


def _take_stock(timeline: Timeline) -> None:
    """Counts the local files, and removes those that the manifest does not name: left by a crash, by
    another generation, or only parts of a layer.
    """
    filesystem, directory = timeline.context.filesystem, timeline.home.local_dir
    for name in filesystem.list_files(directory):
        file = timeline.stack.files.get(name)
        if file is None:
            filesystem.remove(directory / name)
        else:
            file.note_local()
