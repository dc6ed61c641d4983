"""A timeline's control file: what it is and what its acceptor has promised (C2).

::

    +------+---------+--------+--------+-------------------+
    | EXSK | version | length | crc32c | MessagePack       |   little-endian
    |  4   |    4    |   4    |   4    | `ControlRecord`   |   crc32c of the MessagePack
    +------+---------+--------+--------+-------------------+

It is replaced whole: a new file is written and synced, renamed over the old one, and the directory
synced. So it is always one that was written; one that does not parse is damage, not a torn write.

Not here: when it is written (`timeline`).
"""

import struct
from pathlib import Path
from typing import Self

import google_crc32c
import msgspec

from excimer.base.errors import CorruptionError
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, Lsn
from excimer.consensus.acceptor import AcceptorState
from excimer.consensus.term_history import TermHistory
from excimer.safekeeper.disk import Disk
from excimer.wire.safekeeping import ProposerId, Term, TermStart, TimelineIdentity

CONTROL_FILE_NAME = "control"
_MAGIC = b"EXSK"
_VERSION = 2
_VERSIONS_READ = (1, 2)
"""1 had neither `wal_start_lsn` nor `durable_lsn`."""
_HEAD = struct.Struct("<4sIII")


class ControlFileDamagedError(CorruptionError):
    """A control file is not what was written: this copy of the timeline must not be used."""


class ControlRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds."""

    node_id: NodeId
    tenant_id: TenantId
    timeline_id: TimelineId
    pg_version: int
    system_id: int
    wal_segment_size_bytes: int
    timeline_start_lsn: Lsn
    promised_term: Term
    voted_for: bytes
    history: tuple[tuple[int, int], ...]
    """(term, start LSN)."""
    commit_lsn: Lsn
    horizon_lsn: Lsn
    wal_start_lsn: Lsn = INVALID_LSN
    """No file with WAL below this needs to be there: it was removed, or is about to be. 0: none was."""
    durable_lsn: Lsn = INVALID_LSN
    """Below this the pageserver has made everything durable in object storage."""

    @classmethod
    def of(
        cls,
        node_id: NodeId,
        identity: TimelineIdentity,
        start_lsn: Lsn,
        state: AcceptorState,
        *,
        wal_start_lsn: Lsn = INVALID_LSN,
        durable_lsn: Lsn = INVALID_LSN,
    ) -> Self:
        return cls(
            node_id=node_id,
            tenant_id=identity.tenant_id,
            timeline_id=identity.timeline_id,
            pg_version=identity.pg_version,
            system_id=identity.system_id,
            wal_segment_size_bytes=identity.wal_segment_size_bytes,
            timeline_start_lsn=start_lsn,
            promised_term=state.promised_term,
            voted_for=state.voted_for,
            history=state.history.entries,
            commit_lsn=state.commit_lsn,
            horizon_lsn=state.horizon_lsn,
            wal_start_lsn=wal_start_lsn,
            durable_lsn=durable_lsn,
        )

    @property
    def identity(self) -> TimelineIdentity:
        return TimelineIdentity(
            tenant_id=self.tenant_id,
            timeline_id=self.timeline_id,
            pg_version=self.pg_version,
            system_id=self.system_id,
            wal_segment_size_bytes=self.wal_segment_size_bytes,
        )

    @property
    def state(self) -> AcceptorState:
        entries = tuple(TermStart(Term(term), Lsn(start_lsn)) for term, start_lsn in self.history)
        return AcceptorState(
            promised_term=self.promised_term,
            voted_for=ProposerId(self.voted_for),
            history=TermHistory(entries),
            commit_lsn=self.commit_lsn,
            horizon_lsn=self.horizon_lsn,
        )


def encode_control_record(record: ControlRecord) -> bytes:
    body = msgspec.msgpack.encode(record)
    return _HEAD.pack(_MAGIC, _VERSION, len(body), google_crc32c.value(body)) + body


def decode_control_record(data: bytes, where: str) -> ControlRecord:
    """Raises `ControlFileDamagedError` naming `where`."""
    if len(data) < _HEAD.size:
        raise ControlFileDamagedError(f"control file {where} is cut short")
    magic, version, length, checksum = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if magic != _MAGIC or len(body) != length or google_crc32c.value(body) != checksum:
        raise ControlFileDamagedError(f"control file {where} is damaged: its checksum is wrong")
    if version not in _VERSIONS_READ:
        raise ControlFileDamagedError(
            f"control file {where} has format {version}, this program knows up to {_VERSION}"
        )
    try:
        return msgspec.msgpack.decode(body, type=ControlRecord)
    except msgspec.DecodeError as error:
        raise ControlFileDamagedError(f"control file {where} does not parse: {error}") from error


def read_control_file(directory: Path) -> ControlRecord:
    """Raises `ControlFileDamagedError`, also when there is none. Blocks."""
    path = directory / CONTROL_FILE_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ControlFileDamagedError(f"control file {path} is missing") from error
    return decode_control_record(data, str(path))


def write_control_file(directory: Path, record: ControlRecord, disk: Disk) -> None:
    """Durable when it returns. Raises OSError: the old file then stays. Blocks."""
    disk.replace_file(directory / CONTROL_FILE_NAME, encode_control_record(record))
