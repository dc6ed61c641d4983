"""The pageserver's Prometheus metrics. Reference: docs/reference/ is generated from these definitions.

Not here: figures of the process itself, which `service.metrics` adds to every registry.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from excimer.service.metrics import LATENCY_BUCKETS_S
from excimer.wire.broker import PageserverTimelineStatus


class PageServiceMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.connections = Gauge(
            "excimer_page_connections", "Connections of the page service that are open.", registry=registry
        )
        self.refused_connections = Counter(
            "excimer_page_connections_refused",
            "Connections closed for a wrong token, an unknown timeline or bytes that are no request.",
            registry=registry,
        )
        self.pages = Counter("excimer_pages_served", "Pages sent to computes.", registry=registry)
        self.get_pages_seconds = Histogram(
            "excimer_get_pages_seconds",
            "Time from a GetPages request to its answer, waiting for WAL included.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.basebackup_seconds = Histogram(
            "excimer_basebackup_seconds",
            "Time from a GetBasebackup request to its answer, waiting for WAL included.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.errors = Counter(
            "excimer_page_request_errors",
            "Requests answered with an error, by the error's family.",
            ["family"],
            registry=registry,
        )


class TimelineMetrics:
    """Per timeline; labels are removed when the timeline goes."""

    _LABELS = ("tenant_id", "timeline_id")

    def __init__(self, registry: CollectorRegistry) -> None:
        self.last_record_lsn = Gauge(
            "excimer_timeline_last_record_lsn",
            "End of the last record ingested.",
            self._LABELS,
            registry=registry,
        )
        self.disk_consistent_lsn = Gauge(
            "excimer_timeline_disk_consistent_lsn",
            "Everything below is in durable layers.",
            self._LABELS,
            registry=registry,
        )
        self.remote_consistent_lsn = Gauge(
            "excimer_timeline_remote_consistent_lsn",
            "Everything below is in object storage.",
            self._LABELS,
            registry=registry,
        )
        self.wal_bytes = Counter(
            "excimer_wal_received_bytes", "WAL taken from safekeepers.", self._LABELS, registry=registry
        )
        self.wal_connections = Counter(
            "excimer_wal_connections", "Times a safekeeper was connected to.", self._LABELS, registry=registry
        )

    def tell(self, status: PageserverTimelineStatus) -> None:
        """Sets the positions of a timeline."""
        labels = status.tenant_id, status.timeline_id
        self.last_record_lsn.labels(*labels).set(status.last_record_lsn)
        self.disk_consistent_lsn.labels(*labels).set(status.disk_consistent_lsn)
        self.remote_consistent_lsn.labels(*labels).set(status.remote_consistent_lsn)

    def forget(self, tenant_id: str, timeline_id: str) -> None:
        """Removes a timeline's series."""
        gauges = (self.last_record_lsn, self.disk_consistent_lsn, self.remote_consistent_lsn)
        for metric in (*gauges, self.wal_bytes, self.wal_connections):
            _remove(metric, tenant_id, timeline_id)


def _remove(metric: Gauge | Counter, *labels: str) -> None:
    try:
        metric.remove(*labels)
    except KeyError:
        return
