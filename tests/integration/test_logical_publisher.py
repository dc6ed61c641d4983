"""An endpoint as a publisher: consumers of its changes miss none, and get none that the branch does not have.

EXCIMER_PUBLISHER_VERSIONS chooses the versions.
"""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator

import psycopg
import pytest

from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

VERSIONS = tuple(map(int, os.environ.get("EXCIMER_PUBLISHER_VERSIONS", str(NEWEST_VERSION)).split(",")))
TAKE = "select data from pg_logical_slot_get_changes('mine', null, null)"
PEEK = "select data from pg_logical_slot_peek_changes('mine', null, null)"


@pytest.fixture(scope="module", params=VERSIONS)
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with running_stack(request.param, safekeepers=1) as stack:
        stack.text("tenant", "create", "--set-default")
        stack.text("endpoint", "create", "main", "--set", "wal_level=logical")
        stack.text("endpoint", "start", "main")
        stack.query("create table log (a int)")
        stack.query("select pg_create_logical_replication_slot('mine', 'test_decoding')")
        yield stack


def rows_in(changes: list[tuple[object, ...]]) -> list[int]:
    """The rows that were inserted, in the order of their commits."""
    texts = [str(row[0]) for row in changes]
    return [int(text.rpartition(":")[2]) for text in texts if text.startswith("table public.log: INSERT")]


def test_what_no_quorum_has_is_not_decoded(stack: Stack) -> None:
    """It could be lost, and the consumer would have it, or be ahead of what comes in its place."""
    stack.query("insert into log values (1)")
    assert rows_in(stack.query(TAKE)) == [1]
    safekeeper = stack.pid("safekeeper-1")
    written = "select pg_current_wal_flush_lsn()"

    def insert() -> None:
        with contextlib.suppress(psycopg.Error):
            stack.query("insert into log values (2)")

    with stack.connect() as consumer:
        before = consumer.execute(written).fetchone()
        os.kill(safekeeper, signal.SIGSTOP)
        writing = threading.Thread(target=insert)
        try:
            writing.start()
            stack.wait_until(lambda: consumer.execute(written).fetchone() != before, "WAL on the local disk")
            consumer.execute("set statement_timeout = '1s'")
            with pytest.raises(psycopg.Error):
                consumer.execute(PEEK).fetchall()
        finally:
            os.kill(safekeeper, signal.SIGCONT)
        writing.join()
        consumer.execute("reset statement_timeout")
        assert rows_in(consumer.execute(TAKE).fetchall()) == [2]


SLOTS = "select slot_name from pg_replication_slots where slot_name in ('followed', 'forgotten')"
WRITE_16_MIB = (
    "select pg_logical_emit_message(false, 'bulk', repeat('x', 1 << 20)) from generate_series(1, 16)"
)


def test_a_forgotten_slot_does_not_hold_wal_for_ever(stack: Stack) -> None:
    """One with a consumer may hold more. What is said is in status."""
    config = stack.directory / "config.toml"
    before = config.read_text()
    config.write_text(f"slot_wal_max_mib = 24\n{before}")
    stack.text("endpoint", "stop", "main")
    stack.text("endpoint", "start", "main")
    config.write_text(before)
    for name in ("followed", "forgotten"):
        stack.query(f"select pg_create_logical_replication_slot('{name}', 'test_decoding')")
    consumer = stack.program(
        "pg_recvlogical", "-d", "postgres", "--slot", "followed", "--start", "-f", "-", "--no-loop"
    )
    try:
        reading = "select active from pg_replication_slots where slot_name = 'followed'"
        stack.wait_until(lambda: stack.query(reading) == [(True,)], "the consumer")
        os.kill(consumer.pid, signal.SIGSTOP)  # it is there, and confirms nothing
        stack.query(WRITE_16_MIB)
        stack.wait_until(lambda: "slot_wal_max_mib" in stack.run("status").stdout, "the warning")
        assert {name for (name,) in stack.query(SLOTS)} == {"followed", "forgotten"}
        stack.query(WRITE_16_MIB)
        told = re.compile(r"gone: .*forgotten \(\d\d MiB\).* needs a new slot")
        stack.wait_until(lambda: told.search(stack.run("status").stdout) is not None, "what is told of it")
        assert stack.query(SLOTS) == [("followed",)]
    finally:
        os.kill(consumer.pid, signal.SIGCONT)
        consumer.terminate()
        consumer.communicate(timeout=60)
