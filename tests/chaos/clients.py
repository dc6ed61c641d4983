"""Clients that write and read while things break, and keep what they were told.

Each is a thread with a connection of its own, made anew when it breaks. A transaction is acknowledged only
if its COMMIT was; it failed for certain only if COMMIT was never sent or the database refused it by an
error that undoes it (SQLSTATE classes 23, 25 and 40); all else is unknown.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from tests.chaos.history import Append, HistoryFile, Operation, Outcome, Read, Transaction

Connection = psycopg.Connection[tuple[Any, ...]]
Connect = Callable[[], Connection]

RECONNECT_PAUSE_S = 0.05
PAUSE_S = 0.004
"""Between transactions: the checker's work grows with their number, what it finds with their overlap."""

KEYS_AT_ONCE = 6
APPENDS_PER_KEY = 60
TABLES = 3
CATALOG_CHANGES = (12, 12, 12, 12, 12, 12, 12, 200)
"""Tables that are made and dropped; with many, the commit is visible long before it is over."""
CATALOG_SHARE = 0.02
"""Of transactions that also make and drop tables: their commits take longest."""

ACCOUNTS = 12
FIRST_BALANCE = 1000


class Counters:
    """Shared by all clients of a run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = Counter[str]()
        self._key_appends = Counter[int]()
        self._first_key = 0
        self.acknowledged = 0
        """All commits of all clients: what a run watches for progress."""

    def next(self, what: str) -> int:
        with self._lock:
            self._next[what] += 1
            return self._next[what]

    def count_commit(self) -> None:
        with self._lock:
            self.acknowledged += 1

    def key(self, chance: random.Random) -> int:
        """One of the keys that are in use now."""
        with self._lock:
            return self._first_key + chance.randrange(KEYS_AT_ONCE)

    def count_append(self, key: int) -> None:
        """Long lists are slow to read and judge: the oldest key goes out of use when it is full."""
        with self._lock:
            self._key_appends[key] += 1
            while self._key_appends[self._first_key] >= APPENDS_PER_KEY:
                self._first_key += 1

    @property
    def keys_used(self) -> int:
        with self._lock:
            return self._first_key + KEYS_AT_ONCE


class Client(threading.Thread):
    """Runs `_transaction` again and again until told to stop."""

    def __init__(self, name: str, connect: Connect, counters: Counters, chance: random.Random) -> None:
        super().__init__(name=name, daemon=True)
        self._connect = connect
        self._counters = counters
        self._chance = chance
        self._stopping = threading.Event()
        self.crash: BaseException | None = None
        """A fault of the client itself."""

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    connection = self._connect()
                except psycopg.Error:
                    self._stopping.wait(RECONNECT_PAUSE_S)
                    continue
                self._use(connection)
        except BaseException as error:
            self.crash = error
            raise

    def _use(self, connection: Connection) -> None:
        connection.autocommit = False
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        try:
            while not self._stopping.is_set() and not connection.closed:
                self._transaction(connection)
                self._stopping.wait(self._chance.expovariate(1 / PAUSE_S))
        finally:
            connection.close()

    def _transaction(self, connection: Connection) -> None:
        raise NotImplementedError

    def _commit(self, connection: Connection) -> tuple[Outcome, str | None]:
        """Asks for the commit; the connection can be used again, or is closed."""
        try:
            connection.commit()
        except psycopg.Error as error:
            outcome = Outcome.FAILED if (error.sqlstate or "")[:2] in ("23", "25", "40") else Outcome.UNKNOWN
            self._undo(connection)
            return outcome, _describe(error)
        self._counters.count_commit()
        return Outcome.OK, None

    @staticmethod
    def _undo(connection: Connection) -> None:
        try:
            connection.rollback()
        except psycopg.Error:
            connection.close()


class ListClient(Client):
    """Appends to lists and reads them; every transaction goes into the history."""

    def __init__(
        self, number: int, connect: Connect, counters: Counters, chance: random.Random, history: HistoryFile
    ) -> None:
        super().__init__(f"lists-{number}", connect, counters, chance)
        self._number = number
        self._history = history

    def _transaction(self, connection: Connection) -> None:
        number = self._counters.next("transaction")
        operations: list[Operation] = []
        said: str | None
        begun = time.monotonic_ns()
        try:
            for _ in range(self._chance.randint(1, 4)):
                operations.append(self._operate(connection))
            if self._chance.random() < CATALOG_SHARE:
                _change_catalog(connection, number, self._chance.choice(CATALOG_CHANGES))
        except psycopg.Error as error:
            outcome, said = Outcome.FAILED, _describe(error)
            self._undo(connection)
        else:
            outcome, said = self._commit(connection)
        self._history.add(
            Transaction(
                id=number,
                client=self._number,
                operations=tuple(operations),
                invoked_ns=begun,
                completed_ns=time.monotonic_ns(),
                outcome=outcome,
                error=said,
            )
        )

    def _operate(self, connection: Connection) -> Operation:
        key = self._counters.key(self._chance)
        if self._chance.random() < 0.5:
            return Read(key, read_list(connection, key))
        value = self._counters.next("value")
        table = key % TABLES
        connection.execute(
            f"insert into lists_{table} as old values (%s, array[%s]) "
            "on conflict (key) do update set elements = old.elements || excluded.elements",
            (key, value),
        )
        self._counters.count_append(key)
        return Append(key, value)


class BankClient(Client):
    """Moves money between accounts, and reads the total, which never changes."""

    def __init__(self, number: int, connect: Connect, counters: Counters, chance: random.Random) -> None:
        super().__init__(f"bank-{number}", connect, counters, chance)
        self.outcomes: dict[int, Outcome] = {}
        """Of each transfer, by its id."""
        self.wrong_totals: list[int] = []

    def _transaction(self, connection: Connection) -> None:
        if self._chance.random() < 0.3:
            self._read_total(connection)
        else:
            self._transfer(connection)

    def _read_total(self, connection: Connection) -> None:
        try:
            total = int(connection.execute("select sum(balance) from accounts").fetchall()[0][0])
        except psycopg.Error:
            self._undo(connection)
            return
        outcome, _ = self._commit(connection)
        if outcome is Outcome.OK and total != ACCOUNTS * FIRST_BALANCE:
            self.wrong_totals.append(total)

    def _transfer(self, connection: Connection) -> None:
        number = self._counters.next("transfer")
        source, target = self._chance.sample(range(ACCOUNTS), 2)
        amount = self._chance.randint(1, 50)
        change = "update accounts set balance = balance + %s where id = %s"
        try:
            connection.execute(change, (-amount, source))
            connection.execute(change, (amount, target))
            connection.execute(
                "insert into transfers values (%s, %s, %s, %s)", (number, source, target, amount)
            )
        except psycopg.Error:
            self.outcomes[number] = Outcome.FAILED
            self._undo(connection)
            return
        self.outcomes[number], _ = self._commit(connection)


def create_tables(connection: Connection) -> None:
    """On an empty database; autocommit."""
    for table in range(TABLES):
        connection.execute(f"create table lists_{table} (key int primary key, elements int[] not null)")
    connection.execute("create table accounts (id int primary key, balance int not null)")
    connection.execute("create table transfers (id int primary key, source int, target int, amount int)")
    connection.execute(
        "insert into accounts select id, %s from generate_series(0, %s) id", (FIRST_BALANCE, ACCOUNTS - 1)
    )


def read_list(connection: Connection, key: int) -> tuple[int, ...]:
    rows = connection.execute(f"select elements from lists_{key % TABLES} where key = %s", (key,)).fetchall()
    return tuple(rows[0][0]) if rows else ()


def read_all_lists(connection: Connection, counters: Counters, history: HistoryFile) -> None:
    """The history's last transactions: after them every acknowledged append must have been seen."""
    for first in range(0, counters.keys_used, 20):
        begun = time.monotonic_ns()
        keys = range(first, min(first + 20, counters.keys_used))
        with connection.transaction():
            reads = tuple(Read(key, read_list(connection, key)) for key in keys)
        history.add(
            Transaction(
                id=counters.next("transaction"),
                client=-1,
                operations=reads,
                invoked_ns=begun,
                completed_ns=time.monotonic_ns(),
                outcome=Outcome.OK,
            )
        )


