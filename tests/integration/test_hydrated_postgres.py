"""Stock PostgreSQL on an empty directory whose pages come from a page server: it must not notice.

The truth is a stopped plain cluster, whose files a fake page server serves.
"""

import asyncio
import contextlib
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from excimer.base.ids import TenantId, TimelineId
from excimer.compute.arena import Arena, ArenaSettings, preload_environment
from excimer.compute.postgres_process import PostgresProcess
from excimer.io.processes import make_owned_dir, run
from excimer.postgres import PostgresBuild, run_initdb
from tests.kit.builds import ALL_VERSIONS, NEWEST_VERSION, build_of
from tests.kit.fake_page_server import FakePageServer
from tests.kit.lazy_cluster import split_cluster
from tests.kit.ports import free_port

ROWS = 30_000
CANCEL_LIMIT_S = 2.0
INVARIANT = """
    select (select sum(abalance) from pgbench_accounts) = total
       and (select sum(tbalance) from pgbench_tellers) = total
       and (select sum(bbalance) from pgbench_branches) = total
      from (select coalesce(sum(delta), 0) as total from pgbench_history) h
"""
SUMS = "select count(*), sum(hashtextextended(docs::text, 0)::numeric) from docs"
CHECK_INDEXES = """
    select count(bt_index_parent_check(c.oid, true)) from pg_class c join pg_am a on a.oid = c.relam
     where a.amname = 'btree' and c.relkind = 'i' and c.relpersistence = 'p'
"""
CHECK_HEAPS = """
    select count(v.*) from pg_class c, lateral verify_heapam(c.oid) v
     where c.relkind in ('r', 't', 'm') and c.relpersistence = 'p'
"""


class Cluster:
    """One version's truth, and the lazy copies that tests make of it."""

    def __init__(self, build: PostgresBuild, root: Path) -> None:
        self.build = build
        self.root = root
        self.truth = root / "truth"
        self.port = free_port()
        self.log = root / "log"
        self.sums: list[tuple[object, ...]] = []

    def connect(self, database: str = "postgres") -> "psycopg.Connection[tuple[object, ...]]":
        url = f"host=127.0.0.1 port={self.port} user=postgres dbname={database}"
        return psycopg.connect(url, autocommit=True)

    def query(self, *statements: str, database: str = "postgres") -> list[tuple[object, ...]]:
        with self.connect(database) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def pgbench(self, *options: str) -> None:
        arguments = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", *options, "postgres"]
        run(
            [self.build.program("pgbench"), *arguments],
            environment=self.build.whole_environment(),
            timeout_s=120,
        )

    @contextlib.asynccontextmanager
    async def running(self, data_dir: Path, extra: dict[str, str] | None = None) -> AsyncIterator[None]:
        environment = self.build.whole_environment(extra)
        process = PostgresProcess.start(self.build.postgres, data_dir, environment, self.log)
        try:
            await process.wait_ready()
            yield
        finally:
            await process.stop()

    def make_truth(self) -> None:
        run_initdb(self.build, self.truth)
        with (self.truth / "postgresql.conf").open("a") as configuration:
            configuration.write(
                f"port={self.port}\nlisten_addresses='127.0.0.1'\nunix_socket_directories=''\nfsync=off\n"
                "full_page_writes=off\nautovacuum=off\nrestart_after_crash=off\nmax_wal_size=4GB\n"
                "parallel_setup_cost=0\nmin_parallel_table_scan_size=1MB\n"
            )

        async def fill() -> None:
            async with self.running(self.truth):
                self.query(
                    "create table docs(id int primary key, t text) with (fillfactor = 70)",
                    f"insert into docs select g, repeat(md5(g::text), 5) from generate_series(1, {ROWS}) g",
                    "create index docs_hash on docs(md5(t))",
                    "create unlogged table scratch(a int primary key)",
                    "insert into scratch select generate_series(1, 100)",
                    "create extension amcheck",
                    "create database template_full template template0",
                    "vacuum analyze",
                )
                self.query("create table x as select generate_series(1, 5000) g", database="template_full")
                self.pgbench("-i", "-q", "-s", "1")
                self.sums = self.query(SUMS)

        asyncio.run(fill())

    def lazy(self, name: str, address: str) -> tuple[Path, Arena]:
        data_dir = make_owned_dir(self.root / name)
        settings = ArenaSettings(address, TenantId("ab" * 16), TimelineId("cd" * 16), "token")
        return data_dir, split_cluster(self.truth, data_dir, self.root / f"{name}.arena", settings)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@pytest.fixture(scope="module", params=ALL_VERSIONS, ids=lambda version: f"pg{version}")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    root = make_owned_dir(Path("/tmp") / f"excimer-hydrated-{secrets.token_hex(8)}")
    cluster = Cluster(build_of(request.param), root)
    cluster.make_truth()
    yield cluster
    shutil.rmtree(root)


