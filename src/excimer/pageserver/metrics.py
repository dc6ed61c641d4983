"""The pageserver's Prometheus metrics. Reference: docs/reference/ is generated from these definitions.

Not here: figures of the process itself, which `service.metrics` adds to every registry.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from excimer.service.metrics import LATENCY_BUCKETS_S
from excimer.storage.engine.engine_counters import EngineCounters
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


class EngineMetrics(Collector):
    """What the page store counts by itself, read when somebody asks for it."""

    def __init__(self, registry: CollectorRegistry, counters: EngineCounters) -> None:
        self._counters = counters
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        visits = HistogramMetricFamily(
            "excimer_layers_visited",
            "Layer files that a read of adjacent pages took; reads out of caches are not counted.",
        )
        total = 0
        buckets = []
        for bound, reads in counters.visits:
            total += reads
            buckets.append(("+Inf" if bound is None else str(bound), total))
        visits.add_metric([], buckets, counters.visits_sum)
        yield visits
        written = CounterMetricFamily(
            "excimer_layer_written_bytes",
            "Bytes of layers written: flushes, merges of flushes, rounds of images.",
            labels=["by"],
        )
        for by, size_bytes in counters.written_bytes.items():
            written.add_metric([by.value], size_bytes)
        yield written
        yield GaugeMetricFamily(
            "excimer_write_amplification",
            "Bytes of layers written for each byte flushed, since the process started.",
            counters.write_amplification,
        )
        yield CounterMetricFamily(
            "excimer_compacted_bytes",
            "Bytes of layers that merges have read and replaced.",
            counters.merged_bytes,
        )
        yield CounterMetricFamily(
            "excimer_ingest_delays",
            "Batches of WAL that were held up for compaction to catch up.",
            counters.delayed_puts,
        )
        yield CounterMetricFamily(
            "excimer_ingest_delay_seconds",
            "How long they were to be held up, at most.",
            counters.delayed_puts_s,
        )
        yield from self._collect_removals()

    def _collect_removals(self) -> Iterator[Metric]:
        counters = self._counters
        yield GaugeMetricFamily(
            "excimer_layer_deletions_waiting",
            "Layers that no manifest names any more and that are still in object storage.",
            counters.deletions_waiting,
        )
        yield CounterMetricFamily(
            "excimer_layers_deleted", "Layers deleted from object storage.", counters.deleted_layers
        )
        yield CounterMetricFamily(
            "excimer_layers_deleted_bytes", "The same in bytes.", counters.deleted_bytes
        )
        yield CounterMetricFamily(
            "excimer_leftover_layers_removed",
            "Layers that no manifest named, left by a crash or a failed job.",
            counters.leftover_layers,
        )
        yield CounterMetricFamily(
            "excimer_garbage_collections", "Garbage collections of timelines.", counters.collections
        )
        yield CounterMetricFamily(
            "excimer_garbage_collected_bytes",
            "Bytes of layers that garbage collections have dropped.",
            counters.collected_bytes,
        )


class RedoMetrics:
    """Of redo workers; read when somebody asks for it."""

    def __init__(
        self,
        registry: CollectorRegistry,
        process_count: Callable[[], int],
        recycled_count: Callable[[], int],
    ) -> None:
        processes = Gauge(
            "excimer_redo_processes",
            "Redo workers that run; each serves one tenant.",
            registry=registry,
        )
        processes.set_function(process_count)
        registry.register(_Recycled(recycled_count))


class _Recycled(Collector):
    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "excimer_redo_processes_recycled",
            "Redo workers that one tenant has lost to another: if it grows fast, raise redo_processes_max.",
            self._count(),
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
        self.level_zero_layers = Gauge(
            "excimer_timeline_level_zero_layers",
            "Flushes that are not merged yet: each may cost a read one more layer.",
            self._LABELS,
            registry=registry,
        )
        self.wal_bytes = Counter(
            "excimer_wal_received_bytes", "WAL taken from safekeepers.", self._LABELS, registry=registry
        )
        self.wal_connections = Counter(
            "excimer_wal_connections", "Times a safekeeper was connected to.", self._LABELS, registry=registry
        )
        self.remote_size_bytes = Gauge(
            "excimer_timeline_remote_size_bytes",
            "Its own layers in object storage.",
            self._LABELS,
            registry=registry,
        )
        self.resident_size_bytes = Gauge(
            "excimer_timeline_resident_size_bytes",
            "What of its layers lies on the local disk.",
            self._LABELS,
            registry=registry,
        )
        self.synthetic_size_bytes = Gauge(
            "excimer_tenant_synthetic_size_bytes",
            "What keeping the tenant's readable history costs at least, when somebody last asked for it.",
            ["tenant_id"],
            registry=registry,
        )
        self.damaged_timelines = Gauge(
            "excimer_tenant_damaged_timelines",
            "Timelines that are not served: their manifest, or an ancestor's, cannot be read.",
            ["tenant_id"],
            registry=registry,
        )
        self.gc_stands_still = Gauge(
            "excimer_tenant_gc_stands_still",
            "1 while none of the tenant's history may go: what of it is needed is not known.",
            ["tenant_id"],
            registry=registry,
        )
        self.logical_size_bytes = Gauge(
            "excimer_timeline_logical_size_bytes",
            "All relations at the head, when somebody last asked for it.",
            self._LABELS,
            registry=registry,
        )

    def tell(self, status: PageserverTimelineStatus, level_zero_count: int) -> None:
        """Sets the positions of a timeline, and how many flushes are not merged yet."""
        labels = status.tenant_id, status.timeline_id
        self.last_record_lsn.labels(*labels).set(status.last_record_lsn)
        self.disk_consistent_lsn.labels(*labels).set(status.disk_consistent_lsn)
        self.remote_consistent_lsn.labels(*labels).set(status.remote_consistent_lsn)
        self.level_zero_layers.labels(*labels).set(level_zero_count)

    def watch_sizes(
        self, labels: tuple[str, str], *, remote: Callable[[], float], resident: Callable[[], float]
    ) -> None:
        """Sizes are summed up when metrics are asked for."""
        self.remote_size_bytes.labels(*labels).set_function(remote)
        self.resident_size_bytes.labels(*labels).set_function(resident)

    def forget_tenant(self, tenant_id: str) -> None:
        """Removes a tenant's series; its timelines' are removed with them."""
        for metric in (self.synthetic_size_bytes, self.damaged_timelines, self.gc_stands_still):
            _remove(metric, tenant_id)

    def forget(self, tenant_id: str, timeline_id: str) -> None:
        """Removes a timeline's series."""
        gauges = (self.last_record_lsn, self.disk_consistent_lsn, self.remote_consistent_lsn)
        sizes = (self.remote_size_bytes, self.resident_size_bytes, self.logical_size_bytes)
        for metric in (*gauges, *sizes, self.level_zero_layers, self.wal_bytes, self.wal_connections):
            _remove(metric, tenant_id, timeline_id)


def _remove(metric: Gauge | Counter, *labels: str) -> None:
    try:
        metric.remove(*labels)
    except KeyError:
        return
