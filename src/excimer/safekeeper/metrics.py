"""What a safekeeper measures."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from excimer.service.metrics import LATENCY_BUCKETS_S


class SafekeeperMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.wal_bytes = Counter(
            "excimer_safekeeper_wal_bytes", "WAL made durable, in bytes.", registry=registry
        )
        self.flush_seconds = Histogram(
            "excimer_safekeeper_flush_seconds",
            "Time of one fdatasync of WAL.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.disk_failures = Counter(
            "excimer_safekeeper_disk_failures",
            "Times that a timeline stopped acknowledging because WAL could not be stored.",
            registry=registry,
        )
        self.sent_bytes = Counter(
            "excimer_safekeeper_sent_bytes", "WAL sent to readers, in bytes.", registry=registry
        )
        self.stored_bytes = Gauge(
            "excimer_safekeeper_wal_stored_bytes", "What WAL segments take on disk.", registry=registry
        )
        self.removed_bytes = Counter(
            "excimer_safekeeper_wal_removed_bytes",
            "WAL segments removed because nobody needs them any more, in bytes.",
            registry=registry,
        )
        self.skipped_bytes = Counter(
            "excimer_safekeeper_wal_skipped_bytes",
            "WAL that came here never because this safekeeper was away beyond the limit, in bytes.",
            registry=registry,
        )
        self.kept_bytes = Gauge(
            "excimer_safekeeper_wal_kept_bytes",
            "Committed WAL that is kept, by what keeps it longest: object_storage (the pageserver has not "
            "made it durable there), safekeeper (another one lacks it), reader, commit.",
            ["reason"],
            registry=registry,
        )
        self.proposers = Gauge(
            "excimer_safekeeper_proposers", "Open connections of proposers.", registry=registry
        )
        self.readers = Gauge(
            "excimer_safekeeper_readers", "Open connections of WAL readers.", registry=registry
        )
        self.timelines = Gauge("excimer_safekeeper_timelines", "Timelines kept here.", registry=registry)