def io_methods(version: int) -> list[str]:
    """Configuration lines of the ways to read that a version has."""
    return ["io_method=worker\n", "io_method=sync\n"] if version >= 18 else [""]


def walk(cluster: Cluster) -> None:
    """Everything that touches files in its own way, on a cold directory."""
    query = cluster.query
    with_strategy = cluster.build.version >= 15
    assert query("select count(*) from scratch") == [(100,)]
    query("create database copied template template_full" + " strategy file_copy" * with_strategy)
    if with_strategy:
        query("create database logged template template_full strategy wal_log")
        assert query("select sum(g) from x", database="logged") == [(12502500,)]
    assert query("select sum(g) from x", database="copied") == [(12502500,)]
    cluster.pgbench("-n", "-c", "4", "-T", "2")
    assert query(INVARIANT) == [(True,)]
    query(f"delete from docs where id > {ROWS // 2}", "vacuum docs")
    query(
        f"insert into docs select g, repeat(md5(g::text), 5) from generate_series({ROWS // 2 + 1}, {ROWS}) g"
    )
    query("create index on docs(t, id)", "reindex index docs_hash", "truncate scratch")
    query("vacuum (freeze, analyze)", "checkpoint")
    assert query(CHECK_INDEXES)[0][0] != 0
    assert query(CHECK_HEAPS) == [(0,)]
    query("drop database template_full", "drop database copied", "checkpoint")


def test_postgresql_does_not_notice(cluster: Cluster) -> None:
    async def scenario(server: FakePageServer) -> None:
        data_dir, arena = cluster.lazy("lazy", server.address)
        preload = preload_environment(cluster.root / "lazy.arena")
        methods = io_methods(cluster.build.version)
        append(data_dir / "postgresql.conf", methods[0])
        async with cluster.running(data_dir, preload):
            arena.set_ready()
            assert cluster.query(SUMS) == cluster.sums
            await asyncio.to_thread(walk, cluster)
            assert cluster.query(SUMS) == cluster.sums
            assert cluster.query("select pg_database_size('template1') > 5000000") == [(True,)]
        append(data_dir / "postgresql.conf", methods[-1])
        async with cluster.running(data_dir, preload):
            assert cluster.query(SUMS) == cluster.sums
            assert cluster.query(INVARIANT) == [(True,)]
            assert cluster.query(CHECK_HEAPS) == [(0,)]
        statistics = arena.statistics()
        assert (statistics.errors, statistics.retries, statistics.stale_descriptors) == (0, 0, 0)
        assert statistics.blocks > 1000
        arena.close()

    with FakePageServer(cluster.truth) as server:
        asyncio.run(scenario(server))
    log = cluster.log.read_text()
    assert not any(word in log for word in ("PANIC", "invalid page", "could not read", "libhydrate"))


class PageServerProcess:
    """The fake server as a process, which can be stopped and killed."""

    def __init__(self, pages_dir: Path, port: int) -> None:
        self._arguments = ["-m", "tests.kit.fake_page_server", str(pages_dir), str(port)]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *self._arguments],
            cwd=Path(__file__).parents[2],
            env={"PYTHONPATH": "src:."},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class CancelledQuery(threading.Thread):
    """A query that is running when it is cancelled; says how long that took."""

    def __init__(self, connection: "psycopg.Connection[tuple[object, ...]]", text: str) -> None:
        super().__init__()
        self._connection = connection
        self._text = text
        self.error: psycopg.Error | None = None
        self.start()

    def run(self) -> None:
        try:
            self._connection.execute(self._text.encode())
        except psycopg.Error as error:
            self.error = error

    def cancel(self) -> float:
        start = time.monotonic()
        self._connection.cancel()
        self.join(20)
        assert self.error is not None, "the query was not cancelled"
        return time.monotonic() - start


