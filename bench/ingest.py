"""[ingest_pgbench_mb_s, ingest_copy_mb_s] WAL into a pageserver that has one core for everything.

A real pageserver process, bound to one core from its start, takes WAL over the replication protocol from
a plain PostgreSQL of the same build that has it ready; the sender and this program have the other cores.
What the pageserver does besides, such as writing layers and their manifests durably, counts. The WAL is
that of a compute (full_page_writes off, as safekeepers get it): TPC-B with eight clients, and COPY into a
table with a primary key. Each round is a new timeline of the same history; the time is taken from the
pageserver's own last_record_lsn, asked for every 20 ms. 1 MB = 10^6 bytes of WAL.
"""

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.model import Bench, Effort, Samples
from bench.peer import running_server
from bench.pgbench import BenchFailedError, Target, load
from excimer.base.ids import TenantId, TimelineId, new_tenant_id, new_timeline_id
from excimer.base.lsn import Lsn, parse_lsn
from excimer.io.processes import give_to_user
from excimer.pageserver.bootstrap import initdb_template
from excimer.wire.auth import generate_key_pair
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.pageservers import PageserverProcess

CLIENTS = 8
POLL_S = 0.02
ARRIVAL_LIMIT_S = 600.0
CHANCE = random.SystemRandom()

SOURCE_SETTINGS = {
    "wal_keep_size": "16GB",
    "max_wal_size": "16GB",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
}
ROWS = (
    "copy (select g, timestamptz '2026-01-01' + g * interval '1 second', g % 1000, repeat(md5(g::text), 2)"
    " from generate_series(1, {rows}) g) to '{path}'"
)
COPIED = "create table copied(key int primary key, moment timestamptz, value int, filler text)"


class Marks(NamedTuple):
    """Where in the source's WAL the two measured parts lie."""

    start: Lsn
    """Of TPC-B; before it is the load of the tables."""
    middle: Lsn
    """End of TPC-B, start of COPY."""
    end: Lsn


class Sample(NamedTuple):
    time_s: float
    cpu_s: float
    """That the pageserver has used: tells its cost when other programs want its core as well."""
    lsn: Lsn


class Rate(NamedTuple):
    mb_per_s: float
    mb_per_cpu_s: float


def measure(bench: Bench) -> Samples:
    with _root() as root, _source(root) as source:
        marks = _write_wal(source, root, bench.effort)
        bench.note(
            f"WAL: TPC-B {(marks.middle - marks.start) / 1e6:.0f} MB,"
            f" COPY {(marks.end - marks.middle) / 1e6:.0f} MB"
        )
        with _pinned_pageserver(root, source) as server:
            rounds = [_ingest_once(server, marks) for _ in range(bench.effort.rounds)]
    for what, rates in (("TPC-B", [each[0] for each in rounds]), ("COPY", [each[1] for each in rounds])):
        bench.note(f"ingest of {what}, MB/s: {', '.join(f'{rate.mb_per_s:.1f}' for rate in rates)}")
        per_cpu = ", ".join(f"{rate.mb_per_cpu_s:.1f}" for rate in rates)
        bench.note(f"ingest of {what}, MB per second of the pageserver's CPU time: {per_cpu}")
    return {
        "ingest_pgbench_mb_s": [pgbench.mb_per_s for pgbench, _ in rounds],
        "ingest_copy_mb_s": [copied.mb_per_s for _, copied in rounds],
    }


@contextlib.contextmanager
def _root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="excimer-bench-"))
    root.chmod(0o777)  # the source writes its rows here, as a user without rights
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _source(root: Path) -> Iterator[Target]:
    """A plain server on the cluster that a new timeline of the pageserver begins with."""
    build = build_of(NEWEST_VERSION)
    data_dir = root / "source"
    shutil.copytree(initdb_template(build), data_dir, symlinks=True)
    for path in [data_dir, *data_dir.rglob("*")]:
        give_to_user(path)
    with running_server(build, data_dir, SOURCE_SETTINGS) as target:
        yield target


def _write_wal(source: Target, root: Path, effort: Effort) -> Marks:
    load(source, effort.pgbench_scale)
    source.sql(COPIED, ROWS.format(rows=effort.ingest_rows, path=root / "rows"))
    start = _flushed(source)
    count = str(effort.ingest_transactions // CLIENTS)
    source.run("pgbench", "-n", "-c", str(CLIENTS), "-j", "2", "-t", count)
    middle = _flushed(source)
    source.sql(f"copy copied from '{root / 'rows'}'")
    return Marks(start, middle, _flushed(source))


def _flushed(source: Target) -> Lsn:
    source.sql("checkpoint")
    return parse_lsn(source.sql("select pg_current_wal_flush_lsn()").strip())


@contextlib.contextmanager
def _pinned_pageserver(root: Path, source: Target) -> Iterator[PageserverProcess]:
    server = PageserverProcess(
        root / "pageserver", generate_key_pair(), wal_sources=[f"127.0.0.1:{source.port}"]
    )
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})  # inherited by all its threads
        try:
            server.start()
        finally:
            os.sched_setaffinity(0, cores - {min(cores)} or cores)
        yield server
    finally:
        os.sched_setaffinity(0, cores)
        server.end()


def _ingest_once(server: PageserverProcess, marks: Marks) -> tuple[Rate, Rate]:
    """Of both parts."""
    tenant_id, timeline_id = new_tenant_id(CHANCE), new_timeline_id(CHANCE)
    server.created("/tenant", {"tenant_id": tenant_id, "generation": 1})
    body = {"new_timeline_id": timeline_id, "pg_version": NEWEST_VERSION}
    server.created(f"/tenant/{tenant_id}/timeline", body)
    samples = _watch(server, tenant_id, timeline_id, marks.end)
    if server.request("DELETE", f"/tenant/{tenant_id}").is_error:
        raise BenchFailedError("the pageserver does not delete its tenant")
    return _rate(samples, marks.start, marks.middle), _rate(samples, marks.middle, marks.end)


def _watch(
    server: PageserverProcess, tenant_id: TenantId, timeline_id: TimelineId, end_lsn: Lsn
) -> list[Sample]:
    """How far ingest was at which time, until it reaches `end_lsn`."""
    deadline = time.monotonic() + ARRIVAL_LIMIT_S
    samples: list[Sample] = []
    while not samples or samples[-1].lsn < end_lsn:
        if time.monotonic() > deadline:
            raise BenchFailedError(f"ingest does not end: {server.log.read_text()[-2000:]}")
        lsn = server.last_record_lsn(tenant_id, timeline_id)
        samples.append(Sample(time.monotonic(), _cpu_s(server), lsn))
        time.sleep(POLL_S)
    return samples


def _cpu_s(server: PageserverProcess) -> float:
    assert server.process is not None
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rate(samples: list[Sample], start_lsn: Lsn, end_lsn: Lsn) -> Rate:
    """Between the first samples at or after both LSNs."""
    first = next(sample for sample in samples if sample.lsn >= start_lsn)
    last = next(sample for sample in samples if sample.lsn >= end_lsn)
    if last.time_s - first.time_s < 5 * POLL_S:
        raise BenchFailedError(f"too little WAL to measure: {last.lsn - first.lsn} bytes")
    megabytes = (last.lsn - first.lsn) / 1e6
    cpu_s = max(last.cpu_s - first.cpu_s, 0.01)
    return Rate(megabytes / (last.time_s - first.time_s), megabytes / cpu_s)
