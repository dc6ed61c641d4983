"""Subscribers and branches of them: each row exactly once, and a new branch acts on nothing outside."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.base.errors import ExcimerError
from excimer.compute.outside_work import GATE, mark_name
from excimer.io.processes import make_owned_dir
from excimer.postgres import run_initdb
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.stack import Stack, running_stack
from tests.kit.stock_server import StockServer, stock_server

VERSIONS = [int(text) for text in os.environ.get("EXCIMER_LOGICAL_VERSIONS", str(NEWEST_VERSION)).split(",")]
PUBLISHER = {"wal_level": "logical", "listen_addresses": "127.0.0.1", "fsync": "off"}
HOLDERS_OF_A_QUORUM = ("safekeeper-2", "safekeeper-3")
ROWS_WHILE_NO_QUORUM = 50
PUBLISHER_POSITIONS = {
    "publisher's WAL": "select pg_current_wal_lsn()",
    "its slots": "select slot_name, active, active_pid, restart_lsn, confirmed_flush_lsn"
    " from pg_replication_slots",
    "its walsenders": "select pid, state, sent_lsn, write_lsn, flush_lsn, replay_lsn, reply_time"
    " from pg_stat_replication",
}
SUBSCRIBER_POSITIONS = {
    "subscriber's WAL": "select pg_current_wal_lsn()::text, pg_current_wal_flush_lsn()::text",
    "its subscriptions": "select subname, subenabled from pg_subscription",
    "its workers": "select pid, received_lsn::text, latest_end_lsn::text, last_msg_receipt_time"
    " from pg_stat_subscription",
    "its origins": "select external_id, remote_lsn::text, local_lsn::text from pg_replication_origin_status",
    "its quorum": "select application_name, state, sent_lsn::text, flush_lsn::text, sync_state"
    " from pg_stat_replication",
}


class Subscribed:
    """An installation whose branch `main` subscribes to a stock server."""

    def __init__(self, stack: Stack, publisher: StockServer) -> None:
        self.stack = stack
        self.publisher = publisher
        self.next_row = 0

    @property
    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.publisher.port} user=postgres dbname=postgres"

    def publish(self, rows: int) -> None:
        """Each row in a transaction of its own."""
        first, self.next_row = self.next_row, self.next_row + rows
        self.publisher.sql("".join(f"insert into log values ({n});" for n in range(first, self.next_row)))

    def rows(self, endpoint: str = "main") -> list[int]:
        return [row for (row,) in self.stack.query("select a from log order by a", endpoint)]

    def wait_for_all(self, endpoint: str = "main") -> None:
        self.stack.wait_until(
            lambda: self.arrived(endpoint) >= self.next_row,
            f"the arrival of all {self.next_row} rows",
            report=lambda: self.positions(endpoint),
        )

    def arrived(self, endpoint: str) -> int:
        return int(self.stack.query("select count(distinct a) from log", endpoint)[0][0])

    def positions(self, endpoint: str) -> str:
        """Who has got how far, each in its own LSNs."""
        told = []
        for who, query in PUBLISHER_POSITIONS.items():
            with contextlib.suppress(ExcimerError):
                told.append(f"{who}: {self.publisher.sql(query)}")
        for who, query in SUBSCRIBER_POSITIONS.items():
            try:
                told.append(f"{who}: {self.stack.query(query, endpoint)}")
            except psycopg.Error as error:
                told.append(f"{who}: {error}")
        return "\n".join([*told, self.stack.run("status").stdout])

    def publish_and_mark(self, rows: int) -> str:
        """As `publish`; returns the end of the first row's commit, or a little more."""
        self.publish(1)
        ((lsn,),) = self.publisher.sql("select pg_current_wal_lsn()")
        self.publish(rows - 1)
        return lsn

    def was_told_of(self, lsn: str) -> bool:
        """Whether the publisher need no more keep what lies before `lsn`."""
        query = f"select confirmed_flush_lsn >= '{lsn}' from pg_replication_slots where slot_name = 's'"
        return self.publisher.sql(query) == [["t"]]


