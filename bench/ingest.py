"""[ingest_pgbench_mb_s, ingest_copy_mb_s, ingest_vs_recovery_ratio] WAL into durable layers, on one core.

A real pageserver process, bound to one core from its start, takes WAL over the replication protocol; the
sender (`wal_replay`) and this program have the other cores. The WAL is that of a compute (full_page_writes
off, as safekeepers get it): TPC-B with eight clients, and COPY into a table with a primary key, written
before.

Each round is a new timeline of the same history. The WAL before a measured part is sent and flushed first;
the clock then runs from the moment the part may be sent until a flush that was asked for when its last
record had arrived has returned: every value is then in L0 layers that are synced, uploaded (to a local
directory) and named by a durable manifest. 1 MB = 10^6 bytes of WAL.

The peer is PostgreSQL's own crash recovery of both parts' WAL, in the same round, bound to the same core:
a copy of the cluster as its checkpoint before the parts left it, with all WAL in pg_wal, started; the time
is what its log says of redo ("redo done at ... elapsed"), so neither its start nor its last checkpoint
counts.
"""

import contextlib
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.cores import away_from_it, bound_to_one_core, cpu_s
from bench.model import Bench, Effort, Samples
from bench.peer import running_server
from bench.pgbench import BenchFailedError, Target, load
from bench.wal_replay import WalReplay
from excimer.base.ids import new_tenant_id, new_timeline_id
from excimer.base.lsn import Lsn, parse_lsn
from excimer.io.processes import give_to_user, make_owned_dir, run
from excimer.pageserver.bootstrap import initdb_template
from excimer.pgformat.wal_segment import parse_segment_name, segment_name
from excimer.wire.auth import generate_key_pair
from tests.kit.builds import NEWEST_VERSION, build_of
from tests.kit.pageservers import PageserverProcess

CLIENTS = 8
POLL_S = 0.01
ARRIVAL_LIMIT_S = 600.0
SEGMENT_BYTES = 16 << 20
CHANCE = random.SystemRandom()

SOURCE_SETTINGS = {
    "wal_keep_size": "16GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1d",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
}
ROWS = (
    "copy (select g, timestamptz '2026-01-01' + g * interval '1 second', g % 1000, repeat(md5(g::text), 2)"
    " from generate_series(1, {rows}) g) to '{path}'"
)
COPIED = "create table copied(key int primary key, moment timestamptz, value int, filler text)"
_REDO_STARTS = re.compile(r"redo starts at ([0-9A-F]+/[0-9A-F]+)")
_REDO_DONE = re.compile(r"redo done at ([0-9A-F]+/[0-9A-F]+).*elapsed: ([0-9.]+) s")


class Marks(NamedTuple):
    """Where in the WAL the two measured parts lie."""

    start: Lsn
    """Of TPC-B; before it is the load of the tables."""
    middle: Lsn
    """End of TPC-B, start of COPY."""
    end: Lsn


class Source(NamedTuple):
    marks: Marks
    wal: bytes
    wal_lsn: Lsn
    """Where `wal` begins."""
    data_dir: Path
    """The cluster at its end; for its WAL."""
    base_dir: Path
    """As it was, running, after the checkpoint before `marks.start`."""


class Part(NamedTuple):
    size_bytes: int
    time_s: float
    cpu_s: float
    """That the pageserver has used: tells its cost when other programs want its core as well."""

    @property
    def mb_per_s(self) -> float:
        return self.size_bytes / self.time_s / 1e6


class Round(NamedTuple):
    pgbench: Part
    copied: Part
    recovery_mb_per_s: float
    """Of PostgreSQL, over both parts."""

    @property
    def mb_per_s(self) -> float:
        size = self.pgbench.size_bytes + self.copied.size_bytes
        return size / (self.pgbench.time_s + self.copied.time_s) / 1e6


