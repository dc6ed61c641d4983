"""A whole installation whose doors are pushed at: crowds of strangers, while commits and restarts go on."""

import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.base.address import Address, parse_address
from excimer.io.processes import unprivileged_user
from excimer.service.settings import load_settings
from tests.kit.builds import NEWEST_VERSION
from tests.kit.stack import Stack, running_stack

pytestmark = pytest.mark.timeout(240)

OPEN_FILES = 256
"""What each process may open: little, so that a crowd is cheap."""
STRANGERS_PER_PORT = 700
COMMIT_S_MAX = 20.0
LOG_BYTES_MAX = 4 << 20


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(NEWEST_VERSION, safekeepers=1, open_files=OPEN_FILES) as stack:
        stack.create_main()
        yield stack


def test_nobody_else_can_read_anything_of_a_running_installation(stack: Stack) -> None:
    """Every file and directory; as root, PostgreSQL's user may pass through those above its own."""
    stack.query("create table looked_at (i int)")
    user = unprivileged_user()
    passable = {
        stack.directory,
        stack.directory / "endpoints",
        stack.directory / "endpoints" / "main",
    }
    found: dict[str, int] = {}
    for path in (stack.directory, *stack.directory.rglob("*")):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # it is a running installation
        mode = stat.S_IMODE(status.st_mode)
        found[str(path.relative_to(stack.directory))] = mode
        if user is not None and path in passable:
            assert (mode, status.st_gid) == (0o710, user.gid), path
        elif stat.S_ISDIR(status.st_mode):
            assert mode == 0o700, f"{path} has mode {mode:o}"
        elif not stat.S_ISLNK(status.st_mode):
            assert mode & 0o077 == 0, f"{path} has mode {mode:o}"
    for name in ("config.toml", "keys/private.pem", "run/pageserver.toml", "broker/nats.conf"):
        assert found[name] == 0o600
    assert found["controller/metadata.sqlite"] == 0o600
    assert found["endpoints/main/run/arena"] == 0o600


def test_what_was_open_is_closed_at_the_next_start(stack: Stack) -> None:
    opened = [stack.directory / name for name in ("config.toml", "keys/private.pem", "keys", "logs")]
    for path in opened:
        path.chmod(0o755)
    stack.text("start")
    assert [path.stat().st_mode & 0o077 for path in opened] == [0] * len(opened)


def ports(stack: Stack) -> list[Address]:
    """All that a safekeeper and the pageserver listen on."""
    from excimer.pageserver.settings import PageserverSettings
    from excimer.safekeeper.settings import SafekeeperSettings

    safekeeper = load_settings(stack.directory / "run" / "safekeeper-1.toml", SafekeeperSettings)
    pageserver = load_settings(stack.directory / "run" / "pageserver.toml", PageserverSettings)
    listens = (
        safekeeper.proposer_listen,
        safekeeper.replication_listen,
        safekeeper.http_listen,
        pageserver.page_service_listen,
        pageserver.http_listen,
    )
    return [parse_address(listen) for listen in listens]


class Commits(threading.Thread):
    """Commits one row after the other until stopped; how long each took."""

    def __init__(self, connection: "psycopg.Connection[tuple[object, ...]]") -> None:
        super().__init__(name="commits")
        self._connection = connection
        self._stopping = threading.Event()
        self.seconds: list[float] = []

    def run(self) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            self._connection.execute(b"insert into crowd values (1)")
            self.seconds.append(time.monotonic() - started)

    def stop(self) -> None:
        self._stopping.set()
        self.join(60)


@contextlib.contextmanager
def crowd(addresses: list[Address], count: int) -> Iterator[int]:
    """Connections that say nothing; how many were made."""
    with contextlib.ExitStack() as opened:
        made = 0
        for _ in range(count):
            for address in addresses:
                connection = opened.enter_context(socket.socket())
                connection.settimeout(20)
                connection.connect(address)
                made += 1
        yield made


def test_commits_go_on_beside_thousands_of_strangers(stack: Stack) -> None:
    stack.query("create table crowd (i int)")
    services = ("safekeeper-1", "pageserver", "controller", "broker", "endpoint-main")
    pids = {part: stack.pid(part) for part in services}
    with stack.connect() as connection:
        commits = Commits(connection)
        commits.start()
        try:
            with crowd(ports(stack), STRANGERS_PER_PORT) as made:
                assert made >= 3000
                count = len(commits.seconds)
                stack.wait_until(lambda: len(commits.seconds) > count + 20, "twenty commits in the crowd")
                # Newcomers with a token: a compute's manager, the controller, and who asks for health.
                assert stack.json("status")["well"]
                stack.text("timeline", "branch", "--branch-name", "in-the-crowd")
                assert {part: stack.pid(part) for part in services} == pids
        finally:
            commits.stop()
    assert max(commits.seconds) < COMMIT_S_MAX
    with crowd(ports(stack), 100):
        stack.text("endpoint", "stop", "main")
        stack.text("endpoint", "start", "main")
        assert stack.query("select count(*) from crowd") == [(len(commits.seconds),)]
    for part in services[:-1]:
        assert Path(f"/proc/{pids[part]}").exists(), f"{part} has ended"
        assert len(os.listdir(f"/proc/{pids[part]}/fd")) < OPEN_FILES
    logs = {log.name: log.stat().st_size for log in (stack.directory / "logs").iterdir()}
    assert sum(logs.values()) < LOG_BYTES_MAX, logs
