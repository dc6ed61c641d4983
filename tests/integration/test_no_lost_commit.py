"""No acknowledged commit is ever lost, while processes are killed at random (D1, H2)."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

WRITERS = 4
CHAOS_S = 60
PAUSE_S = (0.3, 2.0)


class Writer(threading.Thread):
    """Inserts its own ids one by one and remembers which were acknowledged."""

    def __init__(self, stack: Stack, number: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._stack = stack
        self._next_id = number * 10_000_000
        self._stop_event = stop
        self.acknowledged: list[int] = []
        self.attempted: set[int] = set()

    def run(self) -> None:
        while not self._stop_event.is_set():
            with contextlib.suppress(psycopg.Error), self._stack.connect() as connection:
                self._write(connection)
            time.sleep(0.1)

    def _write(self, connection: "psycopg.Connection[tuple[object, ...]]") -> None:
        while not self._stop_event.is_set():
            self._next_id += 1
            self.attempted.add(self._next_id)
            connection.execute("insert into acknowledged values(%s)", (self._next_id,))
            self.acknowledged.append(self._next_id)


def kill_at_random(stack: Stack, chance: random.Random, seconds: float) -> list[str]:
    """Kills one part after another, never two safekeepers for good; `excimer start` brings them back."""
    parts = [
        "safekeeper-1",
        "safekeeper-2",
        "safekeeper-3",
        "pageserver",
        "postgres",
        "broker",
        "endpoint-main",
    ]
    killed = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        victims = chance.sample(parts, chance.choice((1, 1, 2)))
        for victim in victims:
            if victim == "postgres":
                with contextlib.suppress(StopIteration, OSError):
                    os.kill(stack.postmaster_pid(), signal.SIGKILL)
            else:
                stack.kill(victim)
        killed += victims
        time.sleep(chance.uniform(*PAUSE_S))
        stack.text("start")
        if "endpoint-main" in victims:
            stack.text("endpoint", "start", "main")
        time.sleep(chance.uniform(*PAUSE_S))
    return killed


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION) as stack:
        stack.create_main()
        yield stack


def test_every_acknowledged_commit_is_there(stack: Stack) -> None:
    seed = int(os.environ.get("EXCIMER_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"rerun with EXCIMER_SEED={seed}")
    stack.query("create table acknowledged(id bigint primary key)")
    stop = threading.Event()
    writers = [Writer(stack, number, stop) for number in range(1, WRITERS + 1)]
    for writer in writers:
        writer.start()
    killed = kill_at_random(stack, random.Random(seed), CHAOS_S)
    stop.set()
    stack.text("start")
    stack.text("endpoint", "start", "main")
    stack.wait_until(lambda: stack.accepts(), "the endpoint's return after the chaos")
    for writer in writers:
        writer.join(60)

    found = {row[0] for row in stack.query("select id from acknowledged")}
    acknowledged = {id for writer in writers for id in writer.acknowledged}
    attempted = {id for writer in writers for id in writer.attempted}
    print(f"{len(acknowledged)} acknowledged, {len(killed)} kills: {killed}")
    assert len(acknowledged) > 100, "the writers hardly wrote"
    assert not acknowledged - found, f"lost: {sorted(acknowledged - found)[:10]}"
    assert not found - attempted, "rows that nobody wrote"
    stack.check_program("pg_amcheck", "--install-missing", "--heapallindexed", "postgres")