def measure(bench: Bench) -> Samples:
    with _root() as root:
        source = _write_source(root, bench.effort)
        marks = source.marks
        bench.note(
            f"WAL: TPC-B {(marks.middle - marks.start) / 1e6:.0f} MB,"
            f" COPY {(marks.end - marks.middle) / 1e6:.0f} MB"
        )
        rounds: list[Round] = []
        with (
            WalReplay(source.wal, source.wal_lsn) as replay,
            _pageserver(root, replay) as server,
            away_from_it(),
        ):
            for _ in range(bench.effort.rounds):
                rounds.append(Round(*_ingest_once(server, replay, marks), _recover_once(root, source)))
    _note_rounds(bench, "TPC-B", [each.pgbench for each in rounds])
    _note_rounds(bench, "COPY", [each.copied for each in rounds])
    recovered = ", ".join(f"{each.recovery_mb_per_s:.1f}" for each in rounds)
    bench.note(f"PostgreSQL's recovery of both, MB/s: {recovered}")
    return {
        "ingest_pgbench_mb_s": [each.pgbench.mb_per_s for each in rounds],
        "ingest_copy_mb_s": [each.copied.mb_per_s for each in rounds],
        "ingest_vs_recovery_ratio": [each.mb_per_s / each.recovery_mb_per_s for each in rounds],
    }


def _note_rounds(bench: Bench, what: str, parts: list[Part]) -> None:
    bench.note(f"ingest of {what}, MB/s: {', '.join(f'{part.mb_per_s:.1f}' for part in parts)}")
    per_cpu = ", ".join(f"{part.size_bytes / part.cpu_s / 1e6:.1f}" for part in parts)
    bench.note(f"ingest of {what}, MB per second of the pageserver's CPU time: {per_cpu}")


