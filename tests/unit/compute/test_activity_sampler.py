"""Who is there, and how seldom PostgreSQL is asked for it."""

import asyncio
import os
import subprocess

import pytest

from excimer.base.clock import Monotonic, UnixTime
from excimer.base.errors import RetryableError
from excimer.compute.activity_sampler import (
    EXTENSIONS,
    MAINTENANCE,
    REPLICATION,
    SESSIONS,
    SUBSCRIPTIONS,
    ActivitySampler,
    Kind,
    ServerLook,
    ServerProcess,
    child_pids,
    kind_of,
)
from excimer.compute.idle_policy import Sample

OWN = (
    "checkpointer",
    "background writer",
    "walwriter",
    "autovacuum launcher",
    "logical replication launcher",
)


class Clock:
    def monotonic(self) -> Monotonic:
        return Monotonic(0.0)

    def now(self) -> UnixTime:
        return UnixTime(0.0)


class Server:
    """A PostgreSQL with processes that come and go."""

    def __init__(self) -> None:
        self.logins = 0
        self.enabled_subscriptions = 0
        self.is_silent = False
        self.processes = {100 + number: ServerProcess(name, False) for number, name in enumerate(OWN)}
        self.processes[110] = ServerProcess("walsender", True, is_ours=True)
        self.unlisted: set[int] = set()
        self.questions = 0
        self.sampler = ActivitySampler(
            lambda: frozenset({*self.processes, *self.unlisted}), self, self.ask, Clock()
        )

    async def ask(self) -> ServerLook:
        self.questions += 1
        if self.is_silent:
            raise RetryableError("the server does not answer")
        return ServerLook(dict(self.processes), self.enabled_subscriptions)

    def sample(self) -> Sample:
        return asyncio.run(self.sampler.sample())

    def look(self) -> Sample:
        return asyncio.run(self.sampler.look())


@pytest.fixture
def server() -> Server:
    return Server()


def test_an_idle_server_is_asked_once(server: Server) -> None:
    for _ in range(50):
        assert server.sample() == Sample(Monotonic(0.0), 0, {}, {})
    assert server.questions == 1


def test_a_login_is_use_without_a_question(server: Server) -> None:
    server.sample()
    server.logins, server.processes[200] = 1, ServerProcess("client backend", False)
    assert server.sample().logins == 1
    assert server.questions == 1
    for _ in range(10):
        assert server.sample().uses == {SESSIONS: 1}
    assert server.questions == 2, "once to learn what it is"
    del server.processes[200]
    assert server.sample().uses == {}
    assert server.questions == 2


def test_a_pid_that_another_process_has_now_is_asked_about(server: Server) -> None:
    server.processes[200] = ServerProcess("autovacuum worker", True)
    assert server.sample().holds == {MAINTENANCE: 1}
    server.logins, server.processes[200] = 1, ServerProcess("client backend", False)
    server.sample()
    assert server.sample().uses == {SESSIONS: 1}


def test_who_has_not_logged_in_yet_is_nobody_until_then(server: Server) -> None:
    server.unlisted.add(300)  # authenticating, or the logger
    for _ in range(5):
        assert (server.sample().uses, server.sample().holds) == ({}, {})
    assert server.questions == 1
    server.unlisted.remove(300)
    server.logins, server.processes[300] = 1, ServerProcess("client backend", False)
    server.sample()
    assert server.sample().uses == {SESSIONS: 1}


def test_the_proposer_is_told_from_other_walsenders_as_soon_as_it_can_be(server: Server) -> None:
    server.processes[110] = ServerProcess("walsender", False)  # its slot is not taken yet
    assert server.sample().uses == {REPLICATION: 1}
    server.processes[110] = ServerProcess("walsender", False, is_ours=True)
    assert server.sample().uses == {}
    server.processes[111] = ServerProcess("walsender", False)
    assert server.sample().uses == {REPLICATION: 1}


def test_a_worker_of_an_extension_holds_only_while_it_works(server: Server) -> None:
    server.processes[120] = ServerProcess("pg_cron launcher", False)
    assert server.look().holds == {}
    server.processes[120] = ServerProcess("pg_cron launcher", True)
    assert server.look().holds == {EXTENSIONS: 1}
    assert server.sample().holds == {EXTENSIONS: 1}, "it is asked whether it still works"
    server.processes[120] = ServerProcess("pg_cron launcher", False)
    assert server.sample().holds == {}


def test_an_enabled_subscription_is_use_also_while_its_publisher_is_away(server: Server) -> None:
    server.enabled_subscriptions = 2
    assert server.look().uses == {SUBSCRIPTIONS: 2}
    assert server.sample().uses == {SUBSCRIPTIONS: 2}
    server.enabled_subscriptions = 0
    assert server.sample().uses == {}


def test_a_server_that_does_not_say_is_not_judged(server: Server) -> None:
    server.sample()
    server.is_silent = True
    assert not server.look().is_known
    server.processes[200] = ServerProcess("something", False)
    assert not server.sample().is_known
    server.is_silent = False
    assert server.sample().is_known


def test_a_login_during_a_look_is_in_its_count(server: Server) -> None:
    server.sample()
    asked = server.ask

    async def ask() -> ServerLook:
        found = await asked()
        server.logins += 1
        return found

    server.sampler._ask = ask
    assert server.look().logins == 1


@pytest.mark.parametrize(
    ("backend_type", "kind"),
    [
        *((name, Kind.QUIET) for name in (*OWN, "io worker", "archiver", "walsummarizer", "startup")),
        ("client backend", Kind.SESSION),
        ("parallel worker", Kind.SESSION),
        ("walsender", Kind.REPLICATION),
        ("autovacuum worker", Kind.MAINTENANCE),
        ("logical replication worker", Kind.SUBSCRIPTION),  # 14 to 16
        ("logical replication apply worker", Kind.SUBSCRIPTION),
        ("logical replication tablesync worker", Kind.SUBSCRIPTION),
        ("logical replication parallel worker", Kind.SUBSCRIPTION),
        ("pg_cron launcher", Kind.EXTENSION),
        ("autoprewarm leader", Kind.EXTENSION),
        ("", Kind.EXTENSION),
    ],
)
def test_processes_are_told_apart_by_their_type(backend_type: str, kind: Kind) -> None:
    assert kind_of(ServerProcess(backend_type, False)) is kind


def test_children_are_found_and_a_process_that_is_gone_has_none() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        assert process.pid in child_pids(os.getpid())
        process.kill()
    assert process.pid not in child_pids(os.getpid())
    assert child_pids(process.pid) == frozenset()
