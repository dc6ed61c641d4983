"""Archiving a timeline and taking it back.

An *archived* timeline is a manifest that says so: it takes no task, no file and a few hundred bytes of
memory here, while its layers stay in object storage. Archived branches still hold their branch
points (`branch_points`), and everything that an unarchived timeline reads is unarchived.
"""

import msgspec

from excimer.base.ids import TimelineId
from excimer.storage.engine.archived_timeline import ArchivedTimeline
from excimer.storage.engine.errors import TimelineArchivedError, TimelineMissingError
from excimer.storage.engine.tenant_timelines import TenantTimelines
from excimer.storage.engine.timeline import Timeline
from excimer.storage.format.manifest import Manifest


async def archive_timeline(known: TenantTimelines, timeline_id: TimelineId) -> None:
    """See `TenantStorage.archive_timeline`. Hold `known.changing`, as for all of these."""
    timeline = known.get(timeline_id)
    known.check_branches_known(f"timeline {timeline_id} cannot be archived")
    live = [each.timeline_id for each in known.live.values() if each.ancestor is timeline]
    if live:
        raise TimelineArchivedError(
            f"timeline {timeline_id} cannot be archived before its branches: {', '.join(live)}"
        )
    await timeline.flush()
    await timeline.commits.rewrite(
        lambda manifest: msgspec.structs.replace(manifest, archived=True), timeline.stack.ancestry
    )


async def offload_timeline(known: TenantTimelines, timeline_id: TimelineId) -> None:
    """See `TenantStorage.offload_timeline`."""
    timeline = known.live.get(timeline_id)
    if timeline is None or not timeline.manifest.archived:
        return
    await timeline.close()
    known.archived[timeline_id] = ArchivedTimeline.of(timeline.manifest)
    del known.live[timeline_id]
    await known.remove_local(timeline_id)


async def unarchive_timeline(known: TenantTimelines, timeline_id: TimelineId) -> Timeline:
    """See `TenantStorage.unarchive_timeline`."""
    archived = known.archived.get(timeline_id)
    if archived is None:
        return known.get(timeline_id)
    if archived.ancestor_timeline_id in known.archived:
        raise TimelineArchivedError(
            f"timeline {timeline_id} cannot be unarchived before its ancestor, "
            f"{archived.ancestor_timeline_id}"
        )
    found = await known.rewrite_archived(timeline_id, _as_unarchived)
    if found is None:
        raise TimelineMissingError(f"tenant {known.tenant_id} has no timeline {timeline_id}")
    del known.archived[timeline_id]
    timeline = known.open(found)
    known.hold_branch_points()
    return timeline


def _as_unarchived(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, archived=False)
