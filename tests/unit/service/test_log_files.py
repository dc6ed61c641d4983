"""Logs that cannot fill a disk: repeats are counted, files are cut while they are written."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from excimer.service.log_files import LogRotation, numbered, open_log, rotate
from excimer.service.log_limit import EVENTS_MAX, LogLimit, Withheld
from excimer.service.logs import configure_logging, get_logger

EVENT = ("info", "test", "it happened")


def test_a_burst_is_written_and_the_rest_is_counted() -> None:
    limit = LogLimit(lines_max=3, window_s=10)
    assert [limit.admits(EVENT, 100 + step) for step in range(5)] == [True, True, True, False, False]
    assert limit.take_due(109) == []
    assert limit.next_due() == 110
    assert limit.take_due(110) == [Withheld(EVENT, 2)]
    assert limit.next_due() is None
    assert limit.admits(EVENT, 111)
    other = ("info", "test", "something else")
    assert all(limit.admits(other, 200 + 20 * step) for step in range(100)), "a rare event is never withheld"


def test_memory_is_bounded_whatever_the_events_are() -> None:
    limit = LogLimit(lines_max=1, window_s=10)
    for number in range(EVENTS_MAX * 3):
        assert limit.admits(("info", "test", str(number)), number / 1000)
    assert len(limit._windows) <= EVENTS_MAX
    assert limit.admits(("info", "test", "later"), 1000)
    assert len(limit._windows) == 1


def test_the_log_says_how_often_something_was_repeated() -> None:
    stream = io.StringIO()
    configure_logging("test", "debug", stream=stream, limit=LogLimit(lines_max=5, window_s=0.2))
    try:
        log = get_logger("excimer.somewhere")

        def flood() -> None:
            for number in range(500):
                log.warning("flood", number=number)

        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(30):
            log.debug("detail", number=number)
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 20
        while _told(stream) < 2000 and time.monotonic() < deadline:
            time.sleep(0.05)  # nobody writes: the count comes by itself
        assert _told(stream) == 2000
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert sum(line["event"] == "detail" for line in lines) == 30
        assert len(lines) < 100
    finally:
        configure_logging("test", "warning", as_json=False)


def _told(stream: io.StringIO) -> int:
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return sum(line.get("repeated", 1) for line in lines if line["event"] == "flood")


def test_a_count_is_told_at_the_end_of_the_process() -> None:
    code = """
from excimer.service.logs import configure_logging, get_logger
configure_logging("test")
for _ in range(1000):
    get_logger("x").error("again")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert sum(line.get("repeated", 1) for line in lines) == 1000
    assert len(lines) < 50


def test_a_log_is_cut_under_the_hands_of_who_writes_it(tmp_path: Path) -> None:
    """Children that inherited it, and C's own writes, go on in the short file."""
    path = tmp_path / "part.log"
    descriptor = open_log(path)
    code = "import sys\nfor line in sys.stdin:\n    sys.stderr.write(line)\n    sys.stderr.flush()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=descriptor, text=True
    ) as child:
        assert child.stdin is not None
        for generation in range(6):
            text = f"generation {generation} " + "x" * 2000 + "\n"
            child.stdin.write(text)
            child.stdin.flush()
            deadline = time.monotonic() + 30
            while path.stat().st_size < len(text):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.write(descriptor, b"the parent too\n")
            assert rotate(path, 1500, kept=3)
            assert path.stat().st_size == 0
        child.stdin.close()
    os.close(descriptor)
    assert not rotate(path, 1500)
    for number, generation in ((1, 5), (2, 4), (3, 3)):
        kept = numbered(path, number)
        assert kept.read_text().startswith(f"generation {generation} ")
        assert kept.read_text().endswith("the parent too\n")
        assert kept.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "part.log",
        "part.log.1",
        "part.log.2",
        "part.log.3",
    ]


def test_after_a_flood_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a" * 5000 + b"the end")
    assert rotate(path, 1000)
    assert numbered(path, 1).read_bytes() == b"a" * 1993 + b"the end"


def test_a_log_that_cannot_be_copied_is_cut_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a" * 5000)
    numbered(path, 1).mkdir()
    (numbered(path, 1) / "x").touch()
    with pytest.raises(OSError, match="directory"):
        rotate(path, 1000, kept=1)
    assert path.stat().st_size == 0


def test_a_thread_looks_after_the_files(tmp_path: Path) -> None:
    path, missing = tmp_path / "log", tmp_path / "missing"
    path.write_bytes(b"a" * 5000)
    failures: list[tuple[Path, OSError]] = []
    rotation = LogRotation(
        [missing, path],
        size_max=1000,
        interval_s=0.02,
        failed=lambda path, error: failures.append((path, error)),
    )
    deadline = time.monotonic() + 20
    while path.stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    rotation.stop()
    assert failures == []
    assert numbered(path, 1).stat().st_size == 2000


def test_a_fork_writes_although_a_thread_was_in_the_middle_of_a_line() -> None:
    """That thread is not in the fork, so that nobody would let go of what it holds; nor is the one of the
    counts, which are told in the fork all the same.
    """
    code = """
import os, signal, sys, threading, time
from excimer.service.log_limit import LogLimit
from excimer.service.logs import configure_logging, get_logger

class Slow:
    def write(self, text):
        entered.set()
        time.sleep(0.2)
    def flush(self):
        pass

entered = threading.Event()
configure_logging("test", stream=Slow(), limit=LogLimit(lines_max=1, window_s=3600))
log = get_logger("x")
log.warning("counted")
log.warning("counted")
entered.clear()
threading.Thread(target=lambda: log.warning("slowly")).start()
entered.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    configure_logging("fork", limit=LogLimit(lines_max=1, window_s=0.1))
    log.warning("flood")
    log.warning("flood")
    while threading.active_count() > 1:
        time.sleep(0.01)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"the fork waited for ever: {done.stderr}"
    assert [json.loads(line).get("repeated", 1) for line in done.stderr.splitlines()] == [1, 1]
