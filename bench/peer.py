"""The peer: the same PostgreSQL build on a plain directory, alone or with a quorum of `pg_receivewal`.

It has the settings a compute starts with, except what makes a compute a compute: here fsync and full page
writes are on, as whoever keeps data in a local directory needs them, and nothing is preloaded. It is reached
over TCP, as computes are. The quorum is three `pg_receivewal --synchronous` with replication slots, each
with a directory of its own on the same file system, of which any two must have a commit on disk.
"""

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.pgbench import BenchFailedError, Target
from excimer.compute.postgres_settings import DEFAULTS
from excimer.io.processes import make_owned_dir, spawn
from excimer.postgres import PostgresBuild, run_initdb
from tests.kit.stock_server import stock_server

RECEIVERS = ("receiver_1", "receiver_2", "receiver_3")
QUORUM = f"ANY 2 ({', '.join(RECEIVERS)})"
ATTACH_LIMIT_S = 30.0
END_LIMIT_S = 10.0
OURS_ONLY = {"max_wal_size", "wal_keep_size", "wal_writer_delay"}
"""How much WAL a compute keeps and how soon it passes it on, because it lies elsewhere."""


@contextlib.contextmanager
def plain_postgres(build: PostgresBuild, settings: Mapping[str, str] | None = None) -> Iterator[Target]:
    """A running server with a new cluster; stopped and removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="excimer-bench-"))
    root.chmod(0o755)
    data_dir = root / "data"
    try:
        run_initdb(build, data_dir)
        with running_server(build, data_dir, settings or {}) as target:
            yield target
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def running_server(build: PostgresBuild, data_dir: Path, settings: Mapping[str, str]) -> Iterator[Target]:
    """A server on an existing cluster, with a compute's settings under the given ones."""
    common = {name: value for name, value in DEFAULTS.items() if name not in OURS_ONLY}
    wanted = common | {"listen_addresses": "127.0.0.1"} | dict(settings)
    with stock_server(build, data_dir, wanted) as server:
        yield Target("plain", build, server.port)


@contextlib.contextmanager
def quorum_postgres(build: PostgresBuild) -> Iterator[Target]:
    """A plain server whose commits wait for two of three receivers."""
    with plain_postgres(build) as target, contextlib.ExitStack() as stack:
        for name in RECEIVERS:
            stack.enter_context(_receiver(target, name))
        _wait_attached(target)
        target.sql(f"alter system set synchronous_standby_names = '{QUORUM}'", "select pg_reload_conf()")
        try:
            yield target
        finally:
            # Or the server's shutdown would wait for receivers that have gone.
            target.sql("alter system reset synchronous_standby_names", "select pg_reload_conf()")


@contextlib.contextmanager
def _receiver(target: Target, name: str) -> Iterator[None]:
    directory = make_owned_dir(Path(tempfile.mkdtemp(prefix="excimer-bench-")))
    program = target.build.program("pg_receivewal")
    connection = f"host=127.0.0.1 port={target.port} user=postgres application_name={name}"
    target.sql(f"select pg_create_physical_replication_slot('{name}', true)")
    process = spawn(
        [program, "-D", directory, "--synchronous", "--no-loop", "-S", name, "-d", connection],
        environment=target.build.whole_environment(),
    )
    try:
        yield
    finally:
        _end(process)
        shutil.rmtree(directory, ignore_errors=True)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(END_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_attached(target: Target) -> None:
    deadline = time.monotonic() + ATTACH_LIMIT_S
    query = "select count(*) from pg_stat_replication where state = 'streaming'"
    while int(target.sql(query)) < len(RECEIVERS):
        if time.monotonic() > deadline:
            raise BenchFailedError("pg_receivewal does not stream")
        time.sleep(0.05)
