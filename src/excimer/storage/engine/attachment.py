"""What attaching finds of a tenant: its timelines listed, claimed, and brought into order.

::

    list the prefix -> marked as deleted?  -> leftovers go
                    -> claim the newest    -> deleted, or an import broken off? -> all of it goes
                                           -> a timeline

All timelines are claimed at the same time: an attachment is as slow as the answers it waits for in turn.

Not here: opening them (`tenant`); what a claim is (`claim`).
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from excimer.base.errors import CorruptionError
from excimer.base.ids import TenantId, TimelineId
from excimer.io.object_store import ObjectInfo
from excimer.storage.engine.claim import claim_newest
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.manifest_store import FoundManifest, tenant_prefix
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.timeline_removal import deleted_timelines, remove_leftovers, remove_timeline
from excimer.storage.format.manifest import Manifest


@dataclass(frozen=True)
class FoundTimelines:
    in_order: tuple[FoundManifest, ...]
    """Every timeline after its ancestor, as ours."""
    deleted: frozenset[TimelineId]
    """Ids that are not used again."""


class Attachment:
    """Of one tenant by one generation."""

    def __init__(self, context: StorageContext, tenant_id: TenantId, generation: int) -> None:
        self._context = context
        self._tenant_id = tenant_id
        self._generation = generation
        self._deleted: set[TimelineId] = set()

    async def find(self) -> FoundTimelines:
        """Waits for all timelines, and raises then: `FencedError`, `CorruptionError`, `ObjectStoreError`."""
        loop, executor = asyncio.get_running_loop(), self._context.executor
        listed = await loop.run_in_executor(executor, self._list)
        claims = [loop.run_in_executor(executor, partial(self._claim, each, listed[each])) for each in listed]
        outcomes = await asyncio.gather(*claims, return_exceptions=True)
        found = {}
        for timeline_id, outcome in zip(listed, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                found[timeline_id] = outcome
        ordered = _ancestors_first({each: one.manifest for each, one in found.items()})
        return FoundTimelines(tuple(found[each] for each in ordered), frozenset(self._deleted))

    def _list(self) -> dict[TimelineId, list[ObjectInfo]]:
        """What there is of each timeline that was not deleted."""
        infos = self._context.store.list(f"{tenant_prefix(self._tenant_id)}/timelines")
        deleted = deleted_timelines(infos)
        for each, has_leftovers in deleted.items():
            if has_leftovers:
                remove_leftovers(self._context, self._tenant_id, each)
        self._deleted |= deleted.keys()
        listed: dict[TimelineId, list[ObjectInfo]] = {}
        for info in infos:
            listed.setdefault(TimelineId(info.name.split("/")[3]), []).append(info)
        return {each: listed[each] for each in sorted(listed.keys() - deleted.keys())}

    def _claim(self, timeline_id: TimelineId, listed: list[ObjectInfo]) -> FoundManifest | None:
        """None if the timeline does not exist, or does so no longer."""
        newest = claim_newest(self._context.store, self._tenant_id, timeline_id, self._generation, listed)
        if newest is None:
            return None  # created halfway: without a manifest it does not exist
        importing_generation = newest.manifest.importing_generation
        if importing_generation == self._generation:
            remove_leftovers(self._context, self._tenant_id, timeline_id)
            return None
        if newest.manifest.deleted or importing_generation:  # which may still be at it
            remove_timeline(self._context, self._tenant_id, timeline_id, self._generation)
            self._deleted.add(timeline_id)
            return None
        return newest


def take_stock(timeline: Timeline) -> None:
    """Counts the local files, and removes those that the manifest does not name: left by a crash, by
    another generation, or only parts of a layer. Blocks.
    """
    filesystem, directory = timeline.context.filesystem, timeline.home.local_dir
    for name in filesystem.list_files(directory):
        file = timeline.stack.files.get(name)
        if file is None:
            filesystem.remove(directory / name)
        else:
            file.note_local()


def _ancestors_first(manifests: Mapping[TimelineId, Manifest]) -> list[TimelineId]:
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
