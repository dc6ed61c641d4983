"""pg_control: the 8 KiB file from which PostgreSQL learns where and how to start.

::

    0 ......... 40 ............ 128 ............ 256 .......... 288 (292 from 18 on)
    identity    CheckPoint copy  settings copies  [18: char      CRC-32C of all before
    and state                    and limits        signedness]
                                                  nonce (32)

Source: src/include/catalog/pg_control.h of 14 to 18; the round trip is byte-identical.
"""

import struct
from enum import IntEnum
from typing import Any, Self

import google_crc32c
import msgspec

from excimer.base.errors import CorruptionError
from excimer.pgformat.checkpoint import CheckPoint

CONTROL_FILE_SIZE_BYTES = 8192
CONTROL_VERSIONS = {14: 1300, 15: 1300, 16: 1300, 17: 1700, 18: 1800}
WAL_PAGE_MAGICS = {14: 0xD10D, 15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}

_HEAD = struct.Struct("<QIIi4xqQ")
_TAIL = struct.Struct("<QQI4xQQ?3xi?3xiiiii?3xIdIIIIIIII?3xI")
_CHECKPOINT_OFFSET = 40
_TAIL_OFFSET = 128
_NONCE_SIZE_BYTES = 32


class ClusterState(IntEnum):
    STARTUP = 0
    SHUTDOWNED = 1
    SHUTDOWNED_IN_RECOVERY = 2
    SHUTDOWNING = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


class ControlFileError(CorruptionError):
    """pg_control's bytes are not a control file of this PostgreSQL version."""


class ControlFile(msgspec.Struct, frozen=True, kw_only=True):
    """All of ControlFileData; field order is the C struct's."""

    system_id: int
    control_version: int
    catalog_version: int
    state: int
    time: int
    checkpoint_lsn: int

    checkpoint: CheckPoint

    unlogged_lsn: int
    min_recovery_point: int
    min_recovery_point_timeline: int
    backup_start: int
    backup_end: int
    backup_end_required: bool
    wal_level: int
    wal_log_hints: bool
    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_xacts: int
    max_locks_per_xact: int
    track_commit_timestamp: bool
    max_align: int
    float_format: float
    block_size: int
    relation_segment_blocks: int
    wal_block_size: int
    wal_segment_size: int
    name_data_len: int
    index_max_keys: int
    toast_max_chunk_size: int
    large_object_block_size: int
    float8_by_value: bool
    data_checksum_version: int

    char_signedness: bool | None
    """From 18 on; None before."""
    nonce: bytes

    @classmethod
    def unpack(cls, data: bytes, pg_version: int) -> Self:
        """Parses and checks. Raises `ControlFileError` on a wrong size, version or CRC."""
        crc_offset = 292 if pg_version >= 18 else 288
        if len(data) < crc_offset + 4:
            raise ControlFileError(f"pg_control has only {len(data)} bytes")
        (crc,) = struct.unpack_from("<I", data, crc_offset)
        if google_crc32c.value(data[:crc_offset]) != crc:
            raise ControlFileError(f"pg_control's checksum is wrong, or it is not PostgreSQL {pg_version}'s")
        head, tail = _fields()
        values: dict[str, Any] = dict(zip(head, _HEAD.unpack_from(data), strict=True))
        values["checkpoint"] = CheckPoint.unpack(data[_CHECKPOINT_OFFSET:_TAIL_OFFSET])
        values |= zip(tail, _TAIL.unpack_from(data, _TAIL_OFFSET), strict=True)
        nonce_offset = _TAIL_OFFSET + _TAIL.size
        values["char_signedness"] = None
        if pg_version >= 18:
            values["char_signedness"] = bool(data[nonce_offset])
            nonce_offset += 1
        values["nonce"] = data[nonce_offset : nonce_offset + _NONCE_SIZE_BYTES]
        control = cls(**values)
        if control.control_version != CONTROL_VERSIONS.get(pg_version):
            raise ControlFileError(
                f"pg_control has version {control.control_version}, which is not PostgreSQL {pg_version}'s"
            )
        return control

    def pack(self) -> bytes:
        """The file, padded with zeros to 8192 bytes."""
        head, tail = _fields()
        body = b"".join(
            (
                _HEAD.pack(*(getattr(self, name) for name in head)),
                self.checkpoint.pack(),
                _TAIL.pack(*(getattr(self, name) for name in tail)),
                b"" if self.char_signedness is None else bytes([self.char_signedness]),
                self.nonce,
            )
        )
        body += bytes(-len(body) % 4)
        body += struct.pack("<I", google_crc32c.value(body))
        return body.ljust(CONTROL_FILE_SIZE_BYTES, b"\0")


def _fields() -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = ControlFile.__struct_fields__
    return names[:6], names[7:-2]
