"""Full disks of a whole installation: nothing ends, commits wait, it is said, and all goes on by itself.

Each disk is a small file system in memory, mounted over a part's directory; without the right to mount, these
are skipped.
"""

import contextlib
import json
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

WAIT_S = 60
ROWS = 20


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


def fill(directory: Path) -> Path:
    """All that is left, to the last block."""
    filler = directory / "filler"
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
