"""The engine's own counters come out as Prometheus metrics."""

from prometheus_client import CollectorRegistry, generate_latest

from excimer.pageserver.metrics import EngineMetrics
from excimer.storage.engine.engine_counters import EngineCounters, WrittenBy


def test_the_engines_numbers_are_shown() -> None:
    counters = EngineCounters()
    registry = CollectorRegistry()
    EngineMetrics(registry, counters)
    for layers in (1, 3, 7, 1000):
        counters.read_visited(layers)
    counters.layer_written(WrittenBy.FLUSH, 100)
    counters.layer_written(WrittenBy.MERGE, 80)
    counters.layer_written(WrittenBy.ROUND, 170)
    counters.layers_merged(90)
    counters.put_delayed(0.25)
    lines = generate_latest(registry).decode().splitlines()
    assert {
        'excimer_layers_visited_bucket{le="0"} 0.0',
        'excimer_layers_visited_bucket{le="3"} 2.0',
        'excimer_layers_visited_bucket{le="8"} 3.0',
        'excimer_layers_visited_bucket{le="64"} 3.0',
        'excimer_layers_visited_bucket{le="+Inf"} 4.0',
        "excimer_layers_visited_sum 1011.0",
        'excimer_layer_written_bytes_total{by="round"} 170.0',
        "excimer_write_amplification 3.5",
        "excimer_compacted_bytes_total 90.0",
        "excimer_ingest_delays_total 1.0",
        "excimer_ingest_delay_seconds_total 0.25",
    } <= set(lines)
