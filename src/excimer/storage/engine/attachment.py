"""What attaching finds of a tenant: its timelines listed, claimed, and brought into order.

::

    list the prefix -> marked as deleted?  -> leftovers go
                    -> claim the newest    -> deleted, or an import broken off? -> all of it goes
                                           -> a manifest that cannot be read    -> damaged, left alone
                                           -> a timeline

All timelines are claimed at the same time: an attachment is as slow as the answers it waits for in turn.

A damaged timeline's older manifests are never taken instead: what they name may be gone, and what was
acknowledged since is not in them. Nothing of it is touched. An error of the object store is another matter:
it says nothing about any timeline, and the attachment is tried again.

Not here: opening them (`tenant`); what a claim is (`claim`); who is served
(`excimer.storage.plan.attach_order`).
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from excimer.base.ids import TenantId, TimelineId
from excimer.io.object_store import ObjectInfo, ObjectStoreError
from excimer.storage.engine.claim import claim_newest
from excimer.storage.engine.context import StorageContext
from excimer.storage.engine.damaged_timeline import DamagedTimeline
from excimer.storage.engine.manifest_store import FoundManifest, may_be_hidden, tenant_prefix
from excimer.storage.engine.timeline import Timeline
from excimer.storage.engine.timeline_removal import deleted_timelines, remove_leftovers, remove_timeline
from excimer.storage.format.manifest import DamagedManifestError
from excimer.storage.plan.attach_order import missing_ancestors, plan_attach


@dataclass(frozen=True)
class FoundTimelines:
    in_order: tuple[FoundManifest, ...]
    """Every timeline after its ancestor, as ours."""
    damaged: tuple[DamagedTimeline, ...]
    deleted: frozenset[TimelineId]
    """Ids that are not used again."""


class Attachment:
    """Of one tenant by one generation."""

    def __init__(self, context: StorageContext, tenant_id: TenantId, generation: int) -> None:
        self._context = context
        self._tenant_id = tenant_id
        self._generation = generation
        self._found: dict[TimelineId, FoundManifest] = {}
        self._unreadable: dict[TimelineId, str] = {}
        self._deleted: set[TimelineId] = set()

    async def find(self) -> FoundTimelines:
        """Waits for all timelines, and raises then: `FencedError`, `ObjectStoreError`."""
        listed = await asyncio.get_running_loop().run_in_executor(self._context.executor, self._list)
        await self._claim_all(listed)
        while missing := self._missing():
            await self._claim_all(dict.fromkeys(sorted(missing)))
            if not missing & (self._found.keys() | self._unreadable.keys()):
                break
        manifests = {each: one.manifest for each, one in self._found.items()}
        plan = plan_attach(manifests, self._unreadable)
        return FoundTimelines(
            in_order=tuple(self._found[each] for each in plan.in_order),
            damaged=tuple(
                DamagedTimeline(each, reason, manifests.get(each)) for each, reason in plan.damaged.items()
            ),
            deleted=frozenset(self._deleted),
        )

    def _missing(self) -> set[TimelineId]:
        """Ancestors to be looked for by name: the listing may lag behind."""
        manifests = {each: one.manifest for each, one in self._found.items()}
        return missing_ancestors(manifests, self._unreadable) - self._deleted

    async def _claim_all(self, listed: Mapping[TimelineId, Sequence[ObjectInfo] | None]) -> None:
        loop, executor = asyncio.get_running_loop(), self._context.executor
        claims = [
            loop.run_in_executor(executor, partial(self._claim, each, infos))
            for each, infos in listed.items()
        ]
        outcomes = await asyncio.gather(*claims, return_exceptions=True)
        for timeline_id, outcome in zip(listed, outcomes, strict=True):
            if isinstance(outcome, DamagedManifestError):
                self._unreadable[timeline_id] = str(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            elif outcome is not None:
                self._found[timeline_id] = outcome

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

    def _claim(self, timeline_id: TimelineId, listed: Sequence[ObjectInfo] | None) -> FoundManifest | None:
        """None if the timeline does not exist, or does so no longer. `listed` is None for one that was not
        listed and that a branch needs.
        """
        ids = self._tenant_id, timeline_id
        newest = claim_newest(self._context.store, *ids, self._generation, listed)
        if newest is None:  # created halfway: without a manifest it does not exist
            if listed is None and may_be_hidden(self._context.store, *ids, self._generation):
                raise ObjectStoreError(f"the listing of timeline {timeline_id} lags behind: try again")
            return None
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
