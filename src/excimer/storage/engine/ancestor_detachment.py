"""Makes a branch a root of its tenant: the exchange of manifests, who holds what then, and its siblings.

::

    copies (detach_job) -> the branch's manifest without ancestor, `detachment` set -> siblings, one by one
                        -> its manifest, `detachment` gone

Every read before, meanwhile and after is answered alike, and each step is safe to be the last one: whoever
attaches the tenant next finds `detachment` set, and goes on with the siblings. While a timeline is damaged,
which may be a sibling, nothing is detached, and nobody goes on.

Not here: copying (`detach_job`); which layers and which siblings (`excimer.storage.plan.detach`).
"""

from dataclasses import replace
from functools import partial

import msgspec

from excimer.base.ids import TimelineId
from excimer.storage.engine.detach_job import DetachJob
from excimer.storage.engine.errors import TimelineBusyError
from excimer.storage.engine.layer_stack import Ancestry
from excimer.storage.engine.tenant_timelines import TenantTimelines
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.manifest import Manifest
from excimer.storage.plan.branch import ROOT, branch_points
from excimer.storage.plan.detach import is_reparented


class AncestorDetachment:
    """Of one tenant's timelines."""

    def __init__(self, known: TenantTimelines) -> None:
        self._known = known
        self._detaching: set[TimelineId] = set()

    def check_not_detaching(self, timeline_id: TimelineId) -> None:
        """Raises `TimelineBusyError`."""
        if timeline_id in self._detaching:
            raise TimelineBusyError(f"timeline {timeline_id} is being detached from its ancestor: try again")

    async def detach(self, timeline_id: TimelineId) -> list[TimelineId]:
        """See `TenantStorage.detach_ancestor`."""
        known = self._known
        timeline = known.get(timeline_id)
        known.check_branches_known(f"timeline {timeline_id} cannot be detached")
        self.check_not_detaching(timeline_id)
        self._detaching.add(timeline_id)
        try:
            job = DetachJob(timeline)
            is_done = timeline.ancestor is None
            with timeline.leftovers.left_alone():  # copies are nobody's until the manifest
                while not is_done:
                    await job.prepare()
                    is_done = await self._exchange(timeline, job)
            async with known.changing:
                return await self.reparent_siblings(timeline)
        finally:
            self._detaching.discard(timeline_id)

    async def _exchange(self, timeline: Timeline, job: DetachJob) -> bool:
        """Whether it is a root now; else there is more to copy."""
        async with timeline.compaction_lock, self._known.changing:
            self._hold_inherited(timeline)
            before = timeline.stack.ancestry
            is_done = await timeline.commits.rewrite(lambda _: job.manifest(), None)
            if is_done:
                _hold_for_readers(timeline, before)
                timeline.retention.inherit(timeline.manifest.oldest_lsn)
            self._known.hold_branch_points()
        return is_done

    def _hold_inherited(self, detaching: Timeline) -> None:
        """What its ancestors hold for whoever reads through it, it will have to hold as a root."""
        origins = self._known.origins()
        origins[detaching.timeline_id] = ROOT
        for branch_id, lsn in branch_points(origins).get(detaching.timeline_id, {}).items():
            detaching.retention.keep_branch(branch_id, lsn)
        ancestor = detaching.ancestor
        while ancestor is not None:
            detaching.retention.copy_leases(ancestor.retention)
            ancestor = ancestor.ancestor

    async def reparent_siblings(self, detached: Timeline) -> list[TimelineId]:
        """What `detach` ends with; goes on where a crash or an error stopped it."""
        if detached.manifest.detachment is None or self._known.damaged:
            return []
        known = self._known
        parent, moved = detached.timeline_id, []
        for sibling in list(known.live.values()):
            ancestry = sibling.stack.ancestry
            if ancestry is not None and is_reparented(sibling.manifest, detached.manifest):
                change = partial(_with_ancestor, ancestor_id=parent)
                detached.retention.keep_branch(sibling.timeline_id, ancestry.lsn)
                await sibling.commits.rewrite(change, Ancestry(detached, ancestry.lsn))
                _hold_for_readers(sibling, ancestry)
                moved.append(sibling.timeline_id)
        for archived in list(known.archived.values()):
            if is_reparented(archived, detached.manifest):
                await known.rewrite_archived(
                    archived.timeline_id, partial(_with_ancestor, ancestor_id=parent)
                )
                known.archived[archived.timeline_id] = replace(archived, ancestor_timeline_id=parent)
                moved.append(archived.timeline_id)
        known.hold_branch_points()
        await detached.commits.rewrite(
            lambda manifest: msgspec.structs.replace(manifest, detachment=None), None
        )
        return sorted(moved)


def _hold_for_readers(timeline: Timeline, before: Ancestry | None) -> None:
    """A read that began while the timeline had another ancestor goes on to that one at the old point."""
    if before is not None:
        retention = before.timeline.home_of(before.lsn).retention
        retention.hold_while(timeline.deletions.are_readers_left(), before.lsn)


def _with_ancestor(manifest: Manifest, *, ancestor_id: TimelineId) -> Manifest:
    return msgspec.structs.replace(manifest, ancestor_timeline_id=ancestor_id)
