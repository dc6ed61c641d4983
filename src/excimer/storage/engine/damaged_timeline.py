"""What a pageserver keeps of a damaged timeline: that it exists, and what is to be repaired.

It is not opened: nothing of it is read, written or removed until its user deletes it.
"""

from dataclasses import dataclass

from excimer.base.ids import TimelineId
from excimer.storage.format.manifest import Manifest


@dataclass(frozen=True, slots=True)
class DamagedTimeline:
    timeline_id: TimelineId
    reason: str
    """Names the object, or the ancestor, that is to be repaired."""
    manifest: Manifest | None
    """Whole, where only an ancestor's is damaged; None: nobody knows what it says."""

    @property
    def ancestor_timeline_id(self) -> TimelineId | None:
        """None also where it is not known."""
        if self.manifest is None or self.manifest.ancestor_timeline_id is None:
            return None
        return TimelineId(self.manifest.ancestor_timeline_id)
