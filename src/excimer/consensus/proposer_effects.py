"""What a proposer may ask of its shell, and the limits it keeps to: values only.

Not here: when it asks (`excimer.consensus.proposer`, which also exports these names).
"""

from dataclasses import dataclass

import msgspec

from excimer.base.lsn import Lsn
from excimer.wire.safekeeping import WAL_CHUNK_SIZE_BYTES_MAX, AppendRequest, ProposerMessage, Term


@dataclass(frozen=True, slots=True)
class ProposerLimits:
    chunk_size_bytes: int = 128 << 10
    """WAL per append from the window."""
    repair_chunk_size_bytes: int = WAL_CHUNK_SIZE_BYTES_MAX
    in_flight_size_bytes_max: int = 8 << 20
    """WAL sent to one member and not yet flushed by it."""
    window_size_bytes_max: int = 32 << 20
    """Recent WAL in memory. What a majority has leaves from half of it on; other WAL may fill it all."""
    trim_size_bytes: int = 256 << 10
    """WAL that all have stays until the window holds this much, or for a heartbeat."""
    renewal_tick_count: int = 3
    """Heartbeats for which a higher promise may be a live candidate's, who needs far less time to win."""


class Send(msgspec.Struct, frozen=True):
    peer: int
    message: ProposerMessage


class SendWal(msgspec.Struct, frozen=True):
    """Send `message(wal)` with WAL [begin_lsn, end_lsn) of the window."""

    peer: int
    term: Term
    begin_lsn: Lsn
    end_lsn: Lsn
    commit_lsn: Lsn
    horizon_lsn: Lsn

    def message(self, wal: bytes) -> AppendRequest:
        return AppendRequest(self.term, self.begin_lsn, self.commit_lsn, self.horizon_lsn, wal)


class Elected(msgspec.Struct, frozen=True):
    """Won. Open a `WalWindow` at `start_lsn`; wait for the first `CommitAdvanced` before writing WAL."""

    term: Term
    start_lsn: Lsn
    """E: end of the last record of the best log. PostgreSQL's new WAL begins here."""
    donor: int


class ElectionLost(msgspec.Struct, frozen=True):
    """Another candidate is ahead. Back off for a random while, then `campaign()`, or give up."""

    term_seen: Term


class CommitAdvanced(msgspec.Struct, frozen=True):
    """WAL below `commit_lsn`, a record boundary, is durable at a majority (D1): tell PostgreSQL.

    Some time later call `announce`, for members to which no append went.
    """

    commit_lsn: Lsn


class TrimWindow(msgspec.Struct, frozen=True):
    """WAL below `lsn` will not be asked of the window again."""

    lsn: Lsn


class RestartWindow(msgspec.Struct, frozen=True):
    """Open the `WalWindow` anew at `start_lsn`, a record boundary, and read WAL from there once more.

    No member at hand has what another lacks; PostgreSQL keeps all that is not committed.
    """

    start_lsn: Lsn


class Renewed(msgspec.Struct, frozen=True):
    """This leader goes on in a higher term. Nothing to do: its WAL and what it has committed stay."""

    term: Term
    start_lsn: Lsn
    """Where WAL of the new term begins."""


class Fenced(msgspec.Struct, frozen=True):
    """A newer proposer has `term_seen`: stop PostgreSQL, write nothing more."""

    term_seen: Term


class PeerStranded(msgspec.Struct, frozen=True):
    """No member can serve the WAL that `peer` lacks: rebuild it from object storage."""

    peer: int
    missing_from_lsn: Lsn


ProposerEffect = (
    Send
    | SendWal
    | Elected
    | ElectionLost
    | Renewed
    | CommitAdvanced
    | TrimWindow
    | RestartWindow
    | Fenced
    | PeerStranded
)