@pytest.fixture(scope="module", params=VERSIONS)
def subscribed(request: pytest.FixtureRequest) -> Iterator[Subscribed]:
    root = Path(tempfile.mkdtemp(prefix="excimer-logical-"))
    root.chmod(0o755)
    build = build_of(request.param)
    run_initdb(build, make_owned_dir(root / "publisher") / "data")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, True)
        publisher = stack.enter_context(stock_server(build, root / "publisher" / "data", PUBLISHER))
        publisher.sql("create table log (a int); create publication p for all tables")
        installation = stack.enter_context(running_stack(request.param))
        installation.create_main()
        made = Subscribed(installation, publisher)
        # A worker's successor comes soon.
        installation.text("endpoint", "config", "main", "set", "wal_retrieve_retry_interval=100ms")
        installation.query("create table log (a int)")
        installation.query(f"create subscription s connection '{made.conninfo}' publication p")
        made.publish(20)
        made.wait_for_all()
        yield made


def restart(stack: Stack, how: str) -> None:
    if how == "killed":
        os.kill(stack.postmaster_pid(), signal.SIGKILL)
        stack.wait_until(stack.accepts, "a fresh start")
        return
    stack.text("endpoint", "stop", "main", *(["--immediate"] if how == "immediate" else []))
    stack.text("endpoint", "start", "main")


def test_every_row_arrives_once_whatever_stops_the_subscriber_under_load(subscribed: Subscribed) -> None:
    stack = subscribed.stack
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            subscribed.publish(25)

    writer = threading.Thread(target=load)
    writer.start()
    try:
        for how in ("clean", "killed", "immediate"):
            before = len(subscribed.rows())
            restart(stack, how)
            stack.wait_until(lambda before=before: len(subscribed.rows()) > before, "more rows")  # type: ignore[misc]
    finally:
        done.set()
        writer.join()
    subscribed.wait_for_all()
    assert subscribed.rows() == list(range(subscribed.next_row))


def test_the_publisher_keeps_what_no_quorum_has(subscribed: Subscribed) -> None:
    """A subscription's commits are asynchronous by default, and the local disk is only a cache."""
    stack = subscribed.stack
    subscribed.wait_for_all()
    paused = [stack.pid(part) for part in HOLDERS_OF_A_QUORUM]
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    try:
        first = subscribed.publish_and_mark(ROWS_WHILE_NO_QUORUM)
        stack.wait_until(lambda: subscribed.publisher.sql(SENT.format(first)) == [["t"]], "the rows' sending")
        for _ in range(3):
            subscribed.publisher.sql("select pg_sleep(0.7)")
            assert not subscribed.was_told_of(first)
        stack.kill("endpoint-main")
    finally:
        for pid in paused:
            os.kill(pid, signal.SIGCONT)
    stack.text("endpoint", "start", "main")
    subscribed.wait_for_all()
    assert subscribed.rows() == list(range(subscribed.next_row))


WAITING = (
    "select pid from pg_stat_activity"
    " where wait_event = 'SyncRep' and backend_type like 'logical replication%'"
)


def break_off_wait(stack: Stack, publisher: StockServer, how: str) -> None:
    """Ends an apply worker's wait for the quorum, and returns when it may have told of it."""
    ((worker,),) = stack.query(WAITING)
    if how == "postmaster killed":
        os.kill(stack.postmaster_pid(), signal.SIGKILL)
        idle = "select not active from pg_replication_slots where slot_name = 's'"
        stack.wait_until(lambda: publisher.sql(idle) == [["t"]], "the worker's end")
    else:
        log = stack.directory / "endpoints" / "main" / "postgres.log"
        broken_off = "canceling the wait for synchronous replication"
        before = log.read_text(errors="replace").count(broken_off)
        stack.query(f"select pg_terminate_backend({worker})")
        stack.wait_until(
            lambda: log.read_text(errors="replace").count(broken_off) > before, "the end of PostgreSQL's wait"
        )


