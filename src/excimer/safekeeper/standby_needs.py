"""What the hot standbys that read a timeline here still need of its primary's rows.

A standby says it about once a second (hot_standby_feedback), and no more when it is gone. The oldest of all
is told to the proposer, which tells its PostgreSQL: what they see is not vacuumed away.

Not here: the message (`wire.replication`), telling it (`endpoints.proposer_port`).
"""

import threading

from excimer.wire.replication import NOTHING_NEEDED, HotStandbyFeedback, oldest_needs


class StandbyNeeds:
    """Of one timeline; from any thread. A standby is whatever object its connection likes to be known by."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[object, HotStandbyFeedback] = {}

    def tell(self, standby: object, needs: HotStandbyFeedback) -> HotStandbyFeedback:
        """What all of them need now."""
        with self._lock:
            self._told[standby] = needs
            return oldest_needs(self._told.values())

    def leave(self, standby: object) -> HotStandbyFeedback | None:
        """What the others need; None: it had said nothing."""
        with self._lock:
            if self._told.pop(standby, NOTHING_NEEDED) == NOTHING_NEEDED:
                return None
            return oldest_needs(self._told.values())
