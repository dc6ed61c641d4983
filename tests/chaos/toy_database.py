"""A database of lists in memory, right or wrong in one chosen way, that makes histories for the checker."""

import random
from enum import Enum, auto

from tests.chaos.history import Append, Operation, Outcome, Read, Transaction


class Fault(Enum):
    NONE = auto()
    SNAPSHOT_ISOLATION = auto()
    """First committer wins, but what was read is not checked: write skew passes."""
    STALE_SNAPSHOT = auto()
    """Some readers are given the database as it was a while ago."""
    LOST_COMMIT = auto()
    """Some commits are acknowledged and forgotten."""
    DIRTY_READ = auto()
    """Some transactions that fail leave what they wrote."""
    TORN_COMMIT = auto()
    """Some commits put only one of their appends."""


class _Open:
    def __init__(self, number: int, client: int, begun: int, snapshot: dict[int, tuple[int, ...]]) -> None:
        self.id = number
        self.client = client
        self.begun = begun
        self.snapshot = snapshot
        self.operations: list[Operation] = []
        self.appends: dict[int, tuple[int, ...]] = {}
        self.read: set[int] = set()


class ToyDatabase:
    """Optimistic and serializable: a commit fails if what it read or wrote has changed since it began."""

    def __init__(self, chance: random.Random, fault: Fault, *, clients: int = 5, keys: int = 4) -> None:
        self._chance = chance
        self._fault = fault
        self._keys = keys
        self._clients: list[_Open | None] = [None] * clients
        self._lists: dict[int, tuple[int, ...]] = {}
        self._versions: list[dict[int, tuple[int, ...]]] = [{}]
        self._now = 0
        self._next_id = 0
        self._next_value = 0
        self._history: list[Transaction] = []

    def run(self, steps: int) -> list[Transaction]:
        """A history of `steps` steps of random clients, and a last read of every list."""
        for _ in range(steps):
            self._now += 1
            client = self._chance.randrange(len(self._clients))
            transaction = self._clients[client]
            if transaction is None:
                self._clients[client] = self._begin(client)
            elif len(transaction.operations) < self._chance.choice((1, 2, 3)):
                self._operate(transaction)
            else:
                self._end(transaction)
                self._clients[client] = None
        self._now += 1
        last = self._begin(0)
        last.operations = [Read(key, self._lists.get(key, ())) for key in range(self._keys)]
        self._record(last, Outcome.OK)
        return self._history

    def _begin(self, client: int) -> _Open:
        snapshot = self._lists
        if self._fault is Fault.STALE_SNAPSHOT and self._chance.random() < 0.1:
            snapshot = self._versions[-min(5, len(self._versions))]
        self._next_id += 1
        return _Open(self._next_id, client, self._now, dict(snapshot))

    def _operate(self, transaction: _Open) -> None:
        key = self._chance.randrange(self._keys)
        if self._chance.random() < 0.5:
            self._next_value += 1
            transaction.operations.append(Append(key, self._next_value))
            transaction.appends[key] = (*transaction.appends.get(key, ()), self._next_value)
        else:
            seen = (*transaction.snapshot.get(key, ()), *transaction.appends.get(key, ()))
            transaction.operations.append(Read(key, seen))
            transaction.read.add(key)

    def _end(self, transaction: _Open) -> None:
        checked = set(transaction.appends)
        if self._fault is not Fault.SNAPSHOT_ISOLATION:
            checked |= transaction.read
        stale = self._fault is Fault.STALE_SNAPSHOT and not transaction.appends
        if not stale and any(self._lists.get(key) != transaction.snapshot.get(key) for key in checked):
            if self._fault is Fault.DIRTY_READ and self._chance.random() < 0.2:
                self._store(transaction.appends)
            self._record(transaction, Outcome.FAILED)
            return
        draw = self._chance.random()
        if draw < 0.1:  # nobody is told how it ended
            if self._chance.random() < 0.5:
                self._store(transaction.appends)
            self._record(transaction, Outcome.UNKNOWN)
            return
        if self._fault is Fault.LOST_COMMIT and draw < 0.2:
            self._record(transaction, Outcome.OK)
            return
        appends = transaction.appends
        if self._fault is Fault.TORN_COMMIT and len(appends) > 1:
            appends = dict(list(appends.items())[:1])
        self._store(appends)
        self._record(transaction, Outcome.OK)

    def _store(self, appends: dict[int, tuple[int, ...]]) -> None:
        self._lists = dict(self._lists)
        for key, values in appends.items():
            self._lists[key] = (*self._lists.get(key, ()), *values)
        self._versions.append(self._lists)

    def _record(self, transaction: _Open, outcome: Outcome) -> None:
        self._history.append(
            Transaction(
                id=transaction.id,
                client=transaction.client,
                operations=tuple(transaction.operations),
                invoked_ns=transaction.begun * 10,
                completed_ns=self._now * 10 + 5,
                outcome=outcome,
            )
        )
