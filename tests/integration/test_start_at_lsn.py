"""Stock PostgreSQL of each version starts at the end of its WAL with nothing but our prefix before it."""

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.base.lsn import Lsn, format_lsn
from excimer.compute.postgres_process import PostgresProcess, PostgresStartError, kill_left_behind
from excimer.io.processes import give_to_user, make_owned_dir
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.wal_prefix import StandbyPoint, build_wal_prefix, wal_segment_file_name
from excimer.postgres import PostgresBuild, run_initdb
from tests.kit.builds import ALL_VERSIONS, build_of
from tests.kit.ports import free_port

SHUTDOWN_CHECKPOINT_BYTES = 120


class Cluster:
    """A plain data directory of one build, started and stopped by the compute's own code."""

    def __init__(self, build: PostgresBuild, root: Path) -> None:
        self.build = build
        self.data_dir = root / "data"
        self.log = root / "log"
        self.port = free_port()
        self.socket_dir = Path("/tmp") / f"excimer-test-{secrets.token_hex(8)}"

    def configure(self, extra: str = "") -> None:
        make_owned_dir(self.socket_dir)
        with (self.data_dir / "postgresql.conf").open("a") as configuration:
            configuration.write(
                f"port={self.port}\nlisten_addresses='127.0.0.1'\nfsync=off\nmax_prepared_transactions=5\n"
                f"unix_socket_directories='{self.socket_dir}'\n{extra}"
            )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[PostgresProcess]:
        environment = self.build.whole_environment()
        process = PostgresProcess.start(self.build.postgres, self.data_dir, environment, self.log)
        try:
            await process.wait_ready()
            yield process
        finally:
            await process.stop()

    def query(self, *statements: str) -> list[tuple[object, ...]]:
        url = f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def control(self) -> ControlFile:
        data = (self.data_dir / "global/pg_control").read_bytes()
        return ControlFile.unpack(data, self.build.version)

    def lay_prefix(self, *, knows_last_record: bool, hot_standby: bool = False) -> Lsn:
        """Throws all WAL away and lays the prefix; the last record is the shutdown checkpoint."""
        control = self.control()
        last = control.checkpoint_lsn
        end = last + SHUTDOWN_CHECKPOINT_BYTES
        assert last // 8192 == end // 8192, "the shutdown checkpoint crosses a page: choose another filler"
        prefix = build_wal_prefix(
            pg_version=self.build.version,
            template=control,
            checkpoint=control.checkpoint,
            end_lsn=Lsn(end),
            prev_lsn=Lsn(last if knows_last_record else 0),
            now_s=int(time.time()),
            standby=StandbyPoint(Lsn(end)) if hot_standby else None,
        )
        (self.data_dir / "global/pg_control").write_bytes(prefix.control_file)
        wal_dir = self.data_dir / "pg_wal"
        for segment in wal_dir.glob("0*"):
            segment.unlink()
        for lsn, data in prefix.chunks:
            path = wal_dir / wal_segment_file_name(lsn, control.wal_segment_size)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(fd, control.wal_segment_size)
            os.pwrite(fd, data, lsn % control.wal_segment_size)
            os.close(fd)
            give_to_user(path)
        if hot_standby:
            (self.data_dir / "standby.signal").touch()
            give_to_user(self.data_dir / "standby.signal")
        return Lsn(end)


@pytest.fixture(params=ALL_VERSIONS, ids=lambda version: f"pg{version}")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    root = make_owned_dir(Path("/tmp") / f"excimer-start-{secrets.token_hex(8)}")
    cluster = Cluster(build_of(request.param), root)
    run_initdb(cluster.build, cluster.data_dir)
    cluster.configure()
    yield cluster
    shutil.rmtree(root)
    shutil.rmtree(cluster.socket_dir, ignore_errors=True)


async def prepare(cluster: Cluster) -> None:
    async with cluster.running():
        cluster.query(
            "create table t(a serial primary key, b text)",
            "insert into t(b) select repeat('z', 100) from generate_series(1, 1000)",
            "create unlogged table u as select generate_series(1, 10) as a",
        )
        cluster.query("begin", "insert into t(b) values('prepared')", "prepare transaction 'p'")


@pytest.mark.parametrize("knows_last_record", [True, False])
def test_a_primary_starts_and_writes_on(cluster: Cluster, knows_last_record: bool) -> None:
    async def scenario() -> None:
        await prepare(cluster)
        end = cluster.lay_prefix(knows_last_record=knows_last_record)
        async with cluster.running():
            assert cluster.query("select count(*) from t") == [(1000,)]
            assert cluster.query("select count(*) from u") == [(0,)], "unlogged relations are reset"
            assert cluster.query("select gid from pg_prepared_xacts") == [("p",)]
            cluster.query("commit prepared 'p'", "insert into t(b) values('after')")
            lsn = cluster.query("select pg_current_wal_lsn()::text")[0][0]
            assert cluster.query(f"select '{lsn}'::pg_lsn > '{format_lsn(end)}'::pg_lsn") == [(True,)]
        async with cluster.running():
            assert cluster.query("select count(*) from t") == [(1002,)]
        log = cluster.log.read_text()
        assert "redo done" in log
        assert "PANIC" not in log

    asyncio.run(scenario())


def test_a_static_endpoint_opens_read_only(cluster: Cluster) -> None:
    async def scenario() -> None:
        await prepare(cluster)
        cluster.lay_prefix(knows_last_record=True, hot_standby=True)
        async with cluster.running():
            assert cluster.query("select count(*) from t") == [(1000,)]
            assert cluster.query("select pg_is_in_recovery()") == [(True,)]
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                cluster.query("insert into t(b) values('no')")

    asyncio.run(scenario())


def sysv_segments() -> list[str]:
    return Path("/proc/sysvipc/shm").read_text().splitlines()[1:]


def shared_memory_segments(data_dir: Path) -> set[str]:
    """Ids of the System V segments that the postmaster of `data_dir` made."""
    pid = (data_dir / "postmaster.pid").read_text().split("\n")[0]
    return {line.split()[1] for line in sysv_segments() if line.split()[4] == pid}


def test_leftovers_are_killed_and_a_failed_start_is_an_error(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with cluster.running() as process:
            second = PostgresProcess.start(
                cluster.build.postgres, cluster.data_dir, cluster.build.whole_environment(), cluster.log
            )
            with pytest.raises(PostgresStartError, match="code 1 at start: lock file"):
                await second.wait_ready()
            segments = shared_memory_segments(cluster.data_dir)
            assert segments
            os.kill(process.pid, signal.SIGSTOP)
            await kill_left_behind(cluster.data_dir)
            assert await process.wait_exit() == -signal.SIGKILL
            assert not segments & {line.split()[1] for line in sysv_segments()}

    asyncio.run(scenario())
