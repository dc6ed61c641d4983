"""Which of a tenant's timelines can be served, and in which order they are opened, as a pure decision.

::

    main          whole        served
     +- a         unreadable   damaged: its own manifest
     |  +- b      whole        damaged: it needs a
     +- c         whole        served

A timeline is read through all its ancestors (S2), so one damaged manifest takes its descendants along, and
nobody else.

Not here: what follows from that for branch points that are not known (`engine.tenant_timelines`).
"""

from collections.abc import Mapping
from typing import NamedTuple

from excimer.base.ids import TimelineId
from excimer.storage.format.manifest import Manifest


class AttachPlan(NamedTuple):
    in_order: tuple[TimelineId, ...]
    """Served, or archived: every timeline after its ancestor."""
    damaged: dict[TimelineId, str]
    """The others, and why: the reason names what is to be repaired."""


def missing_ancestors(
    manifests: Mapping[TimelineId, Manifest], unreadable: Mapping[TimelineId, str]
) -> set[TimelineId]:
    """Ancestors that nothing was found of."""
    named = {_ancestor_of(manifest) for manifest in manifests.values()}
    return {each for each in named if each is not None and each not in manifests and each not in unreadable}


def plan_attach(manifests: Mapping[TimelineId, Manifest], unreadable: Mapping[TimelineId, str]) -> AttachPlan:
    """`unreadable`: timelines that exist, and why nobody knows what they are."""
    ordered: dict[TimelineId, None] = {}
    damaged = dict(unreadable)
    for timeline_id in manifests:
        line: dict[TimelineId, None] = {}
        at: TimelineId | None = timeline_id
        while at is not None and at in manifests and at not in line:
            if at in ordered or at in damaged:
                break
            line[at] = None
            at = _ancestor_of(manifests[at])
        reason = None if at is None or at in ordered else _reason(at, manifests, unreadable, damaged)
        for each in reversed(line):
            if reason is None:
                reason = _archived_reason(manifests[each], manifests)
            if reason is None:
                ordered[each] = None
            else:
                damaged[each] = reason
    return AttachPlan(tuple(ordered), damaged)


def _reason(
    ancestor_id: TimelineId,
    manifests: Mapping[TimelineId, Manifest],
    unreadable: Mapping[TimelineId, str],
    damaged: Mapping[TimelineId, str],
) -> str:
    """Why whoever needs this ancestor cannot be served."""
    if ancestor_id in unreadable:
        return f"it needs its ancestor {ancestor_id}, and {unreadable[ancestor_id]}"
    if ancestor_id in damaged:
        return damaged[ancestor_id]
    if ancestor_id in manifests:
        return f"it needs its ancestor {ancestor_id}, which is a descendant of its own"
    return f"it needs its ancestor {ancestor_id}, which has no manifest in object storage"


def _archived_reason(manifest: Manifest, manifests: Mapping[TimelineId, Manifest]) -> str | None:
    """Everything that an unarchived timeline reads is unarchived."""
    ancestor_id = _ancestor_of(manifest)
    if manifest.archived or ancestor_id is None or not manifests[ancestor_id].archived:
        return None
    return f"it needs its ancestor {ancestor_id}, which is archived"


def _ancestor_of(manifest: Manifest) -> TimelineId | None:
    ancestor_id = manifest.ancestor_timeline_id
    return None if ancestor_id is None else TimelineId(ancestor_id)
