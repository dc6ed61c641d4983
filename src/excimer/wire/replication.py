"""PostgreSQL's streaming replication protocol: commands as values, and what travels inside CopyData.

::

    server -> client   'w' | start LSN 8 | server's end LSN 8 | time 8 | WAL bytes
                       'k' | server's end LSN 8 | time 8 | reply asked for 1
    client -> server   'r' | written LSN 8 | flushed LSN 8 | applied LSN 8 | time 8 | reply asked for 1
                       'h' | time 8 | xmin 4, its epoch 4 | the same for catalogs

Integers are big-endian, times are microseconds since 2000. Commands are parsed as `pg_receivewal`
and walreceivers of PostgreSQL 14 to 18 write them. Source: manual, "Streaming Replication Protocol".

**Not here:** logical decoding, base backups; sockets.
"""

import re
import struct
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from excimer.base.errors import RefusedError
from excimer.base.lsn import Lsn, format_lsn, parse_lsn
from excimer.wire import pg_messages as pg
from excimer.wire.pg_messages import ProtocolViolationError

POSTGRES_TIMELINE = 1
"""The PostgreSQL timeline id (TLI) of all our WAL: branches are Excimer's timelines instead."""

_WAL_HEAD = struct.Struct(">cQQq")
_KEEPALIVE = struct.Struct(">cQqB")
_STATUS = struct.Struct(">cQQQqB")
_FEEDBACK = struct.Struct(">cqIIII")
_WHOLE_WAL_HEAD = struct.Struct(">cIcQQq")
_WHOLE_STATUS = struct.Struct(">cIcQQQqB")
WAL_HEAD_SIZE_BYTES = _WAL_HEAD.size


class WalData(NamedTuple):
    """WAL bytes that begin at `start_lsn`."""

    start_lsn: Lsn
    server_end_lsn: Lsn
    data: bytes


class Keepalive(NamedTuple):
    server_end_lsn: Lsn
    time: int
    is_reply_requested: bool


class StandbyStatus(NamedTuple):
    """How far a receiver is; all three are ends, of bytes written, made durable, and replayed."""

    write_lsn: Lsn
    flush_lsn: Lsn
    apply_lsn: Lsn
    time: int
    is_reply_requested: bool


class HotStandbyFeedback(NamedTuple):
    """What a hot standby's queries still see: its primary must not remove rows that these transactions may
    see.

    Transaction ids of 64 bits, the epoch above the xid; 0: none.
    """

    xmin: int
    catalog_xmin: int
    """The same for catalogs, for the standby's logical slots."""


NOTHING_NEEDED = HotStandbyFeedback(0, 0)


def oldest_needs(needs: Iterable[HotStandbyFeedback]) -> HotStandbyFeedback:
    """What several standbys need together."""
    told = list(needs)
    return HotStandbyFeedback(
        min((each.xmin for each in told if each.xmin), default=0),
        min((each.catalog_xmin for each in told if each.catalog_xmin), default=0),
    )


def encode_feedback(needs: HotStandbyFeedback, time: int) -> bytes:
    xids = (part for xid in needs for part in (xid & 0xFFFFFFFF, xid >> 32))
    return _FEEDBACK.pack(b"h", time, *xids)


def _decode_feedback(payload: bytes) -> HotStandbyFeedback:
    _, _, xmin, epoch, catalog_xmin, catalog_epoch = _FEEDBACK.unpack(payload)
    return HotStandbyFeedback(
        (epoch << 32 | xmin) if xmin else 0, (catalog_epoch << 32 | catalog_xmin) if catalog_xmin else 0
    )


def wal_data_head(start_lsn: int, server_end_lsn: int, time: int) -> bytes:
    """What goes before WAL bytes inside CopyData."""
    return _WAL_HEAD.pack(b"w", start_lsn, server_end_lsn, time)


def decode_whole_wal(data: bytes) -> WalData | None:
    """What is said by bytes that are exactly one CopyData message with WAL; None when they are anything else.

    A walsender writes message by message, so this is what its socket gives as a rule.
    """
    if len(data) < _WHOLE_WAL_HEAD.size:
        return None
    copy_kind, length, kind, start_lsn, end_lsn, _ = _WHOLE_WAL_HEAD.unpack_from(data)
    if copy_kind != b"d" or kind != b"w" or length != len(data) - 1:
        return None
    return WalData(start_lsn, end_lsn, data[_WHOLE_WAL_HEAD.size :])


