"""Messages of the broker: small statuses that safekeepers and pageservers publish about timelines.

They travel as JSON over NATS, one subject per kind and timeline, published on change and then again
and again, ever more rarely. They are hints, never truth: one may be lost, late or repeated, so whoever
acts upon one checks with its sender. That a node still lives is told once for all its timelines, each
second; a node that has just come asks for all statuses.

====================================  =============================
subject                               message
====================================  =============================
excimer.safekeeper.TENANT.TIMELINE    `SafekeeperTimelineStatus`
excimer.pageserver.TENANT.TIMELINE    `PageserverTimelineStatus`
excimer.alive.safekeeper.ID           nothing
excimer.ask.safekeepers               nothing
====================================  =============================

Not here: the connection (`excimer.service.broker_client`).
"""

from typing import Final

import msgspec

from excimer.base.errors import RefusedError
from excimer.base.ids import NodeId, TenantId, TimelineId, parse_tenant_id, parse_timeline_id
from excimer.base.lsn import INVALID_LSN, Lsn

SAFEKEEPER_PREFIX: Final = "excimer.safekeeper"
PAGESERVER_PREFIX: Final = "excimer.pageserver"
ALIVE_PREFIX: Final = "excimer.alive.safekeeper"
ASK_SAFEKEEPERS_SUBJECT: Final = "excimer.ask.safekeepers"
ALIVE_INTERVAL_S: Final = 1.0


class BrokerMessageError(RefusedError):
    """A broker message is not what its subject promises."""


class SafekeeperTimelineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What one safekeeper has of a timeline. `flush_lsn` >= what is committed there."""

    safekeeper_id: NodeId
    tenant_id: TenantId
    timeline_id: TimelineId
    term: int
    flush_lsn: Lsn
    commit_lsn: Lsn
    replication_address: str
    http_address: str
    durable_lsn: Lsn = INVALID_LSN
    """Below this it knows everything to be durable in object storage."""


class PageserverTimelineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far a pageserver has come with a timeline: remote <= disk <= last record."""

    pageserver_id: NodeId
    tenant_id: TenantId
    timeline_id: TimelineId
    last_record_lsn: Lsn
    disk_consistent_lsn: Lsn
    remote_consistent_lsn: Lsn


TimelineStatus = SafekeeperTimelineStatus | PageserverTimelineStatus

_encode = msgspec.json.Encoder().encode
_safekeeper_decoder = msgspec.json.Decoder(SafekeeperTimelineStatus)
_pageserver_decoder = msgspec.json.Decoder(PageserverTimelineStatus)


def subject_of(status: TimelineStatus) -> str:
    prefix = SAFEKEEPER_PREFIX if isinstance(status, SafekeeperTimelineStatus) else PAGESERVER_PREFIX
    return f"{prefix}.{status.tenant_id}.{status.timeline_id}"


def safekeeper_subject(tenant_id: TenantId | None = None, timeline_id: TimelineId | None = None) -> str:
    """The subject of one timeline, of a tenant's timelines, or of all."""
    return _subject(SAFEKEEPER_PREFIX, tenant_id, timeline_id)


def pageserver_subject(tenant_id: TenantId | None = None, timeline_id: TimelineId | None = None) -> str:
    """The subject of one timeline, of a tenant's timelines, or of all."""
    return _subject(PAGESERVER_PREFIX, tenant_id, timeline_id)


def alive_subject(safekeeper_id: NodeId | None = None) -> str:
    """The subject of one safekeeper's sign of life, or of all."""
    return f"{ALIVE_PREFIX}.{'*' if safekeeper_id is None else safekeeper_id}"


def parse_alive_subject(subject: str) -> NodeId:
    """Raises `BrokerMessageError`."""
    prefix, _, text = subject.rpartition(".")
    if prefix != ALIVE_PREFIX or not text.isascii() or not text.isdigit():
        raise BrokerMessageError(f"{subject!r} names no safekeeper")
    return NodeId(int(text))


def encode_status(status: TimelineStatus) -> bytes:
    return _encode(status)


def decode_status(subject: str, payload: bytes) -> TimelineStatus:
    """The message received on `subject`. Raises `BrokerMessageError` also when the two disagree."""
    decoder: msgspec.json.Decoder[SafekeeperTimelineStatus] | msgspec.json.Decoder[PageserverTimelineStatus]
    if subject.startswith(SAFEKEEPER_PREFIX + "."):
        decoder = _safekeeper_decoder
    elif subject.startswith(PAGESERVER_PREFIX + "."):
        decoder = _pageserver_decoder
    else:
        raise BrokerMessageError(f"{subject!r} is not a subject of timeline statuses")
    try:
        status = decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BrokerMessageError(f"bad message on {subject}: {error}") from error
    parse_tenant_id(status.tenant_id)
    parse_timeline_id(status.timeline_id)
    if subject_of(status) != subject:
        raise BrokerMessageError(f"the message on {subject} is about {subject_of(status)}")
    return status


def _subject(prefix: str, tenant_id: TenantId | None, timeline_id: TimelineId | None) -> str:
    if tenant_id is None:
        return f"{prefix}.>"
    return f"{prefix}.{tenant_id}.{timeline_id or '*'}"
