"""How much of a bounded cache is to be evicted, and when to look again: decided without I/O.

::

    used ----+                                  over the bound: down to a little below it
    bound ---+--> CachePlan --> blocks, wait    under it: look again soon if the cache grows, else seldom
    changed -+                                  nothing could go: ever less often, until something changes

Going below the bound by a part keeps sweeps few; going far below would throw away what is warm.

Not here: which blocks go (`csrc/libhydrate/eviction.h`).
"""

from typing import Final, NamedTuple

from excimer.base.keys import BLOCK_SIZE_BYTES

LOOK_S_MIN: Final = 0.02
"""While the cache changes: what comes in meanwhile is how far the bound may be passed."""
LOOK_PART_MAX: Final = 10
"""Of many files a look takes long: at most one part in so many of the time goes into it."""
QUIET_S: Final = 0.1
"""While it does not, which costs a look at two numbers."""
SLOW_S_MAX: Final = 1.0
STUCK_S_MAX: Final = 10.0
_SLACK_PART: Final = 32
"""A sweep goes below the bound by this part of it,"""
_SLACK_BYTES_MAX: Final = 256 << 20
"""and at most so far."""


class Swept(NamedTuple):
    """What came of a sweep, in blocks."""

    evicted: int
    retained: int
    """Written by PostgreSQL, ingested, and yet to stay for now."""
    unsettled: int
    """Written by PostgreSQL too lately to know."""
    epochs: int
    """Files for which PostgreSQL is to be asked."""
    punch_error: int
    """errno; 0: none."""


NOTHING_SWEPT: Final = Swept(0, 0, 0, 0, 0)


def blocks_to_evict(used_bytes: int, bound_bytes: int) -> int:
    """0 while the bound is kept to, or if there is none (0)."""
    if bound_bytes == 0 or used_bytes <= bound_bytes:
        return 0
    target = bound_bytes - min(bound_bytes // _SLACK_PART, _SLACK_BYTES_MAX)
    return -(-(used_bytes - target) // BLOCK_SIZE_BYTES)


class CachePlan:
    """When to look at the cache of one running PostgreSQL."""

    def __init__(self) -> None:
        self._stuck_s = LOOK_S_MIN

    def wait_s(self, *, wanted: int, swept: Swept, has_changed: bool, look_s: float) -> float:
        """After a look that took `look_s` and wanted so many blocks to go. `has_changed`: the cache since the
        look before.
        """
        soon_s = LOOK_S_MIN if wanted else min(max(LOOK_S_MIN, LOOK_PART_MAX * look_s), SLOW_S_MAX)
        if has_changed or swept.evicted or swept.epochs:
            self._stuck_s = soon_s
            return soon_s
        if not wanted:
            self._stuck_s = soon_s
            return QUIET_S
        self._stuck_s = min(2 * self._stuck_s, STUCK_S_MAX)
        return self._stuck_s

    @staticmethod
    def asks(swept: Swept, wanted: int) -> bool:
        """Whether the answer of PostgreSQL can let more go."""
        return swept.epochs > 0 or (swept.evicted < wanted and swept.retained > 0)
