"""How long ingest waits before each batch when compaction falls behind, as a pure function.

Every flush that is not merged yet is one more layer that a read may have to visit. Ingest is therefore
slowed before reads suffer: not at all up to `slow_from` L0 layers, and from there on to a share of
FULL_SPEED that falls evenly to nothing at `slowest_from`, where every batch waits `delay_max_s`.

::

    speed  1 |-----------.
             |            '-.
             |               '-.
           0 |                  '--------  (one batch per delay_max_s)
             +-----------+------+-------> L0 layers
                   slow_from  slowest_from

Not here: waiting (`excimer.storage.engine.timeline`).
"""

from dataclasses import dataclass

FULL_SPEED_BYTES_PER_S = 100 * 1024 * 1024


@dataclass(frozen=True)
class ThrottleLimits:
    slow_from: int
    slowest_from: int
    delay_max_s: float


def plan_put_delay_s(level_zero_count: int, batch_size_bytes: int, limits: ThrottleLimits) -> float:
    """Never decreases with more layers or larger batches; at most `delay_max_s`."""
    if level_zero_count <= limits.slow_from:
        return 0.0
    if level_zero_count >= limits.slowest_from:
        return limits.delay_max_s
    taken = (level_zero_count - limits.slow_from) / (limits.slowest_from - limits.slow_from)
    return min(limits.delay_max_s, batch_size_bytes / FULL_SPEED_BYTES_PER_S * taken / (1 - taken))
