"""A tenant's timelines on this pageserver: attach, create, import, branch, list, delete.

Attaching reads what object storage has (manifests only) and takes what the local directory still
holds of the layers. One `TenantStorage` per tenant and process; the generation is the controller's
word that no older one is to be listened to (G1).

Not here: what attaching finds (`attachment`), who branches from whom (`tenant_timelines`), archiving
(`archiving`), making a branch a root (`ancestor_detachment`); the background work, which each
`Timeline.run` does in a task of the host's.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import msgspec

from excimer.base.errors import RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.storage.engine import archiving
from excimer.storage.engine.ancestor_detachment import AncestorDetachment
from excimer.storage.engine.archived_timeline import ArchivedTimeline
from excimer.storage.engine.attachment import Attachment, FoundTimelines, take_stock
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.errors import TimelineHasBranchesError
from excimer.storage.engine.manifest_store import check_not_overtaken
from excimer.storage.engine.settings_store import SettingsStore
from excimer.storage.engine.tenant_timelines import TenantTimelines
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.timeline_import import TimelineImport
from excimer.storage.engine.timeline_removal import mark_deleted, remove_leftovers, remove_timeline
from excimer.storage.format.manifest import Manifest
from excimer.storage.format.tenant_settings import DamagedSettingsError, Overrides, check_overrides
from excimer.storage.plan.branch import Origin, plan_branch


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


class TenantStorage:
    """The attached timelines of one tenant. All methods belong on the event loop's thread."""

    def __init__(self, context: StorageContext, tenant_id: TenantId, generation: int) -> None:
        self.context = context
        self.tenant_id = tenant_id
        self.generation = generation
        self._known = TenantTimelines(context, tenant_id, generation)
        self.timelines = self._known.live
        self.archived = self._known.archived
        self.damaged = self._known.damaged
        self.settings = self._known.settings
        self._settings_store = SettingsStore(context.store, tenant_id, generation)
        self._detachment = AncestorDetachment(self._known)

    @classmethod
    async def attach(cls, context: StorageContext, tenant_id: TenantId, generation: int) -> "TenantStorage":
        """With every timeline that object storage has; those that cannot be read, and what needs them, are
        not served, but `damaged`. Raises `FencedError`, `ObjectStoreError`.
        """
        tenant = cls(context, tenant_id, generation)
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(context.executor, tenant._settings_store.read)
        try:
            found = await Attachment(context, tenant_id, generation).find()
        finally:
            await asyncio.wait([reading])
        try:
            tenant.settings.set(reading.result())
        except DamagedSettingsError as error:
            tenant.settings.set_damaged(str(error))
        await tenant._take(found)
        return tenant

    async def _take(self, found: FoundTimelines) -> None:
        known = self._known
        known.deleted |= found.deleted
        known.damaged.update((each.timeline_id, each) for each in found.damaged)
        for each in found.in_order:
            if each.manifest.archived:
                archived = ArchivedTimeline.of(each.manifest)
                known.archived[archived.timeline_id] = archived
            else:
                known.open(each)
        for timeline in known.live.values():
            await timeline.in_thread(partial(take_stock, timeline))
        await known.remove_local(*known.archived)
        known.hold_branch_points()
        for timeline in list(known.live.values()):
            await self._detachment.reparent_siblings(timeline)

    def timeline(self, timeline_id: TimelineId) -> Timeline:
        """Raises `TimelineMissingError`, `TimelineArchivedError`, `TimelineDamagedError`."""
        return self._known.get(timeline_id)

    def find_standstill(self) -> str | None:
        """Why garbage collection of the whole tenant stands still; None while it does not."""
        return self._known.find_standstill()

    async def set_settings(self, overrides: Overrides) -> None:
        """Replaces what the tenant has chosen: durable, and live, on return.

        Raises `TenantSettingsError`, `OvertakenError`, `ObjectStoreError` (call it again).
        """
        checked = check_overrides(overrides)
        async with self._known.changing:
            await self._known.in_thread(partial(self._settings_store.write, checked))
            self.settings.set(checked)

    def may_exist(self, timeline_id: TimelineId) -> bool:
        """Whether making this branch failed in a way that may have made it: make it again, or delete it."""
        return timeline_id in self._known.unsure

    def branches(self, timeline_id: TimelineId) -> list[TimelineId]:
        """The timelines that leave it, archived ones included."""
        return self._known.branches(timeline_id)

    async def create_timeline(self, new: NewTimeline, images: Iterable[tuple[bytes, bytes]]) -> Timeline:
        """A timeline without ancestor whose content at `last_record_lsn` is `images`: (key, whole value).

        It exists when this returns, or not at all. Raises `TimelineExistsError` and what
        `TimelineCommits.import_images` does.
        """
        async with self._known.changing:
            self._known.check_is_new(new.timeline_id)
            timeline = self._known.make(self._root_manifest(new), None)
            await timeline.commits.import_images(images)
            self.timelines[timeline.timeline_id] = timeline
            return timeline

    async def begin_import(self, new: NewTimeline) -> TimelineImport:
        """A timeline without ancestor, made in pieces: its content as of `new.last_record_lsn`, then WAL.

        It exists, for others too, when `finish_import` returns. Raises `TimelineExistsError`,
        `ObjectStoreError`.
        """
        self._known.check_is_new(new.timeline_id)
        manifest = msgspec.structs.replace(self._root_manifest(new), importing_generation=self.generation)
        made = TimelineImport(self._known.make(manifest, None))
        await made.begin()
        return made

    async def finish_import(self, made: TimelineImport, readable_lsn: Lsn) -> Timeline:
        """All that was put becomes durable, and the timeline one of this tenant's, readable from
        `readable_lsn` on. Raises `TimelineExistsError`, `ObjectStoreError` (call `abort_import` then).
        """
        async with self._known.changing:
            self._known.check_is_new(made.timeline.timeline_id)
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
        async with self._known.changing:
            self._known.check_is_new(timeline_id)
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
            timeline = self._known.make(manifest, ancestor)
            try:
                await timeline.commits.write_first_manifest()
            except RetryableError:
                self._known.unsure[timeline_id] = Origin(ancestor_id, lsn)
                raise
            self._known.unsure.pop(timeline_id, None)
            self.timelines[timeline_id] = timeline
            return timeline

    async def delete_timeline(self, timeline_id: TimelineId) -> None:
        """Removes the timeline and its objects. Stop its `run` and its ingest before.

        A damaged one can be deleted too: whoever does so gives up on it. Raises `TimelineMissingError`, as
        `check_deletable`, `ObjectStoreError` (call it again), `OvertakenError`: it is a newer
        generation's, and untouched.
        """
        async with self._known.changing:
            self.check_deletable(timeline_id)
            await self._known.in_thread(
                partial(check_not_overtaken, self.context.store, self.tenant_id, timeline_id, self.generation)
            )
            if timeline_id in self.damaged:
                ids = self.tenant_id, timeline_id, self.generation
                await self._known.in_thread(partial(mark_deleted, self.context, *ids))
            elif timeline_id in self.archived:
                await self._known.rewrite_archived(timeline_id, _as_deleted)
            elif timeline_id not in self._known.unsure:
                timeline = self.timeline(timeline_id)
                await timeline.close()
                await timeline.commits.mark_deleted()
            await self._known.in_thread(partial(self._remove, timeline_id))
            for timelines in (self.damaged, self.archived, self.timelines):
                timelines.pop(timeline_id, None)
            self._known.unsure.pop(timeline_id, None)
            self._known.hold_branch_points()

    def check_deletable(self, timeline_id: TimelineId) -> None:
        """Raises `TimelineHasBranchesError`; `BranchesUnknownError` while another timeline is damaged, which
        may be a branch of this one; `TimelineBusyError`.
        """
        branches = self.branches(timeline_id)
        if branches:
            raise TimelineHasBranchesError(
                f"timeline {timeline_id} cannot be deleted: {', '.join(sorted(branches))} branch from it"
            )
        if timeline_id in self.timelines or timeline_id in self.archived:
            self._known.check_branches_known(f"timeline {timeline_id} cannot be deleted")
        self.check_not_detaching(timeline_id)

    async def archive_timeline(self, timeline_id: TimelineId) -> None:
        """Makes it durable, and that it is archived. It is served until `offload_timeline`.

        Repeatable. Raises `TimelineMissingError`, `TimelineArchivedError` while branches of it are not
        archived, `BranchesUnknownError`, `TimelineBusyError`, `ObjectStoreError`.
        """
        async with self._known.changing:
            if timeline_id in self.archived:
                return
            self.check_not_detaching(timeline_id)
            await archiving.archive_timeline(self._known, timeline_id)

    async def offload_timeline(self, timeline_id: TimelineId) -> None:
        """Lets go of an archived timeline's memory and local files. Stop its `run` and its ingest before."""
        async with self._known.changing:
            await archiving.offload_timeline(self._known, timeline_id)

    async def unarchive_timeline(self, timeline_id: TimelineId) -> Timeline:
        """Reads it from object storage again. Repeatable.

        Raises `TimelineMissingError`, `TimelineArchivedError` while its ancestor is archived,
        `ObjectStoreError`, `FencedError`, `CorruptionError`.
        """
        async with self._known.changing:
            return await archiving.unarchive_timeline(self._known, timeline_id)

    async def detach_ancestor(self, timeline_id: TimelineId) -> list[TimelineId]:
        """Makes a branch a root, and the ancestor's branches that left it at or below the same point
        branches of this one: their ids. Every read before, meanwhile and after is answered alike.

        A root is left as it is. Repeatable, also after a crash. Raises `TimelineMissingError`,
        `BranchesUnknownError`, `TimelineBusyError`, and what `DetachJob.prepare` does.
        """
        return await self._detachment.detach(timeline_id)

    async def close(self) -> None:
        """Detaches. What is only in memory is asked for again by the next who attaches."""
        for timeline in self.timelines.values():
            await timeline.close()
        for timelines in (self.timelines, self.archived, self.damaged):
            timelines.clear()

    def check_not_detaching(self, timeline_id: TimelineId) -> None:
        """Raises `TimelineBusyError`."""
        self._detachment.check_not_detaching(timeline_id)

    def _remove(self, timeline_id: TimelineId) -> None:
        remove_timeline(self.context, self.tenant_id, timeline_id, self.generation)
        self._known.deleted.add(timeline_id)

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


def _as_deleted(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, deleted=True)
