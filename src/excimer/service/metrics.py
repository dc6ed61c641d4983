"""Prometheus metrics of a service: a registry of its own, and buckets that fit what we measure.

A service makes one registry and defines its metrics in its `metrics.py`; a registry per
instance rather than the library's global one, so that tests can run two services in one process.
"""

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from excimer.service.disk_watch import DiskWatch

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_BUCKETS_S: Final = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0),
)
SIZE_BUCKETS_BYTES: Final = tuple(float(1 << power) for power in range(10, 31, 2))


def new_registry(service: str, version: str) -> CollectorRegistry:
    """A registry with the process's own figures (CPU, memory, files) and `excimer_info`."""
    registry = CollectorRegistry(auto_describe=True)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    info = Gauge("excimer_info", "What runs here; always 1.", ["service", "version"], registry=registry)
    info.labels(service, version).set(1)
    return registry


class _Disks(Collector):
    def __init__(self, disks: DiskWatch) -> None:
        self._disks = disks

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for each in self._disks.samples():
            new = GaugeMetricFamily(each.name, each.description, labels=list(each.labels))
            families.setdefault(each.name, new).add_metric(list(each.labels.values()), each.value)
        return families.values()


def add_disks(registry: CollectorRegistry, disks: DiskWatch) -> None:
    """Free space and fullness of the watched directories."""
    registry.register(_Disks(disks))


def render(registry: CollectorRegistry) -> bytes:
    """The registry in Prometheus' text format, of content type `CONTENT_TYPE`."""
    return generate_latest(registry)