def encode_whole_status(positions: tuple[Lsn, Lsn, Lsn], time: int) -> bytes:
    """A CopyData message with the ends of what is written, durable and applied; no reply is asked for."""
    return _WHOLE_STATUS.pack(b"d", 4 + _STATUS.size, b"r", *positions, time, 0)


def encode_keepalive(message: Keepalive) -> bytes:
    return _KEEPALIVE.pack(b"k", message.server_end_lsn, message.time, message.is_reply_requested)


def encode_status(status: StandbyStatus) -> bytes:
    write_lsn, flush_lsn, apply_lsn, time, is_reply_requested = status
    return _STATUS.pack(b"r", write_lsn, flush_lsn, apply_lsn, time, is_reply_requested)


def decode_from_server(payload: bytes) -> WalData | Keepalive:
    """One CopyData payload of a walsender. Raises `ProtocolViolationError`."""
    kind = payload[:1]
    try:
        if kind == b"w":
            _, start_lsn, end_lsn, _ = _WAL_HEAD.unpack_from(payload)
            return WalData(Lsn(start_lsn), Lsn(end_lsn), payload[WAL_HEAD_SIZE_BYTES:])
        if kind == b"k":
            _, end_lsn, time, reply = _KEEPALIVE.unpack(payload)
            return Keepalive(Lsn(end_lsn), time, bool(reply))
    except struct.error as error:
        raise ProtocolViolationError(f"replication message {kind!r} has a wrong size") from error
    raise ProtocolViolationError(f"replication message {kind!r} is not known")


def decode_from_client(payload: bytes) -> StandbyStatus | HotStandbyFeedback:
    """One CopyData payload of a walreceiver. Raises `ProtocolViolationError`."""
    kind = payload[:1]
    if kind not in (b"h", b"r"):
        raise ProtocolViolationError(f"replication message {kind!r} is not known")
    try:
        if kind == b"h":
            return _decode_feedback(payload)
        _, write_lsn, flush_lsn, apply_lsn, time, reply = _STATUS.unpack(payload)
    except struct.error as error:
        raise ProtocolViolationError(f"replication message {kind!r} has a wrong size") from error
    return StandbyStatus(Lsn(write_lsn), Lsn(flush_lsn), Lsn(apply_lsn), time, bool(reply))


# Commands


class UnknownCommandError(RefusedError):
    """A query is not a replication command that a WAL service answers."""


class IdentifySystem(msgspec.Struct, frozen=True):
    pass


class Show(msgspec.Struct, frozen=True):
    name: str
    """Lower case."""


class TimelineHistory(msgspec.Struct, frozen=True):
    postgres_timeline: int


class StartReplication(msgspec.Struct, frozen=True):
    start_lsn: Lsn
    postgres_timeline: int | None = None
    slot: str | None = None


class CreateReplicationSlot(msgspec.Struct, frozen=True):
    slot: str


class ReadReplicationSlot(msgspec.Struct, frozen=True):
    slot: str


class ConfirmDurable(msgspec.Struct, frozen=True):
    """Excimer's own: all that WAL below `lsn` says is durable in object storage."""

    lsn: Lsn


class EmptyCommand(msgspec.Struct, frozen=True):
    """Nothing but white space: libpq's ping."""


Command = (
    IdentifySystem
    | Show
    | TimelineHistory
    | StartReplication
    | CreateReplicationSlot
    | ReadReplicationSlot
    | ConfirmDurable
    | EmptyCommand
)

