"""When a node tells the others of each of its timelines: soon after a change, then ever more rarely.

What is told is a hint that may get lost, so it is told again, after one second, two, four and so on.
A timeline that stands still thus costs next to nothing, however many there are; who has just come
asks for everything (`tell_all`).

Pure: the caller brings the time and does the telling.
"""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

REPEAT_FIRST_S: Final = 1.0
REPEAT_MOST_S: Final = 300.0

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Plan:
    due: float
    told: float
    wait_s: float


class Announcements(Generic[K]):
    def __init__(self, spacing_s: float = 0.0) -> None:
        """`spacing_s`: between two tellings of the same thing lies at least this."""
        self._spacing_s = spacing_s
        self._plans: dict[K, _Plan] = {}
        self._queue: list[tuple[float, int, K]] = []
        self._count = 0

    def changed(self, key: K, now: float) -> None:
        """There is something new to tell of `key`, which may be new itself."""
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _Plan(now, now - self._spacing_s, REPEAT_FIRST_S)
            self._plan(key, plan, now)
            return
        plan.wait_s = REPEAT_FIRST_S
        due = max(now, plan.told + self._spacing_s)
        if due < plan.due:
            self._plan(key, plan, due)

    def tell_all(self, now: float) -> None:
        """Somebody asked."""
        for key in self._plans:
            self.changed(key, now)

    def forget(self, key: K) -> None:
        self._plans.pop(key, None)

    def due(self, now: float) -> list[K]:
        """What to tell now; the repetitions are planned by this."""
        found = []
        while self._queue and self._queue[0][0] <= now:
            due, _, key = heapq.heappop(self._queue)
            plan = self._plans.get(key)
            if plan is None or plan.due != due:
                continue  # forgotten, or planned anew
            found.append(key)
            plan.told = now
            self._plan(key, plan, now + plan.wait_s)
            plan.wait_s = min(2 * plan.wait_s, REPEAT_MOST_S)
        return found

    def _plan(self, key: K, plan: _Plan, due: float) -> None:
        plan.due = due
        self._count += 1
        heapq.heappush(self._queue, (due, self._count, key))
