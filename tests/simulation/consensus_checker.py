"""Judges a simulated quorum from outside: it knows every byte on every disk and trusts no core.

* **D1** what a proposer calls committed is durable at a majority at that moment, and is in the log of
  every proposer elected in a later term;
* **C1** no WAL of a term below a spoken promise is written;
* **C2** a spoken promise is in the control file;
* **C3** what an acceptor lets readers see is a prefix of what was committed, and record-aligned;
* **D2** a member gives up WAL that it never had only where object storage has all that it would have been;
* a leader is fenced only when another has won a higher term, or a majority has promised one;
* committed prefixes agree between all proposers; commits never go back; one winner per term.
"""

from collections.abc import Iterable

from excimer.consensus.quorum import majority
from tests.simulation.consensus_disk import SimulatedDisk
from tests.simulation.toy_wal import scan


class ViolationError(AssertionError):
    """The quorum broke a promise."""


def require(condition: bool, text: str) -> None:
    if not condition:
        raise ViolationError(text)


class Checker:
    def __init__(self, start_lsn: int, disks: list[SimulatedDisk], *, outcomes_only: bool) -> None:
        self.start_lsn = start_lsn
        self.disks = disks
        self.outcomes_only = outcomes_only
        """Leave out C1 and C2, which look at the steps: what a user would notice must suffice."""
        self.committed = bytearray(disks[0].durable)
        self.boundaries = {start_lsn}
        self.commits: list[tuple[int, int]] = []
        """(term, commit LSN) in the order they were acknowledged."""
        self.winners: dict[int, int] = {}
        self.promises = [0] * len(disks)
        """Highest term each acceptor has spoken of as promised."""
        self.seen_commits = [start_lsn] * len(disks)
        self.stored_lsn = start_lsn
        """Below, all is in object storage."""

    def promise_spoken(self, node: int, term: int) -> None:
        self.promises[node] = max(self.promises[node], term)
        if not self.outcomes_only:
            on_disk = self.disks[node].control.promised_term
            require(on_disk >= term, f"C2: node {node} spoke of term {term}, its disk says {on_disk}")

    def wal_written(self, node: int, term: int) -> None:
        if not self.outcomes_only:
            promised = self.promises[node]
            require(term >= promised, f"C1: node {node} promised {promised}, then wrote WAL of term {term}")

    def truncated(self, node: int, lsn: int) -> None:
        seen = self.seen_commits[node]
        require(lsn >= seen, f"D1: node {node} cut its WAL to {lsn} after showing commit {seen}")

    def skipped(self, node: int, lsn: int, held_lsn: int) -> None:
        require(
            lsn <= self.stored_lsn, f"D2: node {node} skips to {lsn}, object storage has {self.stored_lsn}"
        )
        require(lsn in self.boundaries, f"node {node} skips to {lsn}, inside a record")
        require(lsn > held_lsn, f"D1: node {node} had WAL to {held_lsn} and gave it up for {lsn}")

    def horizon_claimed(self, lsn: int) -> None:
        """Every member has WAL up to there that no restart takes back: none of it is kept for a member."""
        for node, disk in enumerate(self.disks):
            end_lsn = scan(disk.durable, disk.control.commit_lsn)
            require(end_lsn >= lsn, f"node {node} holds whole records to {end_lsn}, the horizon is {lsn}")

    def whole_log(self, node: int, end_lsn: int) -> bytes:
        """What the node has, after what object storage has in its place."""
        start_lsn = self.disks[node].start_lsn
        return bytes(self.committed[:start_lsn] + self.disks[node].live[start_lsn:end_lsn])

    def _is_held(self, disk: SimulatedDisk, log: bytearray, lsn: int) -> bool:
        start_lsn = disk.start_lsn
        return len(disk.durable) >= lsn and disk.durable[start_lsn:lsn] == log[start_lsn:lsn]

    def elected(self, proposer: int, term: int, log: bytearray) -> None:
        require(
            self.winners.setdefault(term, proposer) == proposer,
            f"D1: proposers {self.winners[term]} and {proposer} both won term {term}",
        )
        require(scan(log, self.start_lsn) == len(log), f"the log of term {term} does not end with a record")
        needed = max((lsn for of_term, lsn in self.commits if of_term < term), default=0)
        require(
            log[:needed] == self.committed[:needed],
            f"D1: the log of term {term} (to {len(log)}) lacks or changes WAL committed up to {needed}",
        )

    def fenced(self, proposer: int, led_term: int, asked_term: int) -> None:
        """A leader that has a majority to lead is not to be stopped by promises to those who never won."""
        if self.outcomes_only:
            return
        outranking = sum(disk.control.promised_term > asked_term for disk in self.disks)
        succeeded = any(term > led_term and winner != proposer for term, winner in self.winners.items())
        require(
            succeeded or outranking >= majority(len(self.disks)),
            f"proposer {proposer}, leader of term {led_term}, is fenced, and nobody has succeeded it",
        )

    def proposer_committed(self, term: int, log: bytearray, before: int, lsn: int) -> None:
        require(lsn > before, f"commit of term {term} went from {before} to {lsn}")
        require(lsn <= len(log), f"commit {lsn} of term {term} is beyond its log")
        shared = min(lsn, len(self.committed))
        require(log[:shared] == self.committed[:shared], f"term {term} committed other bytes below {shared}")
        holders = sum(self._is_held(disk, log, lsn) for disk in self.disks)
        require(
            holders >= majority(len(self.disks)), f"D1: {lsn} of term {term} is durable at {holders} only"
        )
        require(scan(log[:lsn], max(self.boundaries & set(range(lsn + 1)))) == lsn, f"{lsn} ends no record")
        self.commits.append((term, lsn))
        self.boundaries.add(lsn)
        self.committed += log[len(self.committed) : lsn]

    def acceptor_committed(self, node: int, lsn: int) -> None:
        require(lsn <= len(self.committed), f"C3: node {node} shows {lsn}, beyond what is committed")
        require(
            self._is_held(self.disks[node], self.committed, lsn),
            f"C3: node {node} shows other bytes up to {lsn}",
        )
        known = max(boundary for boundary in self.boundaries if boundary <= lsn)
        require(scan(self.committed[:lsn], known) == lsn, f"C3: node {node} shows {lsn}, inside a record")
        self.seen_commits[node] = max(self.seen_commits[node], lsn)

    def survived(self, log: bytearray, alive: Iterable[int]) -> None:
        """After everything is healed: the final log holds all that was ever acknowledged."""
        require(log[: len(self.committed)] == self.committed, "D1: the final log lacks committed WAL")
        for node in alive:
            shared = min(len(self.disks[node].durable), len(log))
            require(self._is_held(self.disks[node], log, shared), f"node {node} still diverges")
