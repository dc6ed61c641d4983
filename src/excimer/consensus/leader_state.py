"""What a proposer remembers: its phase, each member, and, while it leads, how far its WAL is committed.

Values only, with the rules that follow from them alone; those that every commit needs are native
(`_native/led_wal.pyx`). Not here: what moves them (`excimer.consensus.proposer`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from excimer._native.led_wal import LedWal, MemberWal
from excimer.base.ids import NodeId
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.consensus.term_history import BOOTSTRAP_TERM, TermHistory
from excimer.wire.safekeeping import Term, VoteResponse


class Phase(Enum):
    GREETING = auto()
    CAMPAIGNING = auto()
    LOST = auto()
    LEADING = auto()
    RENEWING = auto()
    """A leader that asks for votes in a higher term, to win back a member that has promised one."""
    FENCED = auto()


@dataclass(eq=False)
class Member(MemberWal):
    """What the proposer knows of one member. Facts about its disk outlive a connection."""

    index: int
    node_id: NodeId | None = None
    promised_term: Term = BOOTSTRAP_TERM
    probed_term: Term = BOOTSTRAP_TERM
    """The promise, above this leader's term, about which it was asked whose WAL it holds."""
    vote: VoteResponse | None = None
    """Granted in the present term."""
    refused: bool = False
    wal_start_lsn: Lsn = INVALID_LSN
    durable_lsn: Lsn = INVALID_LSN
    """What it last said it knows of object storage."""
    reading_lsn: Lsn | None = None
    """Start of the chunk being read from a donor for it."""
    reading_from: int | None = None
    stranded: bool = False
    """No member has the WAL that it lacks, and it cannot skip it: that has been said."""
    lacks_donor: bool = False
    """No member at hand had the WAL that it lacks. It is asked with each heartbeat how far it may skip."""

    def forget_stream(self) -> None:
        """Nothing is under way to it any more."""
        self.sent_lsn = None
        self.reading_lsn = self.reading_from = None


class LeaderState(LedWal[Member]):
    """State of a leader, whose WAL begins at `start_lsn`, a record boundary. Nothing is committed before a
    majority holds it; then `commit_lsn` is a record boundary that never falls.

    `horizon_lsn` is committed, and held by every member: none will ever ask another for WAL below. It is a
    record boundary too.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        start_lsn: Lsn,
        history: TermHistory,
        chunk_size_bytes: int,
        in_flight_size_bytes_max: int,
    ) -> None:
        self.history = history
        self.renewal_tick_count = 0
        """Heartbeats since a connected member showed a higher promise."""

    @property
    def has_steady_members(self) -> bool:
        """Whether members that are connected follow, and lack nothing that was read before what is new."""
        return all(
            member.adopted and member.sent_lsn is not None and member.sent_lsn >= self.window_start_lsn
            for member in self.members
            if member.connected
        )

    def raise_horizon(self) -> None:
        """Up to the commit LSN of who lags: its flush LSN may lie in a record, which a restart would cut."""
        if all(member.adopted for member in self.members):
            held_lsns = [
                self.commit_lsn if member.flush_lsn >= self.commit_lsn else member.commit_lsn
                for member in self.members
            ]
            self.horizon_lsn = max(self.horizon_lsn, min(self.commit_lsn, *held_lsns))

    def trim_lsn(self, flushed_lsn: Lsn, durable_lsn: Lsn, kept_size_bytes: int) -> Lsn:
        """Below it the window may go; all have flushed up to `flushed_lsn`, a majority up to `durable_lsn`.

        When room is short it does not matter whether WAL is committed: a record may be longer than the
        window. Otherwise uncommitted WAL stays, for a member that restarts loses a record's beginning.
        """
        short_lsn = self.window_end_lsn - kept_size_bytes
        committed_lsn = min(self.commit_lsn, max(flushed_lsn, short_lsn))
        return Lsn(min(max(committed_lsn, min(durable_lsn, short_lsn)), self.window_end_lsn))
