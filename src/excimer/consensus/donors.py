"""Who can bring up a member that lags: with the WAL that it lacks, or with what follows WAL that it may skip.

Not here: asking them (`excimer.consensus.proposer`).
"""

from collections.abc import Sequence

from excimer.base.lsn import Lsn
from excimer.consensus.leader_state import LeaderState, Member


def holders_of(members: Sequence[Member], lagging: Member, lsn: Lsn) -> list[Member]:
    """Who has adopted the leader's history and has WAL at `lsn`, as far as is known; also who is away."""
    return [
        member
        for member in members
        if member.adopted and member.wal_start_lsn <= lsn < member.flush_lsn and member is not lagging
    ]


def find_donor(holders: Sequence[Member]) -> Member | None:
    """The one with the most WAL, of those at hand."""
    at_hand = [member for member in holders if member.connected]
    return max(at_hand, key=lambda member: member.flush_lsn, default=None)


def skip_lsn(members: Sequence[Member], leader: LeaderState, lagging: Member, missing_lsn: Lsn) -> Lsn | None:
    """Where its WAL may begin anew, so that what it lacks from `missing_lsn` on is needed by nobody; None
    while that is not known, or what follows cannot be had.

    What it knows as durable is committed, but perhaps by one who has succeeded this leader. Only what is
    committed as well by this leader, or at a member that has adopted its history, is in this leader's log.
    """
    committed_lsn = max([leader.commit_lsn, *(member.commit_lsn for member in members if member.adopted)])
    lsn = min(lagging.durable_lsn, committed_lsn)
    if lsn <= missing_lsn:
        return None
    if leader.window_start_lsn <= lsn <= leader.window_end_lsn:
        return lsn
    return None if find_donor(holders_of(members, lagging, lsn)) is None else lsn
