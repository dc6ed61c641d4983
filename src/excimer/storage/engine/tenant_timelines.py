"""Which timelines a tenant has here, in whatever state, and which branches from which.

Shared by all that changes a tenant: `tenant`, `archiving`, `ancestor_detachment`. Each change holds
`changing` from its first look to its last step.

While one of them is *damaged*, what branches there are is not known: it may branch from any other, at any
point. Garbage collection of the whole tenant stands still then (S3), and no change is made that needs to
know all branches, until it is repaired or deleted.

Not here: the changes themselves; what a timeline does (`timeline`).
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from excimer.base.ids import TenantId, TimelineId
from excimer.storage.engine.archived_timeline import ArchivedTimeline
from excimer.storage.engine.claim import claim_newest
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.damaged_timeline import DamagedTimeline
from excimer.storage.engine.errors import (
    BranchesUnknownError,
    TimelineArchivedError,
    TimelineDamagedError,
    TimelineExistsError,
    TimelineMissingError,
)
from excimer.storage.engine.leftovers import unnamed_layers
from excimer.storage.engine.manifest_store import FoundManifest, ManifestStore, timeline_prefix
from excimer.storage.engine.settings_store import LiveSettings
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.manifest import Manifest
from excimer.storage.plan.branch import ROOT, Origin, branch_points

_Result = TypeVar("_Result")


class TenantTimelines:
    """All methods belong on the event loop's thread."""

    def __init__(self, context: StorageContext, tenant_id: TenantId, generation: int) -> None:
        self.context = context
        self.tenant_id = tenant_id
        self.generation = generation
        self.settings = LiveSettings(context.settings.tenant_defaults(), {})
        self.changing = asyncio.Lock()
        self.live: dict[TimelineId, Timeline] = {}
        self.archived: dict[TimelineId, ArchivedTimeline] = {}
        self.damaged: dict[TimelineId, DamagedTimeline] = {}
        self.unsure: dict[TimelineId, Origin] = {}
        """Branches whose first manifest was sent and not confirmed: if they exist, they will be read."""
        self.deleted: set[TimelineId] = set()
        """Ids that are not used again."""

    def get(self, timeline_id: TimelineId) -> Timeline:
        """Raises `TimelineMissingError`, `TimelineArchivedError`, `TimelineDamagedError`."""
        try:
            return self.live[timeline_id]
        except KeyError:
            self._check_not_damaged(timeline_id)
            if timeline_id in self.archived:
                raise TimelineArchivedError(
                    f"timeline {timeline_id} is archived: unarchive it first"
                ) from None
            raise TimelineMissingError(f"tenant {self.tenant_id} has no timeline {timeline_id}") from None

    def check_is_new(self, timeline_id: TimelineId) -> None:
        """Raises `TimelineExistsError`, `TimelineDamagedError`."""
        self._check_not_damaged(timeline_id)
        if timeline_id in self.live or timeline_id in self.archived:
            raise TimelineExistsError(f"tenant {self.tenant_id} has a timeline {timeline_id} already")
        if timeline_id in self.deleted:
            raise TimelineExistsError(
                f"tenant {self.tenant_id} had a timeline {timeline_id}, which was deleted: choose another id"
            )

    def branches(self, timeline_id: TimelineId) -> list[TimelineId]:
        """The timelines that leave it, archived ones included, and damaged ones of which that is known."""
        known = [each for each, origin in self.origins().items() if origin.ancestor_id == timeline_id]
        damaged = [
            each.timeline_id for each in self.damaged.values() if each.ancestor_timeline_id == timeline_id
        ]
        return known + damaged

    def find_standstill(self) -> str | None:
        """Why it is not known what history is needed; None while it is."""
        if not self.damaged:
            damage = self.settings.damage
            return None if damage is None else f"{damage}: set them anew, all of them"
        each = next(iter(self.damaged.values()))
        more = f", and {len(self.damaged) - 1} more" if len(self.damaged) > 1 else ""
        return f"timeline {each.timeline_id} is damaged ({each.reason}){more}: repair or delete it"

    def check_branches_known(self, what: str) -> None:
        """Raises `BranchesUnknownError` if `what` has to wait."""
        if self.damaged:
            raise BranchesUnknownError(
                f"{what} while it is not known which branches there are: {self.find_standstill()}"
            )

    def _check_not_damaged(self, timeline_id: TimelineId) -> None:
        damaged = self.damaged.get(timeline_id)
        if damaged is not None:
            raise TimelineDamagedError(timeline_id, damaged.reason)

    def origins(self) -> dict[TimelineId, Origin]:
        """Of all that is not damaged."""
        origins = dict(self.unsure)
        for archived in self.archived.values():
            origins[archived.timeline_id] = Origin(archived.ancestor_timeline_id, archived.ancestor_lsn)
        for each in self.live.values():
            ancestry = each.stack.ancestry
            origins[each.timeline_id] = (
                ROOT if ancestry is None else Origin(ancestry.timeline.timeline_id, ancestry.lsn)
            )
        return origins

    def hold_branch_points(self) -> None:
        """Every branch point is held where the history lies that is read there (S3), and only there."""
        points = branch_points(self.origins())
        for timeline in self.live.values():
            timeline.retention.set_branches(points.get(timeline.timeline_id, {}))

    def open(self, found: FoundManifest) -> Timeline:
        """Puts a timeline into service whose ancestor is. Goes on behind what was found."""
        manifest = found.manifest
        ancestor_id = manifest.ancestor_timeline_id
        ancestor = None if ancestor_id is None else self.live[TimelineId(ancestor_id)]
        timeline = self._new(manifest, self._manifest_store(found), ancestor)
        if found.layers and unnamed_layers(found.layers, manifest, self.generation):
            timeline.leftovers.suspect()
        self.live[timeline.timeline_id] = timeline
        return timeline

    def make(self, manifest: Manifest, ancestor: Timeline | None) -> Timeline:
        """One that nobody has made before; it is in service when it is put into `live`."""
        manifests = ManifestStore(self.context.store, self.tenant_id, manifest.timeline_id, self.generation)
        return self._new(manifest, manifests, ancestor)

    def _new(self, manifest: Manifest, manifests: ManifestStore, ancestor: Timeline | None) -> Timeline:
        timeline = Timeline(self.context, manifest, manifests, ancestor, self.generation, self.settings)
        timeline.retention.find_standstill = self.find_standstill
        return timeline

    def _manifest_store(self, found: FoundManifest) -> ManifestStore:
        sequence = found.name.sequence if found.name.generation == self.generation else 0
        return ManifestStore(
            self.context.store, self.tenant_id, found.manifest.timeline_id, self.generation, sequence
        )

    async def rewrite_archived(
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

        return await self.in_thread(rewrite)

    async def remove_local(self, *timeline_ids: TimelineId) -> None:
        """Their local files."""
        await self.in_thread(partial(self._remove_local, timeline_ids))

    def _remove_local(self, timeline_ids: tuple[TimelineId, ...]) -> None:
        for timeline_id in timeline_ids:
            prefix = timeline_prefix(self.tenant_id, timeline_id)
            self.context.filesystem.remove_tree(self.context.local_dir / prefix)

    async def in_thread(self, function: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self.context.executor, function)
