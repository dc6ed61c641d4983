"""What a compute manager says at /metrics: the endpoint's state, hydration, and the commit LSN."""

from collections.abc import Iterator

from excimer.compute.arena import Arena
from excimer.compute.idle_watch import IdleWatch
from excimer.compute.shell import Manager
from excimer.service.plain_metrics import PlainMetric, render_plain

_COUNTERS = {
    "fetches": "Requests to the pageserver that were answered",
    "blocks": "Blocks hydrated",
    "bytes": "Bytes hydrated",
    "retries": "Requests to the pageserver that were tried again",
    "errors": "Reads that failed because their blocks could not be fetched",
    "cancelled": "Of those, reads given up because the query was cancelled",
    "files_made": "Files made when PostgreSQL first opened them",
}
_CACHE_COUNTERS = {
    "reads": "Blocks that postgres read from relations' files",
    "read_misses": "Of those, blocks that had to be fetched from the pageserver",
    "evicted": "Blocks evicted to keep the cache within its bound",
    "reads_again": "Reads that were repeated because of an eviction",
}
_WAITS = {
    "bulk": "Time that processes which make much WAL waited for the pageserver to ingest",
    "wal": "Time that writes of WAL waited because the pageserver was too far behind",
    "room": "Time that writes which may not fail waited for space on the disk",
}


def read_metrics(manager: Manager) -> bytes:
    return render_plain(_metrics(manager))


def _metrics(manager: Manager) -> Iterator[PlainMetric]:
    ready = manager.is_running
    yield PlainMetric("excimer_compute_running", "gauge", "1 while postgres serves clients", float(ready))
    yield PlainMetric("excimer_compute_starts_total", "counter", "Attempts to start postgres", manager.starts)
    yield from manager.disk.samples()
    yield from _idle_metrics(manager.idle)
    attempt = manager.attempt
    if attempt is None:
        return
    if attempt.proposer is not None:
        yield PlainMetric(
            "excimer_compute_commit_lsn",
            "gauge",
            "End of the WAL that a majority of safekeepers has on disk",
            float(attempt.proposer.commit_lsn),
        )
    if attempt.backpressure is not None:
        yield PlainMetric(
            "excimer_compute_ingest_lag_bytes",
            "gauge",
            "Committed WAL that the pageserver has not ingested, as far as is known",
            float(attempt.backpressure.lag_bytes),
        )
    if attempt.replica is not None and (progress := attempt.replica.progress) is not None:
        yield PlainMetric(
            "excimer_compute_replayed_lsn",
            "gauge",
            "End of the WAL that the replica has replayed",
            float(progress.replayed_lsn),
        )
        yield PlainMetric(
            "excimer_compute_replica_lag_bytes",
            "gauge",
            "Committed WAL that the replica has not replayed",
            float(progress.lag_bytes),
        )
    if attempt.arena is not None:
        statistics = attempt.arena.statistics()._asdict()
        for name, description in _COUNTERS.items():
            full_name = f"excimer_hydration_{name}_total"
            yield PlainMetric(full_name, "counter", description, float(statistics[name]))
        yield from _cache_metrics(attempt.arena)
        yield PlainMetric(
            "excimer_hydration_wait_seconds_total",
            "counter",
            "Time that backends waited for blocks",
            statistics["wait_ns"] / 1e9,
        )
        for name, description in _WAITS.items():
            full_name = f"excimer_compute_{name}_wait_seconds_total"
            yield PlainMetric(full_name, "counter", description, statistics[f"{name}_wait_ns"] / 1e9)
        yield PlainMetric(
            "excimer_compute_waiting_for_room",
            "gauge",
            "Processes of postgres that wait now for space on the disk",
            float(attempt.arena.waiting_for_room()),
        )


def _cache_metrics(arena: Arena) -> Iterator[PlainMetric]:
    statistics = arena.statistics()._asdict()
    for name, description in _CACHE_COUNTERS.items():
        full_name = f"excimer_cache_{name}_total"
        yield PlainMetric(full_name, "counter", description, float(statistics[name]))
    bound, used = arena.cache()
    yield PlainMetric(
        "excimer_cache_size_bytes",
        "gauge",
        "Bound of what relations' files take on the local disk; 0: none is kept to",
        float(bound),
    )
    yield PlainMetric(
        "excimer_cache_used_bytes",
        "gauge",
        "What relations' files took on the local disk when the bounded cache was last looked at",
        float(used),
    )


def _idle_metrics(idle: IdleWatch) -> Iterator[PlainMetric]:
    yield PlainMetric(
        "excimer_compute_suspend_delay_seconds",
        "gauge",
        "How long nobody must have used it before it is suspended; 0: never",
        float(idle.delay_s),
    )
    if idle.idle_s is None:
        return
    yield PlainMetric(
        "excimer_compute_idle_seconds", "gauge", "Since somebody used the endpoint", idle.idle_s
    )
    yield PlainMetric(
        "excimer_compute_idle_samples_total",
        "counter",
        "How often it was looked who is there, since PostgreSQL started",
        float(idle.samples),
    )
    yield PlainMetric(
        "excimer_compute_idle_questions_total",
        "counter",
        "How often PostgreSQL was asked who is there, since it started",
        float(idle.questions),
    )
    for kind, count in idle.present.items():
        yield PlainMetric(
            "excimer_compute_kept_awake_by",
            "gauge",
            "Who is there that keeps the endpoint awake",
            float(count),
            {"kind": kind},
        )
