"""What a pageserver keeps of an archived timeline: that it exists, where it hangs, how large it is."""

from dataclasses import dataclass

from excimer.base.ids import TimelineId
from excimer.base.lsn import Lsn
from excimer.storage.format.manifest import Manifest


@dataclass(frozen=True, slots=True)
class ArchivedTimeline:
    """All else is read from its manifest again when it is unarchived."""

    timeline_id: TimelineId
    pg_version: int
    system_id: int
    wal_segment_size_bytes: int
    ancestor_timeline_id: TimelineId | None
    ancestor_lsn: Lsn
    oldest_lsn: Lsn
    prev_record_lsn: Lsn
    last_record_lsn: Lsn
    """What is durable of it; WAL after it comes from the safekeepers when it is unarchived."""
    size_bytes: int
    """Its own layers in object storage."""

    @classmethod
    def of(cls, manifest: Manifest) -> "ArchivedTimeline":
        ancestor_id = manifest.ancestor_timeline_id
        return cls(
            timeline_id=TimelineId(manifest.timeline_id),
            pg_version=manifest.pg_version,
            system_id=manifest.system_id,
            wal_segment_size_bytes=manifest.wal_segment_size_bytes,
            ancestor_timeline_id=None if ancestor_id is None else TimelineId(ancestor_id),
            ancestor_lsn=Lsn(manifest.ancestor_lsn),
            oldest_lsn=Lsn(manifest.oldest_lsn),
            prev_record_lsn=Lsn(manifest.prev_record_lsn),
            last_record_lsn=Lsn(manifest.disk_consistent_lsn),
            size_bytes=sum(layer.size_bytes for layer in manifest.layers),
        )
