"""Full disks of a whole installation: nothing ends, commits wait, it is said, and all goes on by itself.

Each disk is a small file system in memory, mounted over a part's directory; without the right to mount, these
are skipped.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.base.lsn import Lsn, parse_lsn
from tests.kit import tpcb
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack
from tests.kit.stack_truth import Branch, arrive, branch_of

WAIT_S = 60
ROWS = 20
NO_ROOM = "No space left on device"


@contextlib.contextmanager
def small_disk(directory: Path, size_mib: int) -> Iterator[None]:
    """In the place of a directory, with what it has."""
    owner = directory.stat()
    kept = directory.with_name(directory.name + ".kept")
    shutil.copytree(directory, kept, symlinks=True)
    options = f"size={size_mib}m,mode={owner.st_mode & 0o777:o}"
    command = ["mount", "-t", "tmpfs", "-o", options, "excimer-test", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        shutil.rmtree(kept)
        pytest.skip("this needs the right to mount a file system")
    try:
        shutil.copytree(kept, directory, symlinks=True, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        shutil.rmtree(kept)


def fill(directory: Path, name: str = "filler") -> Path:
    """All that is left, to the last block."""
    filler = directory / name
    with filler.open("wb", buffering=0) as file:
        for step in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(step)) == step:
                    continue
    return filler


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1) as stack:
        stack.create_main()
        stack.query("create table counters (number int, filler text)")
        stack.query(f"insert into counters select g, 'x' from generate_series(1, {ROWS}) g")
        yield stack


class Counter:
    """Adds to rows in one transaction after the other; as vacuumed, that extends no relation."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._add)
        self.count = 0
        self.failure: psycopg.Error | None = None

    def __enter__(self) -> "Counter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def _add(self) -> None:
        try:
            with self._stack.connect() as connection:
                while not self._stopped.is_set():
                    connection.execute("update counters set number = number + 1 where number > 0")
                    self.count += 1
        except psycopg.Error as error:
            self.failure = error


def said_of(stack: Stack, part: str, directory: Path) -> bool:
    """Whether `excimer status` names the full disk."""
    rows = {row["part"]: row for row in stack.json("status")["parts"]}
    return any(f"the disk of {directory} is full" in warning for warning in rows[part]["warnings"])


def health(address: str) -> tuple[str, str]:
    """What /healthz calls it, and what /metrics say."""
    with urllib.request.urlopen(f"http://{address}/healthz", timeout=10) as answer:
        status = str(json.loads(answer.read())["status"])
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return status, answer.read().decode()


def check_waits(stack: Stack, part: str, directory: Path, address: str) -> None:
    """While the disk is full, commits wait and it is said; then they go on, and nothing has ended."""
    postmaster = stack.postmaster_pid()
    before = int(stack.query("select sum(number) from counters")[0][0])
    with Counter(stack) as counter:
        stack.wait_until(lambda: counter.count > 10, "commits happen")
        filler = fill(directory)
        try:
            stack.wait_until(lambda: said_of(stack, part, directory), "status says it")
            stack.wait_until(lambda: _stands(counter), "commits wait")
            status, metrics = health(address)
            assert status == "degraded"
            assert f'excimer_disk_full{{path="{directory}"}} 1.0' in metrics
            assert f"the disk of {directory} is full" in stack.run("doctor").stdout.replace("\n", "")
        finally:
            filler.unlink()
        stood = counter.count
        stack.wait_until(lambda: counter.count > stood + 10, "commits go on")
    assert counter.failure is None
    assert stack.postmaster_pid() == postmaster
    after = int(stack.query("select sum(number) from counters")[0][0])
    assert after - before == counter.count * ROWS
    stack.wait_until(lambda: not said_of(stack, part, directory), "status says it no more")


def _stands(counter: Counter) -> bool:
    before = counter.count
    counter._stopped.wait(1)
    return counter.count == before


def test_a_compute_waits_for_room_for_its_wal(stack: Stack) -> None:
    stack.text("endpoint", "stop", "main")
    directory = stack.directory / "endpoints" / "main"
    with small_disk(directory, 200):
        stack.text("endpoint", "start", "main")
        endpoint = stack.endpoint("main")
        check_waits(stack, "endpoint-main", directory, f"127.0.0.1:{endpoint['http_port']}")
        assert "no space left for WAL" in (directory / "postgres.log").read_text()
        stack.text("endpoint", "stop", "main")


