"""The one cycle that stock PostgreSQL lets pass, made on a real server: the checker knows it for what it is.

A commit is visible before its backend hands in its predicate locks, and shared invalidations lie between:
many catalog changes make that moment long enough to be met on purpose. Each list is a table of its own,
so that no page is locked by two of the transactions by chance.
"""

import contextlib
import threading
import time

import psycopg
import pytest

from excimer.io.processes import make_owned_dir
from excimer.postgres import run_initdb
from tests.chaos.clients import Connection
from tests.chaos.history import Append, Operation, Outcome, Read, Transaction
from tests.chaos.list_append import check
from tests.kit.builds import build_of
from tests.kit.directories import reachable_directory
from tests.kit.stock_server import StockServer, stock_server

ROUNDS_MAX = 40
CATALOG_CHANGES = 1000
"""More than half of the rounds end in a cycle then, on an idle machine and on a busy one."""


class Session:
    """A client whose transactions are kept as the checker wants them. List K is the table list_K."""

    def __init__(self, number: int, server: StockServer) -> None:
        self._number = number
        self.connection: Connection = psycopg.connect(
            host=str(server.socket_dir), port=server.port, user="postgres", dbname="postgres", autocommit=True
        )
        self._operations: list[Operation] = []
        self._begun = 0

    def begin(self) -> None:
        self._operations, self._begun = [], time.monotonic_ns()
        self.connection.execute("begin isolation level serializable")

    def read(self, key: int) -> tuple[int, ...]:
        rows = self.connection.execute(f"select element from list_{key}").fetchall()
        values = tuple(sorted(row[0] for row in rows))
        self._operations.append(Read(key, values))
        return values

    def append(self, key: int, value: int) -> None:
        self.connection.execute(f"insert into list_{key} values (%s)", (value,))
        self._operations.append(Append(key, value))

    def change_catalog(self) -> None:
        self.connection.execute(
            f"do $$ begin for i in 1..{CATALOG_CHANGES} loop "
            "execute format('create temp table t%s (a int)', i); execute format('drop table t%s', i); "
            "end loop; end $$"
        )

    def commit(self, id: int) -> Transaction:
        """Raises psycopg's SerializationFailure."""
        self.connection.execute("commit")
        return Transaction(
            id=id,
            client=self._number,
            operations=tuple(self._operations),
            invoked_ns=self._begun,
            completed_ns=time.monotonic_ns(),
            outcome=Outcome.OK,
        )


def one_round(
    value: int, pivot: Session, writer: Session, reader: Session, onlooker: Connection
) -> list[Transaction]:
    """Three acknowledged transactions, which append `value` and the next number. Raises SerializationFailure
    if PostgreSQL saw what they do.
    """
    ended: list[Transaction | psycopg.Error] = []

    def commit_writer() -> None:
        try:
            ended.append(writer.commit(1))
        except psycopg.Error as error:
            ended.append(error)

    pivot.begin()
    pivot.read(1)
    pivot.append(2, value + 1)
    writer.begin()
    writer.append(1, value)
    writer.change_catalog()
    committing = threading.Thread(target=commit_writer)
    committing.start()
    try:
        seen = "select exists (select from list_1 where element = %s)"
        while not onlooker.execute(seen, (value,)).fetchall()[0][0] and not ended:
            pass
        reader.begin()
        reader.read(1)
        of_pivot = pivot.commit(2)
    finally:
        committing.join()
    reader.read(2)
    of_reader = reader.commit(3)
    if isinstance(ended[0], psycopg.Error):
        raise ended[0]
    return [ended[0], of_pivot, of_reader]


@pytest.mark.parametrize("pg_version", [18])
def test_the_cycle_of_stock_postgresql_is_counted_as_its_own(pg_version: int) -> None:
    build = build_of(pg_version)
    with reachable_directory() as root:
        cluster = make_owned_dir(root / "stock") / "data"
        run_initdb(build, cluster)
        with stock_server(build, cluster, {"fsync": "off", "max_locks_per_transaction": "2000"}) as server:
            history = provoke(server)
    verdict = check(history)
    assert verdict.anomalies == []
    assert len(verdict.stock_cycles) == 1
    assert "--rw-->" in verdict.stock_cycles[0].text


def provoke(server: StockServer) -> list[Transaction]:
    """The history of the first round that PostgreSQL let pass, with a last look at both lists."""
    with contextlib.ExitStack() as closing:
        sessions = [Session(number, server) for number in range(4)]
        for session in sessions:
            closing.callback(session.connection.close)
        pivot, writer, reader, last = sessions
        onlooker = last.connection
        for key in (1, 2):
            onlooker.execute(f"create table list_{key} (element int)")
        for round_ in range(ROUNDS_MAX):
            try:
                history = one_round(10 * round_, pivot, writer, reader, onlooker)
            except psycopg.errors.SerializationFailure:
                for session in (pivot, writer, reader):
                    session.connection.execute("rollback")
                onlooker.execute("truncate list_1, list_2")
                continue
            last.begin()
            last.read(1)
            last.read(2)
            return [*history, last.commit(4)]
    raise AssertionError(f"no cycle in {ROUNDS_MAX} rounds: is a commit of stock PostgreSQL whole now?")