@pytest.mark.parametrize("how", ["postmaster killed", "terminated"])
def test_a_worker_whose_wait_was_broken_off_tells_the_publisher_nothing(
    subscribed: Subscribed, how: str
) -> None:
    """PostgreSQL lets it go on as if the quorum had what it committed."""
    stack = subscribed.stack
    subscribed.wait_for_all()
    paused = [stack.pid(part) for part in HOLDERS_OF_A_QUORUM]
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    try:
        first = subscribed.publish_and_mark(ROWS_WHILE_NO_QUORUM)
        stack.wait_until(lambda: stack.query(WAITING) != [], "a commit that waits for the quorum")
        break_off_wait(stack, subscribed.publisher, how)
        for _ in range(3):
            assert not subscribed.was_told_of(first)
            subscribed.publisher.sql("select pg_sleep(0.7)")
    finally:
        for pid in paused:
            os.kill(pid, signal.SIGCONT)
    stack.wait_until(stack.accepts, "a running postgres")
    subscribed.wait_for_all()
    assert subscribed.rows() == list(range(subscribed.next_row))


SENT = (
    "select coalesce(bool_or(sent_lsn > '{}'), false) from pg_stat_replication where application_name = 's'"
)


def workers(stack: Stack, endpoint: str) -> int:
    return int(stack.query("select count(pid) from pg_stat_subscription", endpoint)[0][0])


def enabled(stack: Stack, endpoint: str) -> list[bool]:
    return [row for (row,) in stack.query("select subenabled from pg_subscription", endpoint)]


def test_a_branch_is_quiet_until_somebody_enables_its_subscription(subscribed: Subscribed) -> None:
    stack = subscribed.stack
    subscribed.publish(5)
    subscribed.wait_for_all()
    made = stack.branch("quiet")
    assert enabled(stack, "quiet") == [False]
    assert made["is_quiet"]
    # The parent away, the publisher's slot is free to be taken.
    stack.text("endpoint", "stop", "main")
    subscribed.publish(10)
    os.kill(stack.postmaster_pid("quiet"), signal.SIGKILL)
    stack.wait_until(lambda: stack.accepts("quiet"), "a fresh start")
    subscribed.publisher.sql("select pg_sleep(6)")  # the launcher looks every 5 s at least
    assert (workers(stack, "quiet"), enabled(stack, "quiet")) == (0, [False])
    assert len(subscribed.rows("quiet")) == subscribed.next_row - 10
    stack.text("endpoint", "start", "main")
    subscribed.wait_for_all()
    assert subscribed.rows() == list(range(subscribed.next_row))
    # What is said on the branch holds on the branch: a publication that does not exist does no harm.
    stack.query("alter subscription s set publication none with (refresh = false)", "quiet")
    stack.query("alter subscription s enable", "quiet")
    stack.text("endpoint", "stop", "quiet", "--immediate")
    stack.text("endpoint", "start", "quiet")
    assert enabled(stack, "quiet") == [True]
    # And not on a branch of it.
    stack.branch("grandchild", ancestor="quiet")
    assert enabled(stack, "grandchild") == [False]
    for name in ("quiet", "grandchild"):
        stack.text("endpoint", "stop", name, "--destroy")


def test_a_start_that_dies_before_the_quorum_has_it_acts_on_nothing_later_either(
    subscribed: Subscribed,
) -> None:
    """The gate is shut at each start, and opens only after the subscriptions are disabled for good."""
    stack = subscribed.stack
    made = stack.json("timeline", "branch", "--branch-name", "dies")
    stack.text("endpoint", "create", "dies", "--branch-name", "dies")
    starting = threading.Thread(target=stack.run, args=("endpoint", "start", "dies"))
    paused = [stack.pid(part) for part in HOLDERS_OF_A_QUORUM]
    try:
        starting.start()
        stack.wait_until(lambda: stack.accepts("dies"), "a first start")
        for pid in paused:
            os.kill(pid, signal.SIGSTOP)
        with contextlib.suppress(StopIteration, OSError):
            stack.kill("endpoint-dies")
    finally:
        for pid in paused:
            os.kill(pid, signal.SIGCONT)
    starting.join()
    stack.text("endpoint", "start", "dies")
    assert enabled(stack, "dies") == [False]
    assert (stack.data_dir("dies") / GATE).exists()
    marks = stack.query("select roname from pg_replication_origin where roname like 'excimer%'", "dies")
    assert marks == [(mark_name(made["timeline_id"]),)]
    stack.text("endpoint", "stop", "dies", "--destroy")