@pytest.mark.parametrize("outage", ["hangs", "is dead"])
def test_a_query_can_be_cancelled_while_the_page_server(cluster: Cluster, outage: str) -> None:
    if cluster.build.version not in (min(ALL_VERSIONS), NEWEST_VERSION):
        pytest.skip("the oldest and the newest version show the two ways that reads are made")
    port, hangs = free_port(), outage == "hangs"
    name = f"cancel-{outage[:2]}"

    async def scenario(server: PageServerProcess) -> None:
        data_dir, arena = cluster.lazy(name, f"127.0.0.1:{port}")
        append(data_dir / "postgresql.conf", io_methods(cluster.build.version)[-hangs])
        append(data_dir / "postgresql.conf", "max_parallel_workers_per_gather=0\n")
        async with cluster.running(data_dir, preload_environment(cluster.root / f"{name}.arena")):
            arena.set_ready()
            with cluster.connect() as one, cluster.connect() as two:
                for connection in (one, two):
                    connection.execute("set enable_seqscan = off")
                    connection.execute("select t from docs where id = 1")
                    connection.execute("explain select count(*) from pgbench_accounts")
                two.execute("set statement_timeout = 700")
                if hangs:
                    server.signal(signal.SIGSTOP)
                else:
                    server.close()
                assert await asyncio.to_thread(cancel_all, one, two) < CANCEL_LIMIT_S
                if hangs:
                    server.signal(signal.SIGCONT)
                else:
                    server.start()
                one.execute("set enable_seqscan = on")
                assert await asyncio.to_thread(lambda: one.execute(SUMS.encode()).fetchall()) == cluster.sums
        arena.close()

    with contextlib.closing(PageServerProcess(cluster.truth, port)) as server:
        asyncio.run(scenario(server))
    assert "PANIC" not in cluster.log.read_text()


def cancel_all(
    one: "psycopg.Connection[tuple[object, ...]]", two: "psycopg.Connection[tuple[object, ...]]"
) -> float:
    """Cancels a cold scan and a cold probe, and lets statement_timeout end another; the longest it took."""
    worst = 0.0
    for text in ("select t from docs where id = 16000", "select count(*) from pgbench_accounts"):
        query = CancelledQuery(one, text)
        time.sleep(0.7)
        assert query.is_alive()
        worst = max(worst, query.cancel())
    start = time.monotonic()
    with pytest.raises(psycopg.Error):
        two.execute("select t from docs where id = 24000")
    return max(worst, time.monotonic() - start - 0.7)


def test_binaries_import_nothing_that_passes_us_by(cluster: Cluster) -> None:
    """Of libc's calls that touch files by name or content, PostgreSQL imports only those that we know."""
    library = Path(preload_environment(Path("unused"))["LD_PRELOAD"])
    taken = symbols(library, "--defined-only")
    harmless = {
        *("fsync", "fdatasync", "sync_file_range", "syncfs", "lseek", "fstat", "__fxstat", "mmap"),
        *("mkdir", "rmdir", "link", "symlink", "readlink", "closedir", "readdir", "freopen", "chmod"),
        *("fread", "fgets", "fwrite", "ftello", "fseeko"),  # on streams that fopen() has hydrated
    }
    of_interest = {
        *("aio_read", "aio_write", "creat", "faccessat", "fallocate", "fdopen", "fstatat", "lio_listio"),
        *("mkstemp", "openat", "posix_fallocate", "preadv2", "process_vm_readv", "pwritev2", "readahead"),
        *("readv", "remove", "renameat", "renameat2", "sendfile", "splice", "statx", "syscall", "tee"),
        *("unlinkat", "writev", "nftw", "fts_open", "scandir", "mmap64", "vmsplice", "io_uring_setup"),
    }
    imported = symbols(cluster.build.postgres, "--undefined-only")
    assert {"open", "pread", "pwrite", "unlink"} <= imported & taken
    assert (imported & of_interest) - taken - harmless == set()
    assert {"QueryCancelPending", "ProcDiePending", "CritSectionCount"} <= symbols(
        cluster.build.postgres, "--defined-only"
    )


def symbols(path: Path, which: str) -> set[str]:
    output = subprocess.run(["nm", "-D", which, path], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in output.splitlines()}


def test_the_library_runs_with_old_glibc() -> None:
    library = Path(preload_environment(Path("unused"))["LD_PRELOAD"])
    output = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True)
    versions = {word.rpartition("@GLIBC_")[2] for word in output.stdout.decode().split() if "@GLIBC_" in word}
    assert versions
    assert max(tuple(map(int, version.split("."))) for version in versions) <= (2, 17)
