"""What is measured, how good it ought to be, and what a run of it gave."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec


class Goal(NamedTuple):
    """One figure and what it should reach."""

    id: str
    unit: str
    goal: float
    higher_is_better: bool
    what: str

    def is_met_by(self, value: float) -> bool:
        return value >= self.goal if self.higher_is_better else value <= self.goal


GOALS = {
    goal.id: goal
    for goal in (
        Goal("warm_select_ratio", "ratio", 0.95, True, "warm pgbench -S, of plain PostgreSQL's rate"),
        Goal("tpcb_quorum_ratio", "ratio", 1.1, True, "TPC-B, 16 clients, of plain PostgreSQL with a quorum"),
        Goal("commit_latency_ratio", "ratio", 0.95, False, "commit at one client, of that same PostgreSQL's"),
        Goal("tls_commit_latency_ratio", "ratio", 1.05, False, "commit at one client with TLS, of without"),
        Goal("tls_tpcb_ratio", "ratio", 0.95, True, "TPC-B with TLS between services, of without"),
        Goal(
            "backpressure_tps_ratio", "ratio", 0.7, True, "TPC-B beside three bulk loaders, of plain's rate"
        ),
        Goal("ingest_pgbench_mb_s", "MB/s", 100.0, True, "WAL of TPC-B into durable layers, on one core"),
        Goal("ingest_copy_mb_s", "MB/s", 100.0, True, "WAL of COPY into durable layers, on one core"),
        Goal("ingest_vs_recovery_ratio", "ratio", 0.376, True, "of both, of PostgreSQL's own recovery"),
        Goal("getpage_image_per_s", "/s", 30_000.0, True, "random single pages in images, on one core"),
        Goal("getpage_image_p50_us", "us", 100.0, False, "of these, one request at a time"),
        Goal("getpage_redo10_per_s", "/s", 10_000.0, True, "random single pages with ten records to redo"),
        Goal("getpage_seq_mb_s", "MB/s", 500.0, True, "pages in images, 128 adjacent ones a request"),
        Goal("cold_scan_mb_s", "MB/s", 500.0, True, "first sequential scan of a new compute"),
        Goal("cold_scan_ratio", "ratio", 0.5, True, "of that, of plain PostgreSQL's with cold files"),
        Goal("cold_random_pages_s", "/s", 12_000.0, True, "absent pages for 16 clients of a new compute"),
        Goal("prewarm_recovery_s", "s", 5.0, False, "until 90 % of warm pgbench -S, 1 GB, cold start"),
        Goal(
            "tpcb_fsync_ratio", "ratio", 1.0, True, "TPC-B, 16 clients, of plain PostgreSQL without replica"
        ),
        Goal("bulk_load_ratio", "ratio", 0.85, True, "COPY into a new table, of plain PostgreSQL's rate"),
        Goal("index_build_ratio", "ratio", 0.9, True, "CREATE INDEX on it, of plain PostgreSQL's rate"),
        Goal("compaction_mb_s", "MB/s", 100.0, True, "merging flushes, before compression"),
        Goal(
            "compaction_read_p99_ratio",
            "ratio",
            2.0,
            False,
            "p99 of reads while it compacts, of before",
        ),
        Goal("branch_ms", "ms", 20.0, False, "a branch, by the pageserver's API"),
        Goal("attach_first_page_ms", "ms", 200.0, False, "first page of 10 GB after attaching, disk empty"),
        Goal("tenants_start_s", "s", 10.0, False, "a pageserver with 1,000 tenants of 3 branches"),
        Goal("tenants_rss_mib", "MiB", 2048.0, False, "its memory"),
        Goal("tenants_idle_cpu_percent", "%", 1.0, False, "its CPU while nothing happens, of a core"),
        Goal("stack_idle_rss_mib", "MiB", 160.0, False, "all services of an installation, idle, shared once"),
        Goal("endpoint_start_ms", "ms", 1000.0, False, "endpoint start, command to first row"),
        Goal("manifest_to_row_ms", "ms", 200.0, False, "of that, from the basebackup to the first row"),
        Goal("wake_warm_p50_ms", "ms", 60.0, False, "suspended, from the call to a row, directory kept"),
        Goal("wake_warm_ratio", "ratio", 1.5, False, "of that, of `pg_ctl start` and the query"),
        Goal("wake_cold_p50_ms", "ms", 150.0, False, "the same in a new directory"),
        Goal("wake_cold_p99_ms", "ms", 400.0, False, "of that, the 99th of a hundred"),
        Goal("wake_20k_tables_ms", "ms", 400.0, False, "the same with 20,000 tables"),
        Goal("awake_endpoint_extra_rss_mib", "MiB", 12.0, False, "an idle endpoint beside its PostgreSQL"),
        Goal("wake_storm_100_s", "s", 60.0, False, "a hundred endpoints woken at once, cold"),
    )
}


class Result(msgspec.Struct, frozen=True):
    """One figure as `latest.json` has it."""

    id: str
    value: float
    """Median of the rounds."""
    unit: str
    goal: float
    higher_is_better: bool
    spread: float
    """Highest round minus lowest, in the unit."""


def make_result(goal: Goal, samples: Sequence[float]) -> Result:
    value = statistics.median(samples)
    spread = max(samples) - min(samples)
    return Result(goal.id, round(value, 3), goal.unit, goal.goal, goal.higher_is_better, round(spread, 3))


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of everything one run does."""

    rounds: int
    run_s: int
    """Of each pgbench run."""
    hot_scale: int
    """Of pgbench's tables for a hot set; 70 is 1 GB."""
    pgbench_scale: int
    """10 is 150 MB: more than the shared buffers, so that warm reads reach the file system too."""
    scan_rows: int
    """Of the table that is scanned; about 121 bytes each."""
    ingest_transactions: int
    """Of TPC-B; about 450 bytes of WAL each."""
    ingest_rows: int
    """Of the COPY that is ingested; about 160 bytes of WAL each."""
    getpage_requests: int
    """For single pages, per round."""
    redo_pages: int
    """With ten records each."""
    tenants: int
    """Of three branches each."""
    idle_s: int
    """How long an idle pageserver is watched."""


FULL = Effort(
    rounds=5,
    run_s=6,
    hot_scale=70,
    pgbench_scale=10,
    scan_rows=3_200_000,
    ingest_transactions=120_000,
    ingest_rows=2_000_000,
    getpage_requests=60_000,
    redo_pages=6_000,
    tenants=1000,
    idle_s=30,
)
QUICK = Effort(
    rounds=2,
    run_s=2,
    hot_scale=8,
    pgbench_scale=2,
    scan_rows=400_000,
    ingest_transactions=80_000,
    ingest_rows=1_000_000,
    getpage_requests=8_000,
    redo_pages=2_000,
    tenants=100,
    idle_s=3,
)

Samples = dict[str, list[float]]
"""By figure id, one value per round."""
Note = Callable[[str], None]
"""Says something that the table does not: absolute rates, sizes."""


class Family(NamedTuple):
    """Figures that are measured together."""

    ids: tuple[str, ...]
    measure: Callable[["Bench"], Samples]


@dataclass(frozen=True, slots=True)
class Bench:
    """What every family gets."""

    effort: Effort
    note: Note
