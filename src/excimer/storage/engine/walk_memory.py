"""Which layers a read visits, remembered: planning costs more than all else of a read from the cache.

Two reads get the same plan when they begin from the same LSN and the same layers lie in their keys' way. The
latter is told by two numbers: how many layers begin at or before the last key, and how many end before
the first. From any LSN at or above the newest layer's, the plan is the same too, so a timeline that is
written to all the time has its plans made once per flush. What is remembered belongs to one layer map,
which is not held on to: layers are deleted when nobody walks a map with them any more.

The event loop's thread only. Not here: the plan itself (`excimer.storage.plan.read_path`).
"""

import weakref
from bisect import bisect_left, bisect_right
from typing import Final

from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.engine.layer_stack import LayerStack
from excimer.storage.plan.layer_map import LayerMap
from excimer.storage.plan.read_path import plan_read

PLANS_MAX: Final = 4096
"""Forgotten together when there are more: what is asked for comes back quickly."""

WalkStep = tuple[DiskLayer, int, int]
"""Take from this layer the values with low < LSN <= high."""


class WalkPlan:
    """`ReadPlan` with the layers' files in place."""

    __slots__ = ("continues_in_ancestor", "steps")

    def __init__(self, steps: list[WalkStep], continues_in_ancestor: bool) -> None:
        self.steps = steps
        self.continues_in_ancestor = continues_in_ancestor


class WalkMemory:
    def __init__(self) -> None:
        self._disk: weakref.ref[LayerMap] | None = None
        self._files: dict[str, DiskLayer] = {}
        self._plans: dict[tuple[int, int, int], WalkPlan] = {}
        self._first_keys: list[bytes] = []
        self._last_keys: list[bytes] = []

    def plan(self, stack: LayerStack, first_key: bytes, last_key: bytes, lsn: int) -> WalkPlan:
        """For all values of keys in [first, last] at or below `lsn`."""
        if self._disk is None or self._disk() is not stack.disk or stack.files is not self._files:
            self._begin(stack)
        lsn = min(lsn, stack.disk_end_lsn)
        place = bisect_right(self._first_keys, last_key), bisect_left(self._last_keys, first_key), lsn
        known = self._plans.get(place)
        if known is None:
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            known = self._plans[place] = _make_plan(stack, first_key, last_key, lsn)
        return known

    def _begin(self, stack: LayerStack) -> None:
        self._disk, self._files = weakref.ref(stack.disk), stack.files
        self._plans = {}
        self._first_keys = sorted(layer.first_key for layer in stack.disk.layers)
        self._last_keys = sorted(layer.last_key for layer in stack.disk.layers)


def _make_plan(stack: LayerStack, first_key: bytes, last_key: bytes, lsn: int) -> WalkPlan:
    plan = plan_read(stack.disk, first_key, last_key, 0, lsn)
    steps = [
        (stack.files[visit.layer.description.name], visit.low_lsn, visit.high_lsn) for visit in plan.visits
    ]
    return WalkPlan(steps, plan.continues_in_ancestor)
