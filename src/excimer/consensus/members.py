"""Whether who answers at a member's address is that member, of this timeline.

Not here: who the members are, which is fixed (`excimer.consensus`).
"""

from collections.abc import Sequence

from excimer.base.errors import RefusedError
from excimer.consensus.leader_state import Member
from excimer.wire.safekeeping import PROTOCOL_VERSION, AcceptorGreeting, TimelineIdentity


class DuplicateMemberError(RefusedError):
    """Two addresses lead to one safekeeper, which would then count twice."""


def check_member(
    members: Sequence[Member], member: Member, greeting: AcceptorGreeting, identity: TimelineIdentity
) -> TimelineIdentity:
    """The proposer's identity with its zeros filled in from the greeting. Raises RefusedError."""
    if greeting.version != PROTOCOL_VERSION:
        raise RefusedError(f"safekeeper {greeting.node_id} speaks protocol version {greeting.version}")
    if any(other.node_id == greeting.node_id and other is not member for other in members):
        raise DuplicateMemberError(f"two safekeeper addresses lead to safekeeper {greeting.node_id}")
    if member.node_id not in (None, greeting.node_id):
        raise DuplicateMemberError(
            f"the address of safekeeper {member.node_id} now leads to safekeeper {greeting.node_id}"
        )
    theirs = greeting.identity
    filled = TimelineIdentity(
        tenant_id=identity.tenant_id,
        timeline_id=identity.timeline_id,
        pg_version=identity.pg_version or theirs.pg_version,
        system_id=identity.system_id or theirs.system_id,
        wal_segment_size_bytes=identity.wal_segment_size_bytes or theirs.wal_segment_size_bytes,
    )
    if (filled.pg_version, filled.system_id, filled.wal_segment_size_bytes) != (
        theirs.pg_version,
        theirs.system_id,
        theirs.wal_segment_size_bytes,
    ):
        raise RefusedError(f"safekeeper {greeting.node_id} holds another PostgreSQL's timeline: {theirs}")
    return filled
