"""The engine's errors: one class per reason, each in the family that says what the caller does next."""

from excimer.base.errors import ConflictError, CorruptionError, NotFoundError, RefusedError, RetryableError
from excimer.base.keys import describe_key
from excimer.base.lsn import format_lsn


class LsnTimeoutError(RetryableError):
    """WAL up to the requested LSN has not arrived (in time)."""

    def __init__(self, timeline_id: str, lsn: int, last_record_lsn: int) -> None:
        super().__init__(
            f"timeline {timeline_id} has not reached LSN {format_lsn(lsn)}, it is at "
            f"{format_lsn(last_record_lsn)}; try again when more WAL has arrived"
        )


class LsnTooOldError(RefusedError):
    """The LSN lies before the history that the timeline still has."""

    def __init__(self, timeline_id: str, lsn: int, oldest_lsn: int) -> None:
        super().__init__(
            f"timeline {timeline_id} has no history at LSN {format_lsn(lsn)}: "
            f"its oldest is {format_lsn(oldest_lsn)}"
        )


class NoSuchPageError(RefusedError):
    """A block at or above its relation's size, or of a relation that does not exist, was asked for."""

    def __init__(self, key: bytes, lsn: int, size_blocks: int | None) -> None:
        reason = "it does not exist" if size_blocks is None else f"it has {size_blocks} blocks"
        super().__init__(f"{describe_key(key)} is not there at LSN {format_lsn(lsn)}: {reason}")
        self.key = key
        self.lsn = lsn


class IngestPausedError(RetryableError):
    """Too much WAL waits to become durable: call `wait_for_room` and put the batch again."""


class PageRebuildError(CorruptionError):
    """A page's history is there but does not yield the page."""

    def __init__(self, key: bytes, lsn: int, reason: str) -> None:
        super().__init__(f"{describe_key(key)} cannot be rebuilt at LSN {format_lsn(lsn)}: {reason}")
        self.key = key
        self.lsn = lsn


class TimelineExistsError(ConflictError):
    """The timeline id is taken."""


class TimelineMissingError(NotFoundError):
    """The tenant has no such timeline."""


class TimelineHasBranchesError(ConflictError):
    """A timeline that others branch from cannot be deleted."""


class TimelineArchivedError(ConflictError):
    """The timeline, or one that it needs, is archived, or one that needs it is not."""


class TimelineDamagedError(CorruptionError):
    """What the timeline consists of, or one that it needs, cannot be read: nothing of it is served."""

    def __init__(self, timeline_id: str, reason: str) -> None:
        super().__init__(
            f"timeline {timeline_id} is damaged: {reason}; repair that, and attach its tenant again"
        )
        self.timeline_id = timeline_id


class BranchesUnknownError(ConflictError):
    """A damaged timeline may branch from anywhere: what needs to know all branches has to wait."""


class TimelineBusyError(RetryableError):
    """Another change of the timeline is under way."""


class TimelineStoppedError(RetryableError):
    """The timeline was closed or deleted while it was being used."""