def check_bank(connection: Connection, clients: Sequence[BankClient]) -> list[str]:
    """What is wrong with the bank at the end: lost or invented transfers, balances that do not add up."""
    outcomes = {number: outcome for client in clients for number, outcome in client.outcomes.items()}
    rows = connection.execute("select id, source, target, amount from transfers").fetchall()
    found = {int(row[0]) for row in rows}
    balances = dict.fromkeys(range(ACCOUNTS), FIRST_BALANCE)
    for _, source, target, amount in rows:
        balances[source] -= amount
        balances[target] += amount
    stored: dict[int, int] = dict(connection.execute("select id, balance from accounts").fetchall())
    wrong = []
    lost = sorted(
        number for number, outcome in outcomes.items() if outcome is Outcome.OK and number not in found
    )
    if lost:
        wrong.append(f"{len(lost)} acknowledged transfers are lost: {lost[:10]}")
    undead = sorted(number for number in found if outcomes.get(number, Outcome.FAILED) is Outcome.FAILED)
    if undead:
        wrong.append(f"{len(undead)} transfers that failed are there: {undead[:10]}")
    if stored != balances:
        wrong.append(f"balances are {stored}, the transfers say {balances}")
    totals = [total for client in clients for total in client.wrong_totals]
    if totals:
        wrong.append(f"totals were read that never were: {totals[:10]}")
    return wrong


def _change_catalog(connection: Connection, number: int, tables: int) -> None:
    connection.execute(
        f"do $$ begin for i in 1..{tables} loop "
        f"execute format('create table passing_{number}_%s (id int primary key, name text)', i); "
        f"execute format('drop table passing_{number}_%s', i); end loop; end $$"
    )


def _describe(error: psycopg.Error) -> str:
    return f"{error.sqlstate or 'connection'}: {str(error).strip().splitlines()[0] if str(error) else ''}"