def test_a_restored_branch_and_what_it_was_are_quiet_and_an_active_branch_is_not(
    subscribed: Subscribed,
) -> None:
    stack = subscribed.stack
    stack.branch("worked")
    stack.query("alter subscription s set publication none with (refresh = false)", "worked")
    stack.query("alter subscription s enable", "worked")
    lsn = stack.query("select pg_current_wal_lsn()::text", "worked")[0][0]
    stack.query("create table later ()", "worked")
    stack.text("endpoint", "stop", "worked")
    stack.text("timeline", "restore", "worked", "--to", lsn, "--preserve-under-name", "was")
    stack.text("endpoint", "create", "was", "--branch-name", "was")
    for name in ("worked", "was"):
        stack.text("endpoint", "start", name)
        assert enabled(stack, name) == [False], name
        stack.text("endpoint", "stop", name, "--destroy")
    stack.text("endpoint", "stop", "main")
    stack.text("timeline", "branch", "--branch-name", "active", "--keep-active")
    stack.text("endpoint", "create", "active", "--branch-name", "active")
    stack.text("endpoint", "start", "active")
    assert enabled(stack, "active") == [True]
    stack.wait_until(lambda: workers(stack, "active") == 1, "its subscription's worker")
    stack.query("alter subscription s disable", "active")
    stack.text("endpoint", "stop", "active", "--destroy")
    stack.text("endpoint", "start", "main")


def processes(stack: Stack, endpoint: str) -> str:
    """What the postmaster has started, by their titles."""
    postmaster = stack.postmaster_pid(endpoint)
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    with contextlib.suppress(OSError):
        return "\n".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in children)
    return ""


def test_background_workers_of_extensions_wait_on_a_quiet_branch(subscribed: Subscribed) -> None:
    stack = subscribed.stack
    stack.text("timeline", "branch", "--branch-name", "still")
    stack.text("endpoint", "create", "still", "--branch-name", "still")
    stack.text("endpoint", "config", "still", "set", "shared_preload_libraries=pg_prewarm")
    stack.text("endpoint", "start", "still")
    stack.wait_until(lambda: "logical replication launcher" in processes(stack, "still"), "the launcher")
    assert "autoprewarm leader" not in processes(stack, "still")
    stack.text("endpoint", "stop", "still")
    stack.text("timeline", "activate", "still")
    stack.text("endpoint", "start", "still")
    stack.wait_until(lambda: "autoprewarm leader" in processes(stack, "still"), "the worker's start")
    stack.text("endpoint", "stop", "still", "--destroy")


@pytest.mark.parametrize(
    ("statement", "setup"),
    [
        ("create tablespace t location '/tmp'", ""),
        ("create tablespace t location ''", "set allow_in_place_tablespaces = on"),
        ("do $$ begin execute 'create tablespace t location ''/tmp'''; end $$", ""),
    ],
)
def test_tablespaces_are_refused_before_a_file_is_touched(
    subscribed: Subscribed, statement: str, setup: str
) -> None:
    stack = subscribed.stack
    before = sorted(path.name for path in (stack.data_dir() / "pg_tblspc").iterdir())
    with stack.connect() as connection:
        if setup and stack.pg_version >= 15:
            connection.execute(setup.encode())
        with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
            connection.execute(statement.encode())
    assert caught.value.diag.message_hint is not None
    assert sorted(path.name for path in (stack.data_dir() / "pg_tblspc").iterdir()) == before
    assert stack.query("select count(*) from pg_tablespace") == [(2,)]


def test_an_extension_that_the_build_lacks_says_what_helps(subscribed: Subscribed) -> None:
    with (
        pytest.raises(psycopg.Error, match="no_such_extension") as caught,
        subscribed.stack.connect() as connection,
    ):
        connection.execute("create extension no_such_extension")
    assert "excimer pg" in str(caught.value.diag.message_hint)
    assert subscribed.stack.query("show shared_preload_libraries")[0][0].startswith("pg_stat_statements, ")
