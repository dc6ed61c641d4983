"""Suspended again and again while clients and a subscriber go on: no row is lost or doubled, nothing is left.

EXCIMER_SUSPENDS says how often, warm and cold in turns. With many (50) the report that it prints (`-s`) says
how memory went.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from excimer.cli.installation import load_installation
from excimer.compute.places import locate_places
from excimer.compute.proposer import PROPOSER_SLOT
from excimer.controller.core import holder_of
from excimer.io.processes import make_owned_dir
from excimer.postgres import run_initdb
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.census import (
    SERVICES,
    Census,
    left_of,
    processes_in,
    resident_kib,
    shared_memory_of,
    take_census,
    unified_group,
)
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import StockServer, stock_server

SUSPENDS = int(os.environ.get("EXCIMER_SUSPENDS", "6"))
CLIENTS = 3
PAUSE_S = 0.02
"""Between two rows of a client."""
WARM_UP = 2
"""Suspends after which what is used once has been: one warm and one cold."""
GROWTH_KIB_MAX = 8 << 10
"""Of a service's own memory, whatever the number of suspends; the pageserver's caches are not counted."""
SIZED = ("supervisor", "controller", "compute-node", "safekeeper-1")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1) as stack:
        stack.text("tenant", "create", "--set-default")
        stack.text("endpoint", "create", "main", "--suspend-after", "never", "--set", "wal_level=logical")
        stack.text("endpoint", "start", "main")
        stack.query("create table log (client int, n int)")
        yield stack


@pytest.fixture(scope="module")
def subscriber(stack: Stack) -> Iterator[StockServer]:
    root = Path(tempfile.mkdtemp(prefix="excimer-subscriber-"))
    root.chmod(0o755)
    build = build_of(stack.pg_version)
    run_initdb(build, make_owned_dir(root / "cluster") / "data")
    settings = {"wal_retrieve_retry_interval": "100ms", "fsync": "off"}
    try:
        with stock_server(build, root / "cluster" / "data", settings) as server:
            stack.query("create publication p for table log")
            server.sql("create table log (client int, n int)")
            server.sql(f"create subscription s connection '{stack.url()}' publication p")
            yield server
    finally:
        shutil.rmtree(root, ignore_errors=True)


class Client:
    """Commits one row after another, each once, wherever it is cut off; knows what was answered."""

    def __init__(self, stack: Stack, number: int) -> None:
        self._stack = stack
        self._number = number
        self.answered: set[int] = set()
        self.unknown: set[int] = set()
        """Cut off before the answer: there or not."""
        self._row = itertools.count(1)
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_done.is_set():
            with contextlib.suppress(psycopg.OperationalError), self._stack.connect() as connection:
                while not self._is_done.wait(PAUSE_S):
                    self._commit(connection)
            self._is_done.wait(PAUSE_S)

    def _commit(self, connection: psycopg.Connection[Any]) -> None:
        row = next(self._row)
        self.unknown.add(row)
        connection.execute("insert into log values (%s, %s)", (self._number, row))
        self.unknown.discard(row)
        self.answered.add(row)


class Switch:
    """Suspends and wakes the endpoint, as a proxy would."""

    def __init__(self, stack: Stack) -> None:
        installation = load_installation(stack.directory)
        self._stack = stack
        self._client = httpx.Client(
            base_url=f"http://{installation.controller_address}/v1/endpoints/main",
            headers={"Authorization": f"Bearer {installation.admin_token()}"},
            timeout=120,
        )

    def wake(self) -> None:
        self._client.post("/start", json={}).raise_for_status()

    def suspend(self, *, is_cold: bool) -> None:
        self._client.post("/stop", json={"suspend": True}).raise_for_status()
        if is_cold:
            self._stack.evict("main")

    def close(self) -> None:
        self._client.close()


def test_nothing_is_lost_doubled_or_left(stack: Stack, subscriber: StockServer) -> None:
    services = {name: stack.pid(name) for name in SERVICES}
    places = locate_places(stack.directory / "endpoints" / "main")
    clients = [Client(stack, number) for number in range(CLIENTS)]
    switch = Switch(stack)
    baseline: Census | None = None
    memory: list[dict[str, int]] = []
    files: list[set[str]] = []
    for client in clients:
        client.start()
    try:
        for number in range(1, SUSPENDS + 1):
            before = [len(client.answered) for client in clients]
            stack.wait_until(
                lambda before=before: all(  # type: ignore[misc]
                    len(client.answered) > count for client, count in zip(clients, before, strict=True)
                ),
                "a row of each client",
            )
            memory_names = shared_memory_of(stack.postmaster_pid())
            assert memory_names, "a running PostgreSQL has shared memory"
            group = unified_group(stack.pid("endpoint-main"))
            has_own_group = group is not None and group != unified_group(services["compute-node"])
            switch.suspend(is_cold=number % 2 == 0)
            assert processes_in([places.run_dir, stack.directory / "endpoints"]) == []
            assert left_of(memory_names) == set()
            assert not places.socket_dir.exists()
            if group is not None and has_own_group:
                stack.wait_until(lambda group=group: not group.exists(), "the end of its group")  # type: ignore[misc]
            if number >= WARM_UP:
                baseline = baseline or settled_census(stack, services)
                memory.append({name: resident_kib(services[name]) for name in SERVICES})
            if number % 2:
                files.append(kept_files(stack))
            switch.wake()
    finally:
        for client in clients:
            client.stop()
        switch.close()
    assert leases_of_main(stack) == 0
    assert stack.query("select slot_name from pg_replication_slots order by 1") == [(PROPOSER_SLOT,), ("s",)]
    check_rows(stack, subscriber, clients)
    stack.text("endpoint", "suspend", "main")
    assert baseline is not None
    stack.wait_until(
        lambda: is_as(baseline, take_census(services)),
        "the end of what the suspends have used",
        report=lambda: differences(baseline, take_census(services)),
    )
    assert files[-1] <= files[0], "files that a suspend leaves pile up"
    grown = {name: memory[-1][name] - memory[0][name] for name in SERVICES}
    commits = sum(len(client.answered) for client in clients)
    cut = sum(len(client.unknown) for client in clients)
    print(f"{SUSPENDS} suspends, {commits} commits, {cut} cut off; grown, KiB: {grown}")
    assert all(grown[name] < GROWTH_KIB_MAX for name in SIZED), grown


def leases_of_main(stack: Stack) -> int:
    """How many LSNs it has leased: one that writes holds back no history."""
    endpoint = stack.endpoint("main")
    installation = load_installation(stack.directory)
    settings = tomllib.loads((stack.directory / "run" / "pageserver.toml").read_text())
    timeline = f"tenant/{endpoint['tenant_id']}/timeline/{endpoint['timeline_id']}"
    answer = httpx.delete(
        f"http://{settings['http_listen']}/v1/{timeline}/lsn_lease/{holder_of('main')}",
        headers={"Authorization": f"Bearer {installation.admin_token()}"},
    )
    return int(answer.raise_for_status().json()["released"])


def settled_census(stack: Stack, services: dict[str, int]) -> Census:
    """Suspended, when two looks in a row say the same."""
    looks = [take_census(services)]

    def is_still() -> bool:
        looks.append(take_census(services))
        return looks[-1] == looks[-2]

    stack.wait_until(is_still, "rest", report=lambda: str(looks[-2:]))
    return looks[-1]


def is_as(before: Census, now: Census) -> bool:
    """Nothing more than before. Pools fill as they are used: threads, and the pageserver's redo workers with
    two pipes each.
    """
    same = before.without_pools()._replace(descriptors={}) == now.without_pools()._replace(descriptors={})
    fewer = all(
        now.descriptors[name].get(kind, 0) <= before.descriptors[name].get(kind, 0)
        for name in SERVICES
        for kind in now.descriptors[name]
        if (name, kind) != ("pageserver", "pipe")
    )
    single = ("supervisor", "compute-node", "safekeeper-1")
    return same and fewer and all(now.children[name] <= before.children[name] for name in single)


def differences(before: Census, now: Census) -> str:
    changed = [
        f"{field}: {old} -> {new}"
        for field, old, new in zip(Census._fields, before, now, strict=True)
        if old != new
    ]
    return "\n".join(changed)


def kept_files(stack: Stack) -> set[str]:
    """What a warm suspend leaves beside the cluster's own files."""
    names = set()
    for top in ("endpoints", "run", "keys"):
        for path in (stack.directory / top).rglob("*"):
            name = str(path.relative_to(stack.directory))
            if "/pgdata/" not in name:
                names.add(name)
    return names


def check_rows(stack: Stack, subscriber: StockServer, clients: list[Client]) -> None:
    rows = [(int(client), int(n)) for client, n in stack.query("select client, n from log order by 1, 2")]
    assert len(rows) == len(set(rows)), "a row is there twice"
    for number, client in enumerate(clients):
        there = {n for owner, n in rows if owner == number}
        assert client.answered <= there, f"lost: {sorted(client.answered - there)}"
        assert there <= client.answered | client.unknown

    def applied() -> list[list[str]]:
        return subscriber.sql("select client, n from log order by 1, 2")

    wanted = [[str(client), str(n)] for client, n in rows]
    stack.wait_until(lambda: len(applied()) >= len(wanted), "all rows at the subscriber")
    assert applied() == wanted
