"""Whether an endpoint's start may use the directory that its last stop left: H3, decided without I/O.

::

    record of the shutdown --+
    what lies there ---------+
    the election's result ---+--> decide_start --> Warm: use it as it is
    who starts, in which boot+                     Cold: throw it away, because …

Local durability is off, so what a directory holds is believed only as long as the page cache that holds it:
in one boot of one machine. Processes, containers and namespaces of processes may come and go meanwhile.

That the quorum's WAL ends where the directory's does is not enough: another compute may have written as much.
So the record says, too, whose term wrote its last byte; two logs that end at one LSN with one writer are the
same log (`consensus.term_history`). Who was elected meanwhile and wrote nothing that lasts changed nothing.

Not here: reading and writing any of it (`kept_directory`).
"""

from typing import Final, NamedTuple

import msgspec

from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn, format_lsn
from excimer.wire.safekeeping import Term, TermStart

RECORD_VERSION: Final = 1
NOT_CLEAN: Final = "it was not shut down cleanly"


class Owner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose a directory is, and which programs may read what they wrote there."""

    tenant_id: TenantId
    timeline_id: TimelineId
    endpoint: str
    postgres: str
    """Full version and identity of the build."""
    module: str
    """Identity of the endpoint module."""


class ShutdownRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PostgreSQL has been shut down here cleanly, and a quorum has all that it wrote."""

    version: int = RECORD_VERSION
    boot_id: str
    owner: Owner
    directory_id: str
    control_digest: str
    """Of pg_control: no two shutdowns leave the same."""
    end_lsn: Lsn
    """Where its WAL ends, behind the shutdown's checkpoint."""
    writer_term: Term
    writer_start_lsn: Lsn
    """In whose term the last byte of its WAL was written, and from where on."""
    ingested_lsn: Lsn
    """How far the pageserver was, as far as was known."""
    superusers: tuple[str, ...]
    """What the bootstrap superuser was called, the likeliest first."""
    stopped_at_s: float
    """Since 1970."""
    size_bytes: int
    """What directory and arena take on the disk."""
    saved_unlogged: bool = True
    """Unlogged rows were saved with this stop, and count again until WAL has left its LSN."""

    @property
    def writer(self) -> TermStart:
        return TermStart(self.writer_term, self.writer_start_lsn)


class FoundDirectory(NamedTuple):
    """What lies where the directory would be."""

    directory_id: str | None
    """As it says itself; None: it does not."""
    arena_id: str | None
    """The directory to which the arena beside it belongs; None: there is no arena that could be used."""
    control_digest: str | None


class QuorumEnd(NamedTuple):
    """The end of WAL that the election found."""

    lsn: Lsn
    writer: TermStart | None


class Warm(NamedTuple):
    record: ShutdownRecord


class Cold(NamedTuple):
    reason: str | None
    """Why not with the directory that is there, or should be; None: there was none."""


def decide_start(
    record: ShutdownRecord | None,
    found: FoundDirectory | None,
    quorum: QuorumEnd,
    *,
    owner: Owner,
    boot_id: str | None,
    not_kept: str | None = None,
) -> Warm | Cold:
    """`record` None: none can be read; `found` None: there is no directory, and `not_kept` is why."""
    if found is None:
        return Cold(not_kept)
    if record is None:
        return Cold(NOT_CLEAN)
    reason = (
        _foreign(record, owner)
        or _of_another_boot(record, boot_id)
        or _changed(record, found)
        or _left_behind(record, quorum)
    )
    return Warm(record) if reason is None else Cold(reason)


def _foreign(record: ShutdownRecord, owner: Owner) -> str | None:
    its = record.owner
    if record.version != RECORD_VERSION:
        return "another version of Excimer left it"
    if (its.tenant_id, its.endpoint) != (owner.tenant_id, owner.endpoint):
        return "it is another endpoint's"
    if its.timeline_id != owner.timeline_id:
        return "the endpoint is on another timeline now"
    if its.postgres != owner.postgres:
        return f"PostgreSQL {its.postgres} left it, and {owner.postgres} is to start"
    if its != owner:
        return "another build of the endpoint module left it"
    return None


def _of_another_boot(record: ShutdownRecord, boot_id: str | None) -> str | None:
    return None if record.boot_id == boot_id else "the machine has been started anew since"


def _changed(record: ShutdownRecord, found: FoundDirectory) -> str | None:
    if record.directory_id != found.directory_id:
        return "it is not the directory that was shut down"
    if found.arena_id is None:
        return "its arena cannot be read"
    if record.directory_id != found.arena_id:
        return "its arena belongs to another directory"
    if record.control_digest != found.control_digest:
        return "it has been changed since it was shut down"
    return None


def _left_behind(record: ShutdownRecord, quorum: QuorumEnd) -> str | None:
    if quorum.lsn != record.end_lsn:
        return (
            f"the branch's WAL ends at {format_lsn(quorum.lsn)}, and it was shut down "
            f"at {format_lsn(record.end_lsn)}"
        )
    if quorum.writer != record.writer:
        return f"another compute has written the branch's WAL up to {format_lsn(quorum.lsn)}"
    return None


def told(decided: Warm | Cold | None) -> dict[str, str]:
    """For logs and /healthz: how it starts, and why so if there was a directory. None: as if it was cold."""
    if isinstance(decided, Warm):
        return {"start": "warm", "start_reason": ""}
    return {"start": "cold", "start_reason": "" if decided is None else decided.reason or ""}