def test_a_safekeeper_waits_for_room(stack: Stack) -> None:
    stack.text("stop")
    directory = stack.directory / "safekeepers" / "1"
    with small_disk(directory, 100):
        stack.text("start")
        stack.text("endpoint", "start", "main")
        rows = {row["part"]: row for row in stack.json("status")["parts"]}
        check_waits(stack, "safekeeper-1", directory, rows["safekeeper-1"]["http"])
        stack.text("stop")


FLUSH_BYTES = 1 << 20
"""So that pgbench has the pageserver flush every second or so."""


@contextlib.contextmanager
def kept_full(directory: Path) -> Iterator[None]:
    """However much its user removes: a pageserver gives up copies of layers to make room."""
    stopped = threading.Event()

    def keep() -> None:
        with contextlib.ExitStack() as fillers:
            while not stopped.is_set():
                filler = fill(directory, f"filler-{time.monotonic_ns()}")
                fillers.callback(filler.unlink)
                stopped.wait(0.2)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def transactions(stack: Stack) -> int:
    return int(stack.query("select count(*) from pgbench_history")[0][0])


def test_a_pageserver_keeps_what_comes_in_memory_and_goes_on(stack: Stack) -> None:
    """Under pgbench: nothing can be flushed, reads and commits go on, and with room all becomes durable."""
    stack.text("stop")
    directory = stack.directory / "pageserver"
    with small_disk(directory, 160):
        stack.text("start")
        stack.text("endpoint", "start", "main")
        branch = branch_of(stack)
        branch.configure(flush_size_bytes=FLUSH_BYTES)
        tpcb.load(stack, 1)
        rows = {row["part"]: row for row in stack.json("status")["parts"]}
        address, pid = rows["pageserver"]["http"], stack.pid("pageserver")
        load = stack.program("pgbench", "-n", "-c", "4", "-T", "600")
        try:
            with kept_full(directory):
                stack.wait_until(lambda: said_of(stack, "pageserver", directory), "status says it")
                status, metrics = health(address)
                assert status == "degraded"
                assert f'excimer_disk_full{{path="{directory}"}} 1.0' in metrics
                assert f"the disk of {directory} is full" in stack.run("doctor").stdout.replace("\n", "")
                stack.wait_until(lambda: NO_ROOM in pageserver_log(stack), "a flush finds no room")
                stack.wait_until(lambda: commits_without_flush(stack, branch), "commits without a flush")
                durable_lsn = durable(branch)
            stack.wait_until(lambda: durable(branch) > durable_lsn, "flushes go on by themselves")
            stack.wait_until(lambda: not said_of(stack, "pageserver", directory), "status says it no more")
        finally:
            load.send_signal(signal.SIGINT)
            load.communicate(timeout=WAIT_S)
        assert stack.pid("pageserver") == pid
        before = tpcb.check(stack)
        lsn = flushed(stack)
        arrive(branch, lsn)
        branch.flush()
        assert durable(branch) >= lsn
        stack.stop_and_forget()
        stack.text("endpoint", "start", "main")
        assert tpcb.check(stack) == before, "what the compute had is what the pageserver has"
        stack.text("stop")


def commits_without_flush(stack: Stack, branch: Branch) -> bool:
    """Whether the pageserver has made nothing durable while WAL for three flushes was committed.

    While it still has copies of layers to give up, the room of one may serve a flush before the filler.
    """
    durable_lsn, written = durable(branch), transactions(stack)
    end = flushed(stack) + 3 * FLUSH_BYTES
    stack.wait_until(lambda: flushed(stack) > end and transactions(stack) > written, "commits go on")
    return durable(branch) == durable_lsn


def flushed(stack: Stack) -> Lsn:
    return parse_lsn(stack.query("select pg_current_wal_flush_lsn()::text")[0][0])


def durable(branch: Branch) -> Lsn:
    return parse_lsn(branch.at_pageserver()["remote_consistent_lsn"])


def pageserver_log(stack: Stack) -> str:
    return (stack.directory / "logs" / "pageserver.log").read_text()
