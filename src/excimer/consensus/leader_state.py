"""What a proposer remembers: its phase, each member, and, while it leads, how far its WAL is committed.

Values only, with the rules that follow from them alone. Not here: what moves them
(`excimer.consensus.proposer`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

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


@dataclass(slots=True)
class Member:
    """What the proposer knows of one member. Facts about its disk outlive a connection."""

    index: int
    node_id: NodeId | None = None
    connected: bool = False
    """Greeted on the present connection."""
    promised_term: Term = BOOTSTRAP_TERM
    probed_term: Term = BOOTSTRAP_TERM
    """The promise, above this leader's term, about which it was asked whose WAL it holds."""
    vote: VoteResponse | None = None
    """Granted in the present term."""
    refused: bool = False
    adopted: bool = False
    """It has this term's history on disk: its flush LSN counts."""
    flush_lsn: Lsn = INVALID_LSN
    """Highest that it has acknowledged in this term. A restart takes back at most a part of a record."""
    commit_lsn: Lsn = INVALID_LSN
    wal_start_lsn: Lsn = INVALID_LSN
    durable_lsn: Lsn = INVALID_LSN
    """What it last said it knows of object storage."""
    sent_lsn: Lsn | None = None
    """End of what was sent on this connection; None until it has said where to begin."""
    announced_commit_lsn: Lsn = INVALID_LSN
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


@dataclass(slots=True)
class LeaderState:
    """State of a leader."""

    start_lsn: Lsn
    """Where WAL of this term begins, a record boundary. Nothing is committed before a majority holds it."""
    history: TermHistory
    window_start_lsn: Lsn
    window_end_lsn: Lsn
    commit_lsn: Lsn = INVALID_LSN
    """INVALID until E itself is at a majority; then a record boundary that never falls."""
    horizon_lsn: Lsn = INVALID_LSN
    """Committed, and held by every member: none will ever ask another for WAL below. A record boundary."""
    boundaries: list[Lsn] = field(default_factory=list)
    """Record ends that may be committed next, rising, all above `commit_lsn`."""
    renewal_tick_count: int = 0
    """Heartbeats since a connected member showed a higher promise."""

    @property
    def newest_boundary_lsn(self) -> Lsn:
        """End of the last complete record known."""
        return self.boundaries[-1] if self.boundaries else self.commit_lsn

    def raise_horizon(self, members: Sequence[Member]) -> None:
        """Up to the commit LSN of who lags: its flush LSN may lie in a record, which a restart would cut."""
        if all(member.adopted for member in members):
            held_lsns = [
                self.commit_lsn if member.flush_lsn >= self.commit_lsn else member.commit_lsn
                for member in members
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

    @property
    def window_size_bytes(self) -> int:
        return self.window_end_lsn - self.window_start_lsn
