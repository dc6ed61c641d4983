"""A stock PostgreSQL on a plain data directory, for tests of what streams its WAL."""

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg

from excimer.base.lsn import Lsn, parse_lsn
from excimer.compute.postgres_process import PostgresProcess
from excimer.compute.proposer import PostgresAddress
from excimer.io.processes import give_to_user, make_owned_dir
from excimer.postgres import PostgresBuild, run_initdb
from tests.kit.ports import free_port

PROPOSER_CONFIGURATION = "synchronous_standby_names = 'excimer_proposer'\n"


class PlainPostgres:
    """One cluster in a directory of its own under /tmp, where PostgreSQL's user can reach it."""

    def __init__(self, build: PostgresBuild) -> None:
        self.build = build
        self.port = free_port()
        self.root = (
            Path("/tmp") / f"excimer-plain-{secrets.token_hex(8)}"
        )  # short: a socket's path has a limit
        self.data_dir = self.root / "data"
        self.process: PostgresProcess | None = None

    @property
    def address(self) -> PostgresAddress:
        return PostgresAddress(str(self.root), self.port, self.build.version)

    @property
    def url(self) -> str:
        return f"host={self.root} port={self.port} user=postgres dbname=postgres"

    def create(self, configuration: str = "", template: Path | None = None) -> None:
        make_owned_dir(self.root)
        if template is None:
            run_initdb(self.build, self.data_dir)
        else:
            shutil.copytree(template, self.data_dir, symlinks=True)
            for path in [self.data_dir, *self.data_dir.rglob("*")]:
                give_to_user(path)
            self.data_dir.chmod(0o700)  # a template in the cache can be read by all, a cluster must not
        self.configure(configuration)

    def configure(self, configuration: str = "") -> None:
        """Adds to postgresql.conf."""
        with (self.data_dir / "postgresql.conf").open("a") as file:
            file.write(
                f"port={self.port}\nlisten_addresses=''\nunix_socket_directories='{self.root}'\n"
                f"autovacuum=off\nmax_wal_senders=10\n{configuration}"
            )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["PlainPostgres"]:
        environment = self.build.whole_environment()
        process = PostgresProcess.start(self.build.postgres, self.data_dir, environment, self.root / "log")
        self.process = process
        try:
            await process.wait_ready()
            yield self
        finally:
            if self.process is not None:
                # Quick: a fast stop would wait for a standby that may be gone.
                await process.kill()

    async def connect(self) -> "psycopg.AsyncConnection[tuple[object, ...]]":
        return await psycopg.AsyncConnection.connect(self.url, autocommit=True)

    async def value(self, query: str) -> str:
        """The one value of a query's answer, as text."""
        async with await self.connect() as connection:
            cursor = await connection.execute(query.encode())
            row = await cursor.fetchone()
            assert row is not None
            return str(row[0])

    async def flush_lsn(self) -> Lsn:
        return parse_lsn(await self.value("select pg_current_wal_flush_lsn()"))

    async def system_id(self) -> int:
        return int(await self.value("select system_identifier from pg_control_system()"))

    def suspend(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
