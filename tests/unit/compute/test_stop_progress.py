"""A shutdown is waited for while it gets on, and no longer."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from excimer.compute.stop_progress import (
    STILL_S,
    StopBeat,
    StopProgress,
    StopSigns,
    checkpointer_work,
)

STILL = StopSigns(4, (7, 100), 1000, True)


def patience(signs: list[StopSigns]) -> list[bool]:
    """One look in each third of the time that nothing may move."""
    progress = StopProgress(0.0)
    return [progress.may_go_on(each, (number + 1) * STILL_S / 3) for number, each in enumerate(signs)]


@pytest.mark.parametrize(
    ("moving", "goes_on"),
    [
        (lambda step: STILL._replace(work=(7, 100 + step)), True),
        (lambda step: STILL._replace(commit_lsn=1000 + step), True),
        (lambda step: STILL._replace(process_count=100 - step), True),
        (lambda _: STILL, False),
        (lambda step: STILL._replace(work=(7, 100 + step), has_majority=False), False),
        (lambda step: STILL._replace(process_count=4 + step), False),
        (lambda step: STILL._replace(process_count=4 + step % 2), False),
    ],
    ids=["checkpoint", "quorum", "sessions end", "nothing", "no majority", "clients come", "come and go"],
)
def test_what_is_progress(moving: object, goes_on: bool) -> None:
    assert callable(moving)
    assert all(patience([moving(step) for step in range(30)])) is goes_on


def test_it_is_given_up_once_nothing_has_moved_for_the_time() -> None:
    worked = [STILL._replace(work=(7, step)) for step in range(3)]
    assert patience([*worked, *[worked[-1]] * 4]) == [True] * 5 + [False] * 2


@contextmanager
def checkpointer(directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is called so, and writes whenever it is told to."""
    program = "import sys\nfor line in sys.stdin.buffer: open(sys.argv[1], 'ab').write(line * 1000)"
    with subprocess.Popen(
        ["postgres: main: checkpointer ", "-c", program, str(directory / "written")],
        executable=sys.executable,
        stdin=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_checkpointer_is_found_by_its_title_and_its_writes_are_seen(tmp_path: Path) -> None:
    with checkpointer(tmp_path) as process, subprocess.Popen(["sleep", "60"]) as other:
        try:
            assert process.stdin is not None
            before = checkpointer_work([other.pid, process.pid])
            assert before[0] == process.pid
            deadline = time.monotonic() + 60
            while checkpointer_work([other.pid, process.pid]) == before:
                assert time.monotonic() < deadline
                process.stdin.write(b"a page\n")
                process.stdin.flush()
                time.sleep(0.01)
        finally:
            other.kill()
    assert checkpointer_work([os.getpid(), process.pid]) == ()


def test_the_beat_changes_whenever_something_has_moved(tmp_path: Path) -> None:
    beat = StopBeat()
    beat.move(1.0)
    beat.path = tmp_path / "stopping"
    said = []
    for moved_s in (1.0, 2.0, 2.0, 3.0):
        beat.move(moved_s)
        said.append(beat.path.read_text() if beat.path.exists() else None)
    assert said[0] is None
    assert said[1] == said[2] != said[3]
    assert beat.moved_s == 3.0
    beat.end()
    beat.end()
    assert not beat.path.exists()
