"""A whole local installation, driven by the command line as a user drives it.

Every process it starts is stopped by pid when the test ends, whatever the test killed meanwhile.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg

from excimer.compute.endpoint_remains import remove_remains
from excimer.io.processes import program_environment
from excimer.supervisor.protocol import ForgetPart, ask
from tests.kit.builds import build_of
from tests.kit.forked_commands import run_forked

COMMAND_TIMEOUT_S = 180
KEEP_VARIABLE = "EXCIMER_TEST_KEEP"
"""Set to keep the state directory, with its logs, when a test ends."""

Row = tuple[Any, ...]


def error_lines(stderr: str) -> list[str]:
    """What a command wrote to standard error, without what a slow machine makes it say of its waiting."""
    remarks = ("waiting for ", "endpoint-main is not ready yet")
    return [line for line in stderr.splitlines() if not line.startswith(remarks)]


class CommandFailedError(AssertionError):
    """An `excimer` command ended with an error."""

    def __init__(self, arguments: tuple[str, ...], result: "subprocess.CompletedProcess[str]") -> None:
        super().__init__(
            f"excimer {' '.join(arguments)}: exit code {result.returncode}: {result.stderr.strip()}"
        )
        self.result = result


class Stack:
    """One state directory and the commands on it."""

    def __init__(self, root: Path, pg_version: int, open_files: int | None = None) -> None:
        """`open_files` bounds what each process of the installation may open."""
        self.directory = root / "state"
        self.pg_version = pg_version
        self._open_files = open_files
        self._endpoints: dict[str, Any] = {}

    def command(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-m", "excimer.cli", "--dir", str(self.directory), *arguments]
        if self._open_files is None:
            return command
        return ["sh", "-c", f'ulimit -n {self._open_files}; exec "$@"', "sh", *command]

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Runs `excimer` and returns whatever happened."""
        if self._open_files is None:
            return run_forked(["--dir", str(self.directory), *arguments], COMMAND_TIMEOUT_S)
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def text(self, *arguments: str) -> str:
        """What a person sees. Raises `CommandFailedError`."""
        result = self.run(*arguments)
        if result.returncode:
            raise CommandFailedError(arguments, result)
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """The result as JSON. Raises `CommandFailedError`."""
        return json.loads(self.text("--json", *arguments))

    def init(
        self, *, safekeepers: int = 3, broker_url: str | None = None, options: Sequence[str] = ()
    ) -> None:
        broker = ["--broker-url", broker_url] if broker_url else []
        version = str(self.pg_version)
        self.text("init", "--pg-version", version, "--safekeepers", str(safekeepers), *broker, *options)

    def create_main(self) -> None:
        """A tenant with branch `main` and an endpoint of that name, running."""
        self.text("tenant", "create", "--set-default")
        self.text("endpoint", "create", "main", "--suspend-after", "never")
        self.text("endpoint", "start", "main")

    def branch(self, name: str, *, ancestor: str = "main", at: str | None = None) -> Any:
        """Makes a branch and an endpoint on it with the same name, running."""
        place = ["--at", at] if at else []
        made = self.json("timeline", "branch", "--branch-name", name, "--ancestor", ancestor, *place)
        self.text("endpoint", "create", name, "--branch-name", name, "--suspend-after", "never")
        self.text("endpoint", "start", name)
        return made

    def endpoint(self, name: str) -> Any:
        """Its description, remembered: the controller may be dead when a test asks."""
        if name not in self._endpoints:
            rows = {row["name"]: row for row in self.json("endpoint", "list")["endpoints"]}
            self._endpoints[name] = rows[name] | self.json("endpoint", "url", name)
        return self._endpoints[name]

    def forget(self, name: str) -> None:
        """Its description is asked for anew: it has another password, or its superuser another name."""
        self._endpoints.pop(name, None)

    def stop_and_forget(self, name: str = "main") -> None:
        """Stops an endpoint and removes what the stop has kept: its next start has only the page store."""
        self.text("endpoint", "stop", name)
        remove_remains(self.directory / "endpoints" / name, kept_too=True)

    def url(self, name: str = "main", database: str = "postgres") -> str:
        """With the superuser's password."""
        url: str = self.endpoint(name)["url"]
        return url.replace("/postgres?", f"/{database}?")

    def connect(self, name: str = "main", database: str = "postgres") -> "psycopg.Connection[Row]":
        return psycopg.connect(self.url(name, database), autocommit=True, connect_timeout=30)

    def connection_environment(self, name: str = "main") -> dict[str, str]:
        """libpq's variables for an endpoint."""
        endpoint = self.endpoint(name)
        server = {"PGHOST": endpoint["host"], "PGPORT": str(endpoint["port"]), "PGUSER": endpoint["role"]}
        return server | {"PGPASSWORD": endpoint["password"] or "", "PGDATABASE": "postgres"}

    def query(self, statement: str, name: str = "main", database: str = "postgres") -> list[Row]:
        with self.connect(name, database) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def program(self, program: str, *arguments: str, name: str = "main") -> "subprocess.Popen[str]":
        """One of PostgreSQL's programs, connected to an endpoint."""
        build = build_of(self.pg_version)
        connection = self.connection_environment(name)
        return subprocess.Popen(
            [str(build.program(program)), *arguments],
            env=program_environment(build.environment() | connection),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def check_program(self, program: str, *arguments: str, name: str = "main") -> str:
        """Runs one of PostgreSQL's programs to its end. Raises AssertionError with its output."""
        process = self.program(program, *arguments, name=name)
        output, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
        assert process.returncode == 0, f"{program}: {output}"
        return output

    def pid(self, part: str) -> int:
        """Of a service or an endpoint's manager, by its name in `excimer status`."""
        return int(json.loads((self.directory / "run" / f"{part}.pid").read_text())["pid"])

    def kill(self, part: str) -> None:
        """SIGKILL, as a machine's death would do it to this part, which stays dead until it is started; the
        PostgreSQL it runs included.
        """
        with contextlib.suppress(OSError):  # there is no supervisor
            ask(self.directory / "run", ForgetPart(part=part), COMMAND_TIMEOUT_S)
        pid = self.pid(part)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.wait_until(lambda: has_ended(pid), f"the end of {part}")

    def evict(self, name: str) -> None:
        """What another machine would have of a stopped endpoint."""
        for kept in (self.directory / "endpoints" / name).iterdir():
            if kept.name in ("run", "shutdown.json"):
                shutil.rmtree(kept, ignore_errors=True) if kept.is_dir() else kept.unlink()

    def data_dir(self, name: str = "main") -> Path:
        """The directory in which an endpoint's postgres runs now."""
        return Path(os.readlink(f"/proc/{self.postmaster_pid(name)}/cwd"))

    def postmaster_pid(self, name: str = "main") -> int:
        manager = self.pid(f"endpoint-{name}")
        children = Path(f"/proc/{manager}/task/{manager}/children").read_text().split()
        return next(int(pid) for pid in children if b"postgres" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def stop(self) -> None:
        """Everything, at once and for certain."""
        self.run("stop", "--immediate")
        self.kill_everything()

    def kill_everything(self) -> None:
        if (self.directory / "run" / "supervisor.pid").exists():
            self.kill("supervisor")
        for record in (self.directory / "run").glob("*.pid"):
            self.kill(record.stem)

    def wait_until(
        self,
        condition: Callable[[], bool],
        what: str,
        timeout_s: float = 60.0,
        report: Callable[[], str] = str,
    ) -> None:
        """`report` tells what only the one who waits can: it is asked when the time is over."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (
                f"{what} did not happen in {timeout_s:.0f} s\n{report()}\n{self.log_tails()}"
            )
            time.sleep(0.05)

    def accepts(self, name: str = "main") -> bool:
        """Whether an endpoint answers a query now."""
        try:
            return self.query("select 1", name) == [(1,)]
        except psycopg.Error:
            return False

    def log_tails(self) -> str:
        logs = sorted((self.directory / "logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-8:]) for log in logs)


def has_ended(pid: int) -> bool:
    """Whether all of a process is over, so that its ports are free; its remains may not be collected yet."""
    try:
        is_over = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        return is_over and len(list(Path(f"/proc/{pid}/task").iterdir())) <= 1
    except OSError:
        return True


@contextlib.contextmanager
def running_stack(
    pg_version: int,
    *,
    safekeepers: int = 3,
    broker_url: str | None = None,
    options: Sequence[str] = (),
    starts: bool = True,
    open_files: int | None = None,
) -> Iterator[Stack]:
    """An initialised installation without tenants, started if it `starts`; stopped and removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="excimer-stack-"))
    root.chmod(0o755)
    build_of(pg_version)
    stack = Stack(root, pg_version, open_files)
    try:
        stack.init(safekeepers=safekeepers, broker_url=broker_url, options=options)
        if starts:
            stack.text("start")
        yield stack
    except BaseException:
        print(stack.log_tails(), file=sys.stderr)
        raise
    finally:
        stack.stop()
        if not os.environ.get(KEEP_VARIABLE):
            shutil.rmtree(root, ignore_errors=True)
