"""Runs SQL on an endpoint through the psql of its PostgreSQL build."""

import os
import subprocess
from pathlib import Path
from typing import IO, Any

from excimer.base.errors import RefusedError


class SqlFailedError(RefusedError):
    """psql reported an error."""


class PsqlRunner:
    """psql on one database URL; `environment` is laid over ours."""

    def __init__(self, program: Path, environment: dict[str, str], url: str) -> None:
        self._program = program
        self._environment = {**os.environ, **environment}
        self._url = url

    def rows(self, sql: str) -> list[list[str]]:
        """The rows of a query, as text. Raises `SqlFailedError` with psql's sentence."""
        output = self._run(["-A", "-t", "-F", "\x1f", "-c", sql], None)
        return [line.split("\x1f") for line in output.splitlines()]

    def copy_in(self, sql: str, data: IO[bytes]) -> None:
        """``COPY … FROM STDIN`` with the bytes of `data`."""
        command = [str(self._program), self._url, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", sql]
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
        command = [str(self._program), self._url, "-X", "-q", "-v", "ON_ERROR_STOP=1", *arguments]
        done = subprocess.run(command, env=self._environment, input=data, capture_output=True, check=False)
        _check(done.returncode, done.stderr)
        return done.stdout.decode()


def _check(code: int, errors: Any) -> None:
    if code != 0:
        told = errors.decode("utf-8", "replace").partition("\nLINE ")[0]  # the SQL is ours, not the user's
        raise SqlFailedError(told.strip() or f"psql ended with code {code}")
