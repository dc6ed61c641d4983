"""What hot standbys of the branch need, as the safekeepers that they read from have told: pure.

Each safekeeper speaks for its own readers, about once a second while there are any, and says so when one of
them leaves. One that falls silent may be dead, and its readers with another soon: what it has told holds for
a while.

Not here: who tells and who is told (`proposer`).
"""

from typing import Final

from excimer.wire.replication import NOTHING_NEEDED, HotStandbyFeedback, oldest_needs

HOLDS_S: Final = 30.0
"""For so long, if it says nothing more."""


class StandbysNeeds:
    def __init__(self) -> None:
        self._told: dict[int, tuple[HotStandbyFeedback, float]] = {}
        self.oldest = NOTHING_NEEDED
        """What all need together."""

    def tell(self, safekeeper: int, needs: HotStandbyFeedback, now_s: float) -> bool:
        """Whether that changes what all need."""
        self._told[safekeeper] = needs, now_s + HOLDS_S
        return self._changed()

    def forget_old(self, now_s: float) -> bool:
        """The same for what holds no longer."""
        self._told = {index: told for index, told in self._told.items() if told[1] > now_s}
        return self._changed()

    def _changed(self) -> bool:
        before, self.oldest = self.oldest, oldest_needs(needs for needs, _ in self._told.values())
        return self.oldest != before
