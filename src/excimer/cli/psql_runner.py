"""Runs the psql of an endpoint's PostgreSQL build: by the endpoint's Unix socket, as its bootstrap superuser.

Where to connect stands in the environment. There psql's own options win over it one by one, so that
``-U app`` changes the role and not the server. No password is needed, and none is passed.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from excimer.base.errors import RefusedError
from excimer.compute.local_access import LocalAccess

MISLEADING_VARIABLES: Final = (
    *("PGHOSTADDR", "PGSERVICE", "PGSSLMODE", "PGSSLNEGOTIATION", "PGREQUIRESSL", "PGREQUIREPEER"),
    *("PGREQUIREAUTH", "PGCHANNELBINDING", "PGTARGETSESSIONATTRS", "PGLOADBALANCEHOSTS", "PGGSSENCMODE"),
)
"""Of libpq, for other servers: they would win over ours, or refuse a socket."""


class SqlFailedError(RefusedError):
    """psql reported an error."""


def psql_environment(
    access: LocalAccess, build_environment: Mapping[str, str], database: str
) -> dict[str, str]:
    """Our environment, with an endpoint as the server that libpq connects to unless told otherwise."""
    ours = {name: value for name, value in os.environ.items() if name not in MISLEADING_VARIABLES}
    server = {
        "PGHOST": access.socket_dir,
        "PGPORT": str(access.port),
        "PGUSER": access.superuser,
        "PGDATABASE": database,
    }
    return {**ours, **build_environment, **server}


class PsqlRunner:
    """psql on one database; `environment` is its whole one, as `psql_environment` makes it."""

    def __init__(self, program: Path, environment: dict[str, str]) -> None:
        self._program = program
        self._environment = environment

    def rows(self, sql: str) -> list[list[str]]:
        """The rows of a query, as text. Raises `SqlFailedError` with psql's sentence."""
        output = self._run(["-A", "-t", "-F", "\x1f", "-c", sql], None)
        return [line.split("\x1f") for line in output.splitlines()]

    def copy_in(self, sql: str, data: IO[bytes]) -> None:
        """``COPY … FROM STDIN`` with the bytes of `data`."""
        command = [str(self._program), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", sql]
        with subprocess.Popen(
            command, env=self._environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stderr is not None
            try:
                while chunk := data.read(1 << 20):
                    process.stdin.write(chunk)
                process.stdin.close()
            except BrokenPipeError:
                pass  # psql ended; its own words follow
            errors = process.stderr.read()
        _check(process.returncode, errors)

    def _run(self, arguments: list[str], data: bytes | None) -> str:
        command = [str(self._program), "-X", "-q", "-v", "ON_ERROR_STOP=1", *arguments]
        done = subprocess.run(command, env=self._environment, input=data, capture_output=True, check=False)
        _check(done.returncode, done.stderr)
        return done.stdout.decode()


def _check(code: int, errors: Any) -> None:
    if code != 0:
        told = errors.decode("utf-8", "replace").partition("\nLINE ")[0]  # the SQL is ours, not the user's
        raise SqlFailedError(told.strip() or f"psql ended with code {code}")