@contextlib.contextmanager
def _root() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(prefix="excimer-bench-"))
    root.chmod(0o777)  # the source writes its rows here, as a user without rights
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _write_source(root: Path, effort: Effort) -> Source:
    """By a plain server on the cluster that a new timeline of the pageserver begins with."""
    build = build_of(NEWEST_VERSION)
    data_dir, base_dir = root / "source", root / "base"
    shutil.copytree(initdb_template(build), data_dir, symlinks=True)
    for path in [data_dir, *data_dir.rglob("*")]:
        give_to_user(path)
    with running_server(build, data_dir, SOURCE_SETTINGS) as source:
        load(source, effort.pgbench_scale)
        source.sql(COPIED, ROWS.format(rows=effort.ingest_rows, path=root / "rows"))
        start = _checkpoint(source)
        _copy(data_dir, base_dir)
        (base_dir / "postmaster.pid").unlink()
        count = str(effort.ingest_transactions // CLIENTS)
        source.run("pgbench", "-n", "-c", str(CLIENTS), "-j", "2", "-t", count)
        middle = _checkpoint(source)
        source.sql(f"copy copied from '{root / 'rows'}'")
        end = _checkpoint(source)
    (root / "rows").unlink()
    wal, wal_lsn = _read_wal(data_dir, end)
    return Source(Marks(start, middle, end), wal, wal_lsn, data_dir, base_dir)


def _checkpoint(source: Target) -> Lsn:
    source.sql("checkpoint")
    return parse_lsn(source.sql("select pg_current_wal_flush_lsn()").strip())


def _read_wal(data_dir: Path, end_lsn: Lsn) -> tuple[bytes, Lsn]:
    names = sorted(path.name for path in (data_dir / "pg_wal").iterdir() if len(path.name) == 24)
    oldest = parse_segment_name(names[0], SEGMENT_BYTES)
    if oldest is None:
        raise BenchFailedError(f"{names[0]} is no segment of WAL")
    first = oldest.number
    last = (end_lsn - 1) // SEGMENT_BYTES
    numbers = range(first, last + 1)
    data = b"".join(
        (data_dir / "pg_wal" / segment_name(1, number, SEGMENT_BYTES)).read_bytes() for number in numbers
    )
    wal_lsn = Lsn(first * SEGMENT_BYTES)
    return data[: end_lsn - wal_lsn], wal_lsn


def _copy(source: Path, target: Path) -> None:
    make_owned_dir(target)
    run(["cp", "-a", "--reflink=auto", f"{source}/.", target])


@contextlib.contextmanager
def _pageserver(root: Path, replay: WalReplay) -> Iterator[PageserverProcess]:
    server = PageserverProcess(
        root / "pageserver", generate_key_pair(), wal_sources=[f"127.0.0.1:{replay.port}"]
    )
    try:
        with bound_to_one_core():
            server.start()
        yield server
    finally:
        server.end()


class _IngestRound:
    """One new timeline, fed part by part."""

    def __init__(self, server: PageserverProcess, replay: WalReplay) -> None:
        self._server = server
        self._replay = replay
        self._tenant_id, self._timeline_id = new_tenant_id(CHANCE), new_timeline_id(CHANCE)
        replay.hold()
        server.created("/tenant", {"tenant_id": self._tenant_id, "generation": 1})
        body = {"new_timeline_id": self._timeline_id, "pg_version": NEWEST_VERSION}
        server.created(f"/tenant/{self._tenant_id}/timeline", body)

    def feed(self, end_lsn: Lsn) -> tuple[float, float]:
        """Sends WAL up to `end_lsn` and makes it durable; wall and CPU time in seconds."""
        begun, cpu = time.monotonic(), cpu_s(self._server.process)
        self._replay.release(end_lsn)
        deadline = begun + ARRIVAL_LIMIT_S
        while self._server.last_record_lsn(self._tenant_id, self._timeline_id) < end_lsn:
            if time.monotonic() > deadline:
                raise BenchFailedError(f"ingest does not end: {self._server.log.read_text()[-2000:]}")
            time.sleep(POLL_S)
        path = f"/tenant/{self._tenant_id}/timeline/{self._timeline_id}/flush"
        answer = self._server.request("POST", path)
        if answer.is_error or parse_lsn(answer.json()["remote_consistent_lsn"]) < end_lsn:
            raise BenchFailedError(f"the flush failed: {answer.text}")
        return time.monotonic() - begun, cpu_s(self._server.process) - cpu

    def delete(self) -> None:
        if self._server.request("DELETE", f"/tenant/{self._tenant_id}").is_error:
            raise BenchFailedError("the pageserver does not delete its tenant")


def _ingest_once(server: PageserverProcess, replay: WalReplay, marks: Marks) -> tuple[Part, Part]:
    """Both parts."""
    ingest = _IngestRound(server, replay)
    ingest.feed(marks.start)
    pgbench = Part(marks.middle - marks.start, *ingest.feed(marks.middle))
    copied = Part(marks.end - marks.middle, *ingest.feed(marks.end))
    ingest.delete()
    return pgbench, copied


def _recover_once(root: Path, source: Source) -> float:
    """MB/s of PostgreSQL's own recovery."""
    data_dir = root / "recovered"
    _copy(source.base_dir, data_dir)
    shutil.rmtree(data_dir / "pg_wal")
    _copy(source.data_dir / "pg_wal", data_dir / "pg_wal")
    with bound_to_one_core(), running_server(build_of(NEWEST_VERSION), data_dir, SOURCE_SETTINGS):
        pass
    log_path = data_dir.with_name(data_dir.name + ".log")
    text = log_path.read_text()
    starts, done = _REDO_STARTS.search(text), _REDO_DONE.search(text)
    if starts is None or done is None:
        raise BenchFailedError(f"PostgreSQL has not recovered: {text[-2000:]}")
    log_path.unlink()
    shutil.rmtree(data_dir)
    return (parse_lsn(done[1]) - parse_lsn(starts[1])) / float(done[2]) / 1e6
