"""Decisions about the history of branches: taking another state, being put away, standing alone. No I/O.

A branch is a name. `restore` and `reset` give the name, and the endpoints that serve it, to a new timeline;
the timeline that had the name stays as a branch under another one, or goes::

    restore main --to L      main -> T1            main -> T2 (of T1 at L),  main_old_20260131T120000Z -> T1
    reset dev                dev  -> T3 (of T1)    dev  -> T4 (of T1 at its head),  T3 is deleted

Not here: carrying it out (`history_operations`).
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.controller.core import (
    ARCHIVE_STATES,
    IncompleteError,
    check_branch_name,
    check_in_service,
    made_quiet,
)
from excimer.controller.model import (
    BadRequestError,
    Endpoint,
    InUseError,
    NameTakenError,
    Timeline,
)

OLD_NAME_BASE_SIZE_MAX = 40
"""Of the name that is repeated in a generated one, so that it stays a legal name."""


class Origin(NamedTuple):
    """What the pageserver says of where a timeline comes from."""

    ancestor_timeline_id: TimelineId | None
    ancestor_lsn: Lsn | None


class Replacement(NamedTuple):
    """Rows to be written in one transaction, `old` first."""

    old: Timeline
    new: Timeline
    moved_endpoints: tuple[str, ...]


def check_settled(timeline: Timeline) -> None:
    """Raises unless the branch is in service and no other change of it is under way."""
    check_in_service(timeline)
    if timeline.state != "active":
        raise IncompleteError(f"branch {timeline.name!r} is {timeline.state}: try again")


def old_name(timelines: Iterable[Timeline], name: str, now: float) -> str:
    """``main_old_20260131T120000Z``; a number is added if that is taken."""
    moment = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    base = f"{name[:OLD_NAME_BASE_SIZE_MAX]}_old_{moment}"
    taken = {timeline.name for timeline in timelines if timeline.state != "deleting"}
    number, found = 1, base
    while found in taken:
        number += 1
        found = f"{base}_{number}"
    return found


def plan_replacement(
    timelines: Sequence[Timeline],
    branch: Timeline,
    source: Timeline,
    timeline_id: TimelineId,
    *,
    kept_as: str | None,
    keeps_subscriptions: bool,
    now: float,
) -> Timeline:
    """The row of the timeline that is to take the branch's place, made from `source`.

    Until it does it is hidden, and has its id for a name. `kept_as`: the name of what the branch was; None:
    that goes, if nothing needs it. It is the branch, so its schedulers run on if they did. Subscriptions are
    disabled even so: their publishers have thrown away what the branch had applied since.
    """
    if kept_as is not None:
        check_branch_name(kept_as)
        if any(timeline.name == kept_as and timeline.state != "deleting" for timeline in timelines):
            raise NameTakenError(f"there is already a branch {kept_as!r}")
    return msgspec.structs.replace(
        branch,
        timeline_id=timeline_id,
        name=timeline_id,
        state="replacing",
        ancestor_timeline_id=source.timeline_id,
        ancestor_lsn=None,
        start_lsn=None,
        created_at=now,
        replaces_timeline_id=branch.timeline_id,
        replaced_name=kept_as,
        quieting_id=None if keeps_subscriptions else timeline_id,
    )


def finish_replacement(
    made: Timeline, timelines: Sequence[Timeline], endpoints: Iterable[Endpoint], now: float
) -> Replacement:
    """The exchange of names. A static endpoint whose LSN the new history does not have stays with the old,
    which is then kept whatever was asked for; so it is when other branches come from it.
    """
    by_id = {timeline.timeline_id: timeline for timeline in timelines}
    old = by_id[made.replaces_timeline_id or made.timeline_id]
    own = [endpoint for endpoint in endpoints if endpoint.timeline_id == old.timeline_id]
    moved = [each for each in own if each.lsn is None or each.lsn <= (made.ancestor_lsn or 0)]
    is_needed = len(moved) < len(own) or any(
        timeline.ancestor_timeline_id == old.timeline_id and timeline.state != "deleting"
        for timeline in [*(each for each in timelines if each.timeline_id != made.timeline_id), made]
    )
    others = [each for each in timelines if each.timeline_id not in (old.timeline_id, made.timeline_id)]
    kept_as = made.replaced_name
    if kept_as is None or any(each.name == kept_as and each.state != "deleting" for each in others):
        kept_as = old_name(timelines, old.name, now)
    is_kept = is_needed or made.replaced_name is not None
    old = made_quiet(old, made.timeline_id)
    return Replacement(
        old=msgspec.structs.replace(old, name=kept_as, state=old.state if is_kept else "deleting"),
        new=msgspec.structs.replace(
            made, name=old.name, state="active", replaces_timeline_id=None, replaced_name=None
        ),
        moved_endpoints=tuple(endpoint.name for endpoint in moved),
    )


def check_archivable(timeline: Timeline, timelines: Iterable[Timeline]) -> None:
    """Raises `InUseError` that names the branches to be archived before it."""
    live = [
        other.name
        for other in timelines
        if other.ancestor_timeline_id == timeline.timeline_id
        and other.state not in ("deleting", "archiving", "archived")
    ]
    if live:
        raise InUseError(f"branch {timeline.name!r} has branches: archive {', '.join(sorted(live))} first")


def check_unarchivable(timeline: Timeline, timelines: Iterable[Timeline]) -> None:
    """Raises `InUseError` that names the ancestor to be unarchived before it."""
    for other in timelines:
        if other.timeline_id == timeline.ancestor_timeline_id and other.state in ARCHIVE_STATES:
            raise InUseError(
                f"branch {timeline.name!r} comes from branch {other.name!r}, which is archived: "
                f"unarchive {other.name} first"
            )


def find_parent(timeline: Timeline, timelines: Iterable[Timeline]) -> Timeline:
    """Raises `BadRequestError` for a branch without one."""
    for other in timelines:
        if other.timeline_id == timeline.ancestor_timeline_id and other.state != "deleting":
            return other
    raise BadRequestError(f"branch {timeline.name!r} has no parent")


def follow_pageserver(timelines: Iterable[Timeline], origins: Mapping[TimelineId, Origin]) -> list[Timeline]:
    """The rows that differ from what the pageserver says after a detachment, as they should be."""
    changed = []
    for timeline in timelines:
        origin = origins.get(timeline.timeline_id)
        if origin is not None and origin.ancestor_timeline_id != timeline.ancestor_timeline_id:
            changed.append(
                msgspec.structs.replace(
                    timeline,
                    ancestor_timeline_id=origin.ancestor_timeline_id,
                    ancestor_lsn=origin.ancestor_lsn,
                )
            )
    return changed
