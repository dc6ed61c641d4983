"""Whether and how a timeline may branch, as a pure decision: the manifest of the new timeline.

A branch holds no data of its own: it reads its ancestor at or below the branch point (S2), so making
one costs one small object whatever the ancestor's size.
"""

from collections.abc import Mapping
from typing import NamedTuple

from excimer.base.errors import RefusedError
from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.storage.format.manifest import Manifest


class Origin(NamedTuple):
    """Where a timeline comes from."""

    ancestor_id: TimelineId | None
    lsn: int


ROOT = Origin(None, 0)


class BranchPointError(RefusedError):
    """The ancestor has no such LSN, or no longer."""

    def __init__(self, ancestor_id: TimelineId, lsn: int, oldest_lsn: int, newest_lsn: int) -> None:
        super().__init__(
            f"timeline {ancestor_id} cannot branch at {format_lsn(lsn)}: its history reaches from "
            f"{format_lsn(oldest_lsn)} to {format_lsn(newest_lsn)}"
        )
        self._place = (ancestor_id, oldest_lsn, newest_lsn)

    def asked_for(self, lsn: int) -> "BranchPointError":
        """The same, naming the LSN that a user wrote, of which the record's end was made."""
        ancestor_id, oldest_lsn, newest_lsn = self._place
        return BranchPointError(ancestor_id, lsn, oldest_lsn, newest_lsn)


def plan_branch(
    ancestor: Manifest,
    timeline_id: str,
    *,
    lsn: Lsn,
    prev_record_lsn: Lsn,
    oldest_lsn: Lsn,
    ancestor_last_record_lsn: Lsn,
) -> Manifest:
    """The first manifest of a branch whose history is the ancestor's up to `lsn`.

    `lsn` must be the end of a record and `prev_record_lsn` its start: the caller knows WAL, this does not.
    The ancestor can be read from `oldest_lsn` to `ancestor_last_record_lsn`.
    Raises `BranchPointError`.
    """
    if not oldest_lsn <= lsn <= ancestor_last_record_lsn:
        raise BranchPointError(TimelineId(ancestor.timeline_id), lsn, oldest_lsn, ancestor_last_record_lsn)
    return Manifest(
        tenant_id=ancestor.tenant_id,
        timeline_id=timeline_id,
        pg_version=ancestor.pg_version,
        system_id=ancestor.system_id,
        wal_segment_size_bytes=ancestor.wal_segment_size_bytes,
        oldest_lsn=lsn,
        disk_consistent_lsn=lsn,
        prev_record_lsn=prev_record_lsn,
        ancestor_timeline_id=ancestor.timeline_id,
        ancestor_lsn=lsn,
    )


def branch_points(origins: Mapping[TimelineId, Origin]) -> dict[TimelineId, dict[str, Lsn]]:
    """For each timeline the points in its own history that branches begin at, by branch.

    A branch below its ancestor's own beginning begins in the history of an ancestor of that.
    """
    points: dict[TimelineId, dict[str, Lsn]] = {}
    for timeline_id, (home_id, lsn) in origins.items():
        while home_id is not None and (origin := origins[home_id]).ancestor_id and lsn < origin.lsn:
            home_id = origin.ancestor_id
        if home_id is not None:
            points.setdefault(home_id, {})[timeline_id] = Lsn(lsn)
    return points
