"""A plain PostgreSQL server on a plain directory: the truth that our storage is compared with."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from excimer.io.processes import make_owned_dir, run, spawn
from excimer.postgres import PostgresBuild
from tests.kit.ports import free_port

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class StockServer:
    """A running server that SQL can be sent to, through psql, in a directory of the caller's."""

    def __init__(self, build: PostgresBuild, data_dir: Path, socket_dir: Path, port: int) -> None:
        self.build = build
        self.data_dir = data_dir
        self.socket_dir = socket_dir
        self.port = port

    def sql(self, script: str, database: str = "postgres") -> list[list[str]]:
        """Runs a script, stopping at the first error; rows of all its results, as text."""
        options = ["-X", "-q", "-A", "-t", "-U", "postgres", "-v", "ON_ERROR_STOP=1"]
        where = ["-F", "\t", "-h", str(self.socket_dir), "-p", str(self.port), database]
        output = run(
            [self.build.program("psql"), *options, *where],
            environment=self.build.whole_environment(),
            stdin=script.encode(),
            timeout_s=300,
        )
        return [line.split("\t") for line in output.splitlines()]


def copy_data_dir(source: Path, target: Path) -> None:
    """As PostgreSQL's user, to whom it belongs; private, which a template in the cache is not."""
    make_owned_dir(target)
    run(["cp", "-a", "--reflink=auto", f"{source}/.", target])
    run(["chmod", "700", target])


@contextlib.contextmanager
def stock_server(build: PostgresBuild, data_dir: Path, settings: Mapping[str, str]) -> Iterator[StockServer]:
    """Starts a server on an existing cluster and shuts it down cleanly at the end."""
    port = free_port()
    # Sockets have short paths; pytest's directories do not.
    socket_dir = make_owned_dir(Path(tempfile.mkdtemp(prefix="excimer-sock-")))
    wanted = {
        "port": str(port),
        "listen_addresses": "",
        "unix_socket_directories": str(socket_dir),
        **settings,
    }
    arguments: list[str | Path] = [build.postgres, "-D", data_dir]
    for name, value in wanted.items():
        arguments += ["-c", f"{name}={value}"]
    log_path = data_dir.with_name(data_dir.name + ".log")
    with log_path.open("ab") as log:
        process = spawn(arguments, environment=build.whole_environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(data_dir):
            assert process.poll() is None, log_path.read_text()[-3000:]
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield StockServer(build, data_dir, socket_dir, port)
    finally:
        if process.poll() is None:
            process.send_signal(2)  # SIGINT: fast shutdown
        process.wait(STOP_TIMEOUT_S)
        shutil.rmtree(socket_dir, ignore_errors=True)


def _is_ready(data_dir: Path) -> bool:
    try:
        lines = (data_dir / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) > 7 and lines[7].strip() == "ready"
