"""Prometheus metrics of what goes to and comes from object storage, and of the local disk between.

Read from the engine's own figures when somebody asks for them.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from excimer.storage.engine.local_disk import LocalDisk
from excimer.storage.engine.upload_queue import UploadQueue


class ObjectMetrics(Collector):
    def __init__(self, registry: CollectorRegistry, uploads: UploadQueue, disk: LocalDisk) -> None:
        self._uploads = uploads
        self._disk = disk
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_uploads()
        yield from self._collect_disk()

    def _collect_uploads(self) -> Iterator[Metric]:
        uploads = self._uploads
        gauges = (
            ("queue_layers", "Layers that wait for upload or are being uploaded.", uploads.layers_pending),
            ("queue_bytes", "Their bytes.", uploads.bytes_pending),
        )
        for name, what, pending in gauges:
            yield GaugeMetricFamily(f"excimer_upload_{name}", what, pending)
        counters = (
            ("layers", "Layers put into object storage.", uploads.layers_uploaded),
            ("bytes", "Their bytes.", uploads.bytes_uploaded),
            ("seconds", "From asking to done, over all layers, pauses included.", uploads.seconds),
            ("retries", "Uploads of a layer begun again after an error.", uploads.retries),
            ("failures", "Layers whose upload was given up for the time being.", uploads.failures),
        )
        for name, what, value in counters:
            yield CounterMetricFamily(f"excimer_upload_{name}", what, value)

    def _collect_disk(self) -> Iterator[Metric]:
        disk = self._disk
        yield GaugeMetricFamily("excimer_local_disk_bytes", "What copies of layers take.", disk.size_bytes)
        yield GaugeMetricFamily("excimer_local_disk_layers", "Copies, whole or in part.", disk.copies)
        if disk.size_bytes_max is not None:
            yield GaugeMetricFamily(
                "excimer_local_disk_max_bytes", "Above this, copies are evicted.", disk.size_bytes_max
            )
        counters = (
            ("evictions", "Copies removed to make room.", disk.evictions),
            ("evicted_bytes", "What they took.", disk.evicted_bytes),
        )
        for name, what, value in counters:
            yield CounterMetricFamily(f"excimer_local_disk_{name}", what, value)
        fetches = (
            ("requests", "Requests for parts of layers to object storage.", disk.fetches),
            ("failures", "Those that failed.", disk.fetch_failures),
            ("bytes", "Bytes of layers that came.", disk.fetched_bytes),
        )
        for name, what, value in fetches:
            yield CounterMetricFamily(f"excimer_layer_fetch_{name}", what, value)
