"""One attempt's dealings with the endpoint's data directory: may it be used, and does it stay.

Not here: the decision to use it (`warm_start`), what is read and written for it (`kept_directory`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from excimer.compute.kept_directory import (
    CleanEnd,
    control_digest,
    discard,
    look,
    make_record,
    owner_of,
    read_boot_id,
    read_record,
    remove_lent,
    take_reason,
    take_record,
    why_not_kept,
    write_record,
)
from excimer.compute.spec import ComputeSpec
from excimer.compute.warm_start import (
    NOT_CLEAN,
    Cold,
    FoundDirectory,
    Owner,
    QuorumEnd,
    ShutdownRecord,
    Warm,
    decide_start,
)
from excimer.service.logs import get_logger

log = get_logger(__name__)


class _Seen(NamedTuple):
    record: ShutdownRecord | None
    found: FoundDirectory | None
    owner: Owner
    boot_id: str | None


class EndpointDirectory:
    """All methods block. Nothing runs in the directory while one of them is called."""

    def __init__(self, spec: ComputeSpec) -> None:
        self._spec = spec
        self._places = spec.places
        self._is_taken = False
        """What is there is this attempt's; before, it is left alone."""
        self._reason: str | None = None
        """Why this start is a cold one."""
        self._record: ShutdownRecord | None = None
        self._seen: _Seen | None = None

    def look(self) -> None:
        """What is there, and who we are: all that can be known before the election has been won."""
        record = read_record(self._places.shutdown_record)
        self._seen = _Seen(record, look(self._places), owner_of(self._spec), read_boot_id())

    def decide(self, quorum: QuorumEnd) -> Warm | Cold:
        """By what `look` has seen. Warm: the directory is there, and its record no more. Cold: there is
        neither. Raises OSError.
        """
        assert self._seen is not None
        record, found, owner, boot_id = self._seen
        decided = decide_start(
            record, found, quorum, owner=owner, boot_id=boot_id, not_kept=take_reason(self._places)
        )
        self._is_taken = True
        match decided:
            case Warm(record):
                take_record(self._places)
                self._record = record
            case Cold(reason):
                self._reason = reason
                discard(self._places)
        return decided

    def begin_anew(self) -> None:
        """There is none from here on. Raises OSError."""
        self._is_taken = True
        discard(self._places)

    def finish(self, end: CleanEnd | None, superusers: Sequence[str], *, never_began: bool) -> None:
        """Postgres is gone: the directory stays, with its record, or goes. Raises OSError.

        `end`: what a quorum had when it had ended cleanly after it had served; None: it had not.
        `never_began`: it did not come so far as to serve, and has not crashed.
        """
        if not self._is_taken:
            return
        record: ShutdownRecord | None = None
        reason: str | None = NOT_CLEAN
        if end is not None:
            record, reason = self._closed(end, superusers)
        elif never_began:
            record, reason = self._untouched(), self._reason
        if record is None:
            discard(self._places, reason)
        else:
            remove_lent(self._places)
            write_record(self._places, record)

    def _untouched(self) -> ShutdownRecord | None:
        """Of a directory on which postgres did not get so far as to change anything: a wrong setting, say."""
        if self._record is None or control_digest(self._places.data_dir) != self._record.control_digest:
            return None
        return self._record

    def _closed(self, end: CleanEnd, superusers: Sequence[str]) -> tuple[ShutdownRecord | None, str | None]:
        """The record, or why there is none."""
        reason = why_not_kept(self._places, self._spec.build, end)
        if reason is not None:
            log.warning("the data directory is not kept", reason=reason)
            return None, reason
        record = make_record(self._places, owner_of(self._spec), end, superusers)
        return record, NOT_CLEAN if record is None else None
