"""Something is killed while a backend waits for a page: sessions see an error or wait, and never wrong data.

Printed (`-s`): how long after the kill the endpoint answered again, rightly.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

ROWS = 100_000
SCAN = "select count(*), sum(hashtext(b)::int8) from pages"
STILL_LOOKS = 5
ACTIVE = "select state from pg_stat_activity where pid = %s"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1) as stack:
        config = stack.directory / "config.toml"
        config.write_text(f"prefetch_max_mib = 0\n{config.read_text()}")
        stack.create_main()
        stack.query(f"create table pages as select a, md5(a::text) b from generate_series(1, {ROWS}) a")
        yield stack


class Scan:
    """Of a table of which no page is here, in a session of its own; `result` or `error` when it has ended."""

    def __init__(self, stack: Stack) -> None:
        self._connection = stack.connect()
        self.backend = self._connection.info.backend_pid
        self.result: list[tuple[object, ...]] | None = None
        self.error: psycopg.Error | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._connection.execute(SCAN.encode()).fetchall()
        except psycopg.Error as error:
            self.error = error
        finally:
            self._connection.close()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join(120)
        assert self.is_over


def waits(scan: Scan, watching: "psycopg.Connection[tuple[object, ...]]") -> Callable[[], bool]:
    """True when a backend has a statement, and has been asleep without using a core for some looks."""
    looks: list[list[str]] = []

    def look() -> bool:
        fields = Path(f"/proc/{scan.backend}/stat").read_text().rpartition(")")[2].split()
        looks.append([fields[0], *fields[11:13]])
        is_still = looks[-STILL_LOOKS:] == [["S", *fields[11:13]]] * STILL_LOOKS
        return is_still and watching.execute(ACTIVE, (scan.backend,)).fetchall() == [("active",)]

    return look


def kill(stack: Stack, victim: str, scan: Scan) -> None:
    if victim == "manager":
        stack.kill("endpoint-main")
        return
    pid = {
        "postgres": lambda: stack.postmaster_pid(),
        "backend": lambda: scan.backend,
        "compute-node": lambda: stack.pid("compute-node"),
        "pageserver": lambda: stack.pid("pageserver"),
    }[victim]()
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["backend", "postgres", "manager", "compute-node", "pageserver"])
def test_who_waits_for_a_page_gets_it_or_an_error(stack: Stack, victim: str) -> None:
    expected = stack.query(SCAN)
    stack.stop_and_forget()
    stack.text("endpoint", "start", "main")
    pageserver = stack.pid("pageserver")
    scan = Scan(stack)
    watching = stack.connect()
    watching.execute(ACTIVE, (scan.backend,))  # what that needs is here from now on
    os.kill(pageserver, signal.SIGSTOP)
    try:
        scan.start()
        stack.wait_until(waits(scan, watching), "a backend that waits for a page")
        assert not scan.is_over
        killed_s = time.monotonic()
        kill(stack, victim, scan)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pageserver, signal.SIGCONT)
        watching.close()
    if victim == "manager":
        stack.text("endpoint", "start", "main")
    scan.wait()
    if victim in ("compute-node", "pageserver"):
        assert scan.error is None, scan.error
        assert scan.result == expected
    else:
        assert isinstance(scan.error, psycopg.OperationalError)
    answers: list[list[tuple[object, ...]]] = []

    def has_answered() -> bool:
        try:
            answers.append(stack.query(SCAN))
        except psycopg.Error:
            return False
        return True

    stack.wait_until(has_answered, "an answer")
    print(f"{victim}: the right answer {time.monotonic() - killed_s:.2f} s after the kill")
    assert answers == [expected]
    stack.wait_until(lambda: stack.run("status").returncode == 0, "all services")
