"""The control: stock PostgreSQL with a synchronous standby, under the same kinds of faults.

One acknowledges a commit when both have it, the other when two of three safekeepers do. The primary and the
standby restart by PostgreSQL's own crash recovery.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from excimer.io.processes import give_to_user, make_owned_dir, run, spawn
from excimer.postgres import PostgresBuild, run_initdb
from tests.chaos.clients import Connection
from tests.chaos.faults import (
    BriefStalls,
    BrokenLink,
    Fault,
    FullDisk,
    Kill,
    PidFinder,
    Stall,
    children,
    may_mount,
    small_file_system,
)
from tests.chaos.links import Links, LinkState, running_links
from tests.kit.builds import build_of
from tests.kit.ports import free_port

DISK_MIB = 3000
START_TIMEOUT_S = 120.0


class Server:
    """A postmaster on a directory; started again as often as it dies."""

    def __init__(self, build: PostgresBuild, data_dir: Path, socket_dir: Path) -> None:
        self.build = build
        self.data_dir = data_dir
        self.port = free_port()
        self._socket_dir = socket_dir
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, settings: dict[str, str]) -> None:
        lines = {"port": str(self.port), "unix_socket_directories": str(self._socket_dir), **settings}
        with (self.data_dir / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in lines.items())

    def ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._wait_orphans()
        log = self.data_dir.parent / f"{self.data_dir.name}.log"
        with log.open("ab") as output:
            self._process = spawn(
                [self.build.postgres, "-D", self.data_dir],
                environment=self.build.whole_environment(),
                stdout=output,
                stderr=output,
            )

    def _wait_orphans(self) -> None:
        """A killed postmaster's children hold its shared memory until they notice."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while any(_works_in(pid, self.data_dir) for pid in _all_pids()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def pids(self) -> list[int]:
        return [self._process.pid] if self._process is not None and self._process.poll() is None else []

    def children(self, kind: bytes) -> list[int]:
        return [pid for postmaster in self.pids() for pid in children(postmaster, kind)]

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_TIMEOUT_S)


class StockTarget:
    name = "stock"

    def __init__(self, primary: Server, standby: Server, links: Links, disks: dict[str, Path]) -> None:
        self._primary = primary
        self._standby = standby
        self._links = links
        self._disks = disks

    def start(self) -> None:
        self.recover()

    def recover(self) -> None:
        self._primary.ensure()
        self._standby.ensure()

    def recover_endpoint(self) -> None:
        self._primary.ensure()

    def connect(self) -> Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self._primary.port, user="postgres", dbname="postgres", connect_timeout=30
        )

    def faults(self) -> list[Fault]:
        processes: dict[str, PidFinder] = {
            "postmaster": self._primary.pids,
            "standby": self._standby.pids,
            "backend": self._backends,
            "walsender": lambda: self._primary.children(b"walsender"),
            "walreceiver": lambda: self._standby.children(b"walreceiver"),
            "checkpointer": lambda: self._primary.children(b"checkpointer"),
        }
        found: list[Fault] = [Kill(name, find) for name, find in processes.items()]
        found += [Stall(name, find) for name, find in processes.items()]
        found += [BriefStalls("backends", self._backends)] * 3
        found += [
            BrokenLink(self._links, link, state)
            for link in self._links.names
            for state in LinkState
            if state is not LinkState.OPEN
        ]
        found += [FullDisk(name, path) for name, path in self._disks.items()]
        return found

    def is_fit(self) -> str | None:
        program = self._primary.build.program("pg_amcheck")
        where = ["-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres"]
        environment = self._primary.build.whole_environment()
        try:
            run(
                [program, *where, "--install-missing", "--heapallindexed", "postgres"],
                environment=environment,
            )
        except Exception as error:
            return str(error)
        return None

    def logs(self) -> str:
        logs = [
            server.data_dir.parent / f"{server.data_dir.name}.log"
            for server in (self._primary, self._standby)
        ]
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-20:]) for log in logs)

    def _backends(self) -> list[int]:
        return self._primary.children(b"127.0.0.1")


def _all_pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _works_in(pid: int, directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path(os.readlink(f"/proc/{pid}/cwd")) == directory
    return False


@contextlib.contextmanager
def stock_target(pg_version: int) -> Iterator[StockTarget]:
    build = build_of(pg_version)
    root = make_owned_dir(Path(tempfile.mkdtemp(prefix="excimer-stock-")))
    with contextlib.ExitStack() as contexts:
        contexts.callback(shutil.rmtree, root, ignore_errors=True)
        disks = {}
        if may_mount():
            for name in ("primary", "standby"):
                disks[name] = contexts.enter_context(small_file_system(root / name, DISK_MIB))
                give_to_user(root / name)
        links = contexts.enter_context(running_links())
        primary = Server(build, make_owned_dir(root / "primary") / "data", root)
        standby = Server(build, make_owned_dir(root / "standby") / "data", root)
        contexts.callback(primary.stop)
        contexts.callback(standby.stop)
        run_initdb(build, primary.data_dir)
        primary.configure({"listen_addresses": "127.0.0.1", "synchronous_standby_names": "standby"})
        _copy_primary(primary, standby, links)
        yield StockTarget(primary, standby, links, disks)


def _copy_primary(primary: Server, standby: Server, links: Links) -> None:
    primary.ensure()
    _wait_accepts(primary)
    environment = primary.build.whole_environment()
    where = ["-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres"]
    run(
        [primary.build.program("pg_basebackup"), *where, "-D", standby.data_dir, "-c", "fast"],
        environment=environment,
    )
    address = links.add("replication", f"127.0.0.1:{primary.port}")
    port = address.rpartition(":")[2]
    library = ""
    standby.configure(
        {
            "listen_addresses": "",
            "primary_conninfo": f"host=127.0.0.1 port={port} user=postgres application_name=standby{library}",
        }
    )
    signal_file = standby.data_dir / "standby.signal"
    signal_file.touch()
    give_to_user(signal_file)


def _wait_accepts(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            psycopg.connect(host="127.0.0.1", port=server.port, user="postgres", dbname="postgres").close()
            return
        except psycopg.Error:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
