"""[cold_scan_mb_s, cold_scan_ratio, cold_random_pages_s] Reads of a compute that has nothing yet.

cold_scan_mb_s: `select count(*)` over one table, PostgreSQL's default parallelism, on an endpoint that was
stopped and started before each round, so that its data directory is new and every page comes from the
pageserver; nothing is prefetched (`prefetch_max_mib = 0`). The table was written by one INSERT; the
pageserver has it in layers and has compacted what it wants to. The pageserver's own cache of layers is warm.
Size over time of the statement, 1 MB = 10^6 bytes.

cold_scan_ratio: the time that plain PostgreSQL takes for the same statement on the same rows, of that time.
It was started just before, and the kernel has none of its files cached.

cold_random_pages_s: sixteen clients fetch rows of random blocks of that table by their place; blocks that
were absent when they were asked for, over the time of the run. At most a third of the table is fetched.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from bench.excimer_stack import ENDPOINT, MeasuredStack, measured_stack
from bench.model import Bench, Samples
from bench.peer import running_server
from bench.pgbench import Target, run_pgbench
from excimer.io.processes import make_owned_dir
from excimer.postgres import PostgresBuild, run_initdb

IDS = ("cold_scan_mb_s", "cold_scan_ratio", "cold_random_pages_s")
TABLE = "create table scanned(key int, moment timestamptz, value int, filler text)"
FILL = (
    "insert into scanned select g, timestamptz '2026-01-01' + g * interval '1 second', g % 1000,"
    " repeat(md5(g::text), 2)"
    " from generate_series(1, {rows}) g"
)
VACUUM = "vacuum (freeze, analyze) scanned"
SCAN = "select count(*) from scanned"
CLIENTS = 16
TRANSACTIONS_PART = 3 * CLIENTS
"""Each client fetches one row of so many blocks: then hardly any block is asked for twice."""


def measure(bench: Bench) -> Samples:
    rates, ratios, pages = [], [], []
    with measured_stack() as ours, plain_directory(ours.target.build, bench.effort.scan_rows) as plain:
        ours.configure("prefetch_max_mib = 0")
        ours.target.sql(TABLE, FILL.format(rows=bench.effort.scan_rows), VACUUM)
        ours.settle()
        size_bytes = int(ours.target.sql("select pg_relation_size('scanned')"))
        for _ in range(bench.effort.rounds):
            ours.restart()
            ours_s = _scan_s(ours.stack.url(ENDPOINT))
            plain_s = _scan_plain_s(ours.target.build, plain)
            rates.append(size_bytes / ours_s / 1e6)
            ratios.append(plain_s / ours_s)
            ours.restart()
            pages.append(_random_pages_s(ours, size_bytes // 8192))
    rounds = ", ".join(f"{rate:.0f}" for rate in rates)
    bench.note(f"cold scan of {size_bytes / 1e6:.0f} MB, MB/s: {rounds}")
    bench.note(f"plain PostgreSQL's time for it, of ours: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    bench.note(f"random pages per second: {', '.join(f'{rate:,.0f}' for rate in pages)}")
    return {"cold_scan_mb_s": rates, "cold_scan_ratio": ratios, "cold_random_pages_s": pages}


def _scan_s(url: str) -> float:
    with psycopg.connect(url) as connection:
        begun = time.monotonic()
        connection.execute(SCAN).fetchall()
        return time.monotonic() - begun


@contextlib.contextmanager
def plain_directory(build: PostgresBuild, rows: int) -> Iterator[Path]:
    """A stopped plain cluster that has the table."""
    root = Path(tempfile.mkdtemp(prefix="excimer-bench-"))
    root.chmod(0o755)
    data_dir = make_owned_dir(root / "plain") / "data"
    try:
        run_initdb(build, data_dir)
        with running_server(build, data_dir, {}) as target:
            target.sql(TABLE, FILL.format(rows=rows), VACUUM)
        yield data_dir
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _scan_plain_s(build: PostgresBuild, data_dir: Path) -> float:
    with running_server(build, data_dir, {}) as target:
        _drop_cached(data_dir / "base")
        return _scan_s(f"host=127.0.0.1 port={target.port} user=postgres dbname=postgres")


def _drop_cached(directory: Path) -> None:
    """Of files that are on the disk, the kernel forgets what it has."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _random_pages_s(ours: MeasuredStack, blocks: int) -> float:
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(f"\\set block random(0, {blocks - 1})\n")
        script.write("select value from scanned where ctid = ('(' || :block || ',1)')::tid;\n")
        script.flush()
        target, misses = ours.target, _misses(ours.target)
        options = ("-f", script.name, "-M", "prepared")
        report = run_pgbench(target, *options, clients=CLIENTS, transactions=blocks // TRANSACTIONS_PART)
        return (_misses(target) - misses) / (
            CLIENTS * (blocks // TRANSACTIONS_PART) / report.transactions_per_s
        )


def _misses(target: Target) -> int:
    return int(target.sql("show excimer.cache_misses"))
