"""Who wrote which WAL: the list of terms and where each one's WAL begins.

Two logs that hold WAL of the same term hold the same bytes up to where either of them leaves that
term, since one proposer wrote it as one stream. So histories alone tell where two logs part, without
comparing a byte::

    mine    (1,0)----------(3,80)------------------|flush 260        written in 1, then in 3
    elected (1,0)----------(3,80)---------(7,200)---------
                             ^ last term in both
                                          ^ 200 = min(where 3 ends here, where 3 ends there)
                                          everything of mine above 200 goes

A term that wrote nothing still has an entry: adopting it is what Raft does with an empty entry of the new
term, and makes commits of inherited WAL safe (its figure 8).

Not here: the WAL itself, and the encoding (`excimer.wire.safekeeping`).
"""

from dataclasses import dataclass
from itertools import pairwise

from excimer.base.errors import CorruptionError
from excimer.base.lsn import Lsn, format_lsn
from excimer.wire.safekeeping import Term, TermStart

BOOTSTRAP_TERM = Term(0)
"""The term of whatever a timeline is created with; no proposer ever has it."""


class HistoryMismatchError(CorruptionError):
    """Two members' histories have no term in common: they are not of one timeline."""


@dataclass(frozen=True, slots=True)
class TermHistory:
    entries: tuple[TermStart, ...]
    """Never empty; terms grow strictly, start LSNs never fall."""

    def __post_init__(self) -> None:
        pairs = pairwise(self.entries)
        if not self.entries or any(a.term >= b.term or a.start_lsn > b.start_lsn for a, b in pairs):
            raise HistoryMismatchError(f"not a term history: {self.entries}")

    @classmethod
    def bootstrap(cls, timeline_start_lsn: Lsn) -> "TermHistory":
        """What every member of a new timeline begins with."""
        return cls((TermStart(BOOTSTRAP_TERM, timeline_start_lsn),))

    @property
    def last(self) -> TermStart:
        return self.entries[-1]

    def term_at(self, end_lsn: Lsn) -> Term:
        """The term of a log that ends at `end_lsn`: an entry that starts right there counts."""
        return self.up_to(end_lsn).last.term

    def writer_of(self, end_lsn: Lsn) -> TermStart | None:
        """Whose WAL a log that ends at `end_lsn` ends with: who only began there has written none of it.

        Two logs of one timeline that end at the same LSN with the same writer hold the same bytes, as far
        back as both go. None when the history does not say.
        """
        return next((entry for entry in reversed(self.entries) if entry.start_lsn < end_lsn), None)

    def up_to(self, end_lsn: Lsn) -> "TermHistory":
        """The history of a log that ends at `end_lsn`."""
        kept = tuple(entry for entry in self.entries if entry.start_lsn <= end_lsn)
        if len(kept) == len(self.entries):
            return self
        if not kept:
            raise HistoryMismatchError(
                f"WAL ends at {format_lsn(end_lsn)}, before its history begins "
                f"at {format_lsn(self.entries[0].start_lsn)}"
            )
        return TermHistory(kept)

    def extended(self, term: Term, start_lsn: Lsn) -> "TermHistory":
        """With a new reign at the end; entries that start above `start_lsn` are cut first."""
        return TermHistory((*self.up_to(start_lsn).entries, TermStart(term, start_lsn)))

    def common_end(self, end_lsn: Lsn, other: "TermHistory") -> Lsn:
        """Up to where a log with this history, ending at `end_lsn`, agrees with a log of `other`.

        `other` is an elected proposer's, whose last term goes on for ever. The result is at most
        `end_lsn`; when it is less, a term begins there in one of the two, hence it is a record boundary.
        Raises `HistoryMismatchError` when they share no term.
        """
        mine = self.up_to(end_lsn).entries
        other_index = {entry: index for index, entry in enumerate(other.entries)}
        for index in range(len(mine) - 1, -1, -1):
            shared = other_index.get(mine[index])
            if shared is None:
                continue
            my_end = mine[index + 1].start_lsn if index + 1 < len(mine) else end_lsn
            if shared + 1 < len(other.entries):
                return min(my_end, other.entries[shared + 1].start_lsn)
            return my_end
        raise HistoryMismatchError(f"no term in common: {mine} and {other.entries}")

    def trimmed(self, horizon_lsn: Lsn) -> "TermHistory":
        """Without the entries that end below `horizon_lsn`; keeps the one that wrote the byte before it.

        Safe when every member holds what is below and it is committed: all have that byte, hence that
        entry, and no two of their logs can part below it. An entry that only starts at the horizon
        is no substitute, since a member may hold the WAL without having heard of that term.
        Keeps a history short however often a compute starts.
        """
        first = 0
        while first + 1 < len(self.entries) and self.entries[first + 1].start_lsn < horizon_lsn:
            first += 1
        return self if first == 0 else TermHistory(self.entries[first:])