_NAME = r'"?([A-Za-z0-9_.]+)"?'
_IDENTIFY_SYSTEM = re.compile(r"IDENTIFY_SYSTEM\Z", re.IGNORECASE)
_SHOW = re.compile(rf"SHOW\s+{_NAME}\Z", re.IGNORECASE)
_TIMELINE_HISTORY = re.compile(r"TIMELINE_HISTORY\s+([0-9]{1,10})\Z", re.IGNORECASE)
_START = re.compile(
    rf"START_REPLICATION\s+(?:SLOT\s+{_NAME}\s+)?(?:PHYSICAL\s+)?([0-9A-F]{{1,8}}/[0-9A-F]{{1,8}})"
    r"(?:\s+TIMELINE\s+([0-9]{1,10}))?\Z",
    re.IGNORECASE,
)
_CREATE_SLOT = re.compile(
    rf"CREATE_REPLICATION_SLOT\s+{_NAME}(?:\s+TEMPORARY)?\s+PHYSICAL\b.*\Z", re.IGNORECASE | re.DOTALL
)
_CONFIRM_DURABLE = re.compile(r"CONFIRM_DURABLE\s+([0-9A-F]{1,8}/[0-9A-F]{1,8})\Z", re.IGNORECASE)
_READ_SLOT = re.compile(rf"READ_REPLICATION_SLOT\s+{_NAME}\Z", re.IGNORECASE)


def parse_command(query: str) -> Command:
    """A walsender command. Raises `UnknownCommandError`."""
    text = query.strip().rstrip(";").rstrip()
    if not text:
        return EmptyCommand()
    if _IDENTIFY_SYSTEM.match(text):
        return IdentifySystem()
    if match := _SHOW.match(text):
        return Show(match[1].lower())
    if match := _TIMELINE_HISTORY.match(text):
        return TimelineHistory(int(match[1]))
    if match := _START.match(text):
        timeline = int(match[3]) if match[3] else None
        return StartReplication(parse_lsn(match[2]), timeline, match[1])
    if match := _CREATE_SLOT.match(text):
        return CreateReplicationSlot(match[1])
    if match := _READ_SLOT.match(text):
        return ReadReplicationSlot(match[1])
    if match := _CONFIRM_DURABLE.match(text):
        return ConfirmDurable(parse_lsn(match[1]))
    raise UnknownCommandError(f"a safekeeper does not answer {text.split()[0][:40]!r}")


def format_confirm_durable(command: ConfirmDurable) -> str:
    return f"CONFIRM_DURABLE {format_lsn(command.lsn)}"


def format_start_replication(command: StartReplication) -> str:
    slot = f"SLOT {command.slot} " if command.slot else ""
    timeline = f" TIMELINE {command.postgres_timeline}" if command.postgres_timeline else ""
    return f"START_REPLICATION {slot}PHYSICAL {format_lsn(command.start_lsn)}{timeline}"


# Which timeline: the start-up parameter `options`

_OPTION = re.compile(r"(?:-c\s*|--)([A-Za-z0-9_.]+)=(\S+)")


def parse_options(options: str) -> dict[str, str]:
    """Settings in libpq's `options`: ``-c name=value`` or ``--name=value``; `-` and `_` are not confused."""
    return {match[1]: match[2] for match in _OPTION.finditer(options)}


def format_options(tenant_id: str, timeline_id: str) -> str:
    """The `options` by which a reader names its timeline at a safekeeper."""
    return f"-c excimer.tenant_id={tenant_id} -c excimer.timeline_id={timeline_id}"


class SystemIdentity(NamedTuple):
    """IDENTIFY_SYSTEM's answer."""

    system_id: int
    postgres_timeline: int
    flush_lsn: Lsn


def decode_system_identity(row: list[bytes | None]) -> SystemIdentity:
    """Raises `ProtocolViolationError`."""
    try:
        system_id, timeline, lsn = (value.decode() for value in row[:3] if value is not None)
        return SystemIdentity(int(system_id), int(timeline), parse_lsn(lsn))
    except ValueError as error:
        raise ProtocolViolationError(f"{row!r} is not an answer to IDENTIFY_SYSTEM") from error


def encode_system_identity(identity: SystemIdentity) -> bytes:
    """The whole answer to IDENTIFY_SYSTEM, of a server that no database was named to."""
    columns = [
        pg.Column("systemid"),
        pg.Column("timeline", pg.INT8_OID, 8),
        pg.Column("xlogpos"),
        pg.Column("dbname"),
    ]
    row = [
        str(identity.system_id).encode(),
        str(identity.postgres_timeline).encode(),
        format_lsn(identity.flush_lsn).encode(),
        None,
    ]
    return pg.encode_result(columns, [row], "IDENTIFY_SYSTEM")
