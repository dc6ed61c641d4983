"""A pageserver behind what is committed: branches are made at any LSN that PostgreSQL names all the same."""

import threading
from collections.abc import Iterator

import psycopg
import pytest

from excimer.base.lsn import WAL_PAGE_HEADER_SHORT_BYTES, WAL_PAGE_SIZE_BYTES, format_lsn, parse_lsn
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

LOAD = "insert into loaded select {batch}, repeat(md5(g::text), 20) from generate_series(1, 5000) g"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION) as stack:
        stack.create_main()
        stack.query("create table loaded (batch int, filler text)")
        stack.query("create table marks (number int)")
        yield stack


class Loader:
    """Commits bulk loads one after the other until it is left."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._load)
        self.failure: psycopg.Error | None = None

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _load(self) -> None:
        batch = 0
        try:
            with self._stack.connect() as connection:
                while not self._stopped.is_set():
                    connection.execute(LOAD.format(batch=batch).encode())
                    batch += 1
        except psycopg.Error as error:
            self.failure = error


def branch_at(stack: Stack, name: str, lsn: str) -> int:
    made = stack.json("timeline", "branch", "--branch-name", name, "--at", lsn)
    return parse_lsn(made["ancestor_lsn"])


def test_every_lsn_that_postgres_names_can_be_branched_from_under_load(stack: Stack) -> None:
    with Loader(stack) as loader:
        for number in range(4):
            stack.query(f"insert into marks values ({number})")
            lsn = str(stack.query("select pg_current_wal_lsn()")[0][0])
            assert branch_at(stack, f"load{number}", lsn) <= parse_lsn(lsn)
        flushed = parse_lsn(str(stack.query("select pg_current_wal_flush_lsn()")[0][0]))
        border = flushed - flushed % WAL_PAGE_SIZE_BYTES
        for offset in (0, 8, WAL_PAGE_HEADER_SHORT_BYTES):
            assert branch_at(stack, f"border{offset}", format_lsn(border + offset)) == border
        assert branch_at(stack, "within", format_lsn(border - 1000 & ~7)) == border - 1000 & ~7
        stack.query("select pg_switch_wal()")
        inserted = str(stack.query("select pg_current_wal_insert_lsn()")[0][0])
        branch_at(stack, "switched", inserted)
    assert loader.failure is None
    stack.text("endpoint", "create", "load3", "--branch-name", "load3")
    stack.text("endpoint", "start", "load3")
    assert stack.query("select array_agg(number order by number) from marks", "load3") == [([0, 1, 2, 3],)]
    stack.text("endpoint", "stop", "load3")


def test_an_lsn_within_a_record_that_nobody_finishes_is_the_end_of_the_last_whole_one(stack: Stack) -> None:
    """WAL of a transaction that stands still is written up to a page's border, within a record."""
    with stack.connect() as standing, standing.transaction():
        standing.execute(LOAD.format(batch=-1).encode())
        for number in range(2):
            lsn = str(stack.query("select pg_current_wal_lsn()")[0][0])
            assert branch_at(stack, f"standing{number}", lsn) <= parse_lsn(lsn)
