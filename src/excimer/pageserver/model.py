"""The pageserver's own values: what it remembers of tenants and tells about timelines."""

import msgspec

from excimer.base.errors import ConflictError, NotFoundError, RefusedError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn


class TenantMissingError(NotFoundError):
    """The tenant is not attached here."""

    def __init__(self, tenant_id: TenantId) -> None:
        super().__init__(f"tenant {tenant_id} is not attached to this pageserver")


class TimelineMissingError(NotFoundError):
    """The tenant has no such timeline."""

    def __init__(self, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        super().__init__(f"tenant {tenant_id} has no timeline {timeline_id}")


class TimelineExistsError(ConflictError):
    """A timeline of this id exists, made differently."""


class GenerationRangeError(RefusedError):
    """The names of manifests have eight hex digits for it: nobody would find what is written under it."""


class GenerationTooOldError(ConflictError):
    """A newer generation of the tenant is known: whoever asks with the older one must stop."""


class TenantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What survives a restart locally about one attached tenant."""

    tenant_id: TenantId
    generation: int
    """Never decreases (G1)."""


class NewTimeline(msgspec.Struct, frozen=True, kw_only=True):
    """A request to make a timeline: a branch if it has an ancestor, else from a new cluster."""

    timeline_id: TimelineId
    pg_version: int | None = None
    """None: the ancestor's, or the newest supported."""
    ancestor_timeline_id: TimelineId | None = None
    ancestor_start_lsn: Lsn | None = None
    """None: the newest the ancestor has."""
    password_verifier: str | None = None
    """Of a new cluster's superuser (`wire.scram`); None: nobody can log in as that role by a password."""


class TimelineSizes(msgspec.Struct, frozen=True, kw_only=True):
    timeline_id: TimelineId
    logical_size_bytes: int | None
    """All relations at the head; None while it is archived."""
    resident_size_bytes: int
    """What of its layers lies on the pageserver's disk."""
    remote_size_bytes: int
    """Its own layers in object storage, its ancestors' not included."""


class DamagedTimeline(msgspec.Struct, frozen=True, kw_only=True):
    timeline_id: TimelineId
    reason: str
    """Names what is to be repaired."""


class TenantSizes(msgspec.Struct, frozen=True, kw_only=True):
    synthetic_size_bytes: int
    archived_size_bytes: int
    """Layers of archived timelines in object storage; not part of the synthetic size."""
    timelines: list[TimelineSizes]
    damaged: list[DamagedTimeline]
    """In none of these sizes."""


class ImportProgress(msgspec.Struct, frozen=True, kw_only=True):
    """An import that is going on. It shows among timelines only when it is complete."""

    timeline_id: TimelineId
    received_bytes: int


class TimelineDetail(msgspec.Struct, frozen=True, kw_only=True):
    tenant_id: TenantId
    timeline_id: TimelineId
    pg_version: int
    system_id: int
    wal_segment_size: int
    ancestor_timeline_id: TimelineId | None
    ancestor_lsn: Lsn | None
    last_record_lsn: Lsn
    prev_record_lsn: Lsn
    disk_consistent_lsn: Lsn
    remote_consistent_lsn: Lsn
    oldest_lsn: Lsn
    """The oldest LSN at which the timeline can be read."""
    physical_size_bytes: int
    """Its own layers in object storage, its ancestor's not included."""
    wal_source: str | None
    """The safekeeper that WAL comes from now."""
    problem: str | None
    """Why it is broken, and takes no more WAL; or why it is damaged."""
    is_archived: bool = False
    """It is not served, and its LSNs are the durable ones."""
    is_damaged: bool = False
    """It, or one that it needs, cannot be read, and it is not served. What only its own unreadable manifest
    would tell is 0.
    """
