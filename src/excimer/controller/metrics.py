"""What the controller says at /metrics beside its process's own figures: suspends of endpoints."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class _Suspends(Collector):
    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(
            "excimer_controller_suspends",
            "Endpoints that were suspended, because they were idle or somebody asked for it.",
            labels=["reason"],
        )
        for reason, count in sorted(self._counts.items()):
            family.add_metric([reason], count)
        return [family]


def add_suspends(registry: CollectorRegistry, counts: Mapping[str, int]) -> None:
    """`counts` by reason, since the controller started; read when somebody asks."""
    registry.register(_Suspends(counts))
