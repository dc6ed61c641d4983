"""What a checkpoint taken at an LSN would say, and the settings pg_control copies from WAL.

The value of the CHECKPOINT key, 120 bytes little-endian::

    +------------+-----+---------+-------------+----------+-------+-----------+-------+------------+---+
    | CheckPoint | max | worker  | WAL senders | prepared | locks | wal_level | hints | track      | 0 |
    | 88         | conn| procs   |             | xacts    | /xact |           | (u8)  | commit ts  |   |
    +------------+-----+---------+-------------+----------+-------+-----------+-------+------------+---+

Every record that changes a field makes a new version of the key, so that a basebackup of any past
moment finds exact fields. One exception keeps that affordable: `next_xid` is stored rounded up to
where the next page of commit status or commit times begins (`stored_next_xid`). PostgreSQL cannot
tell that from transactions that left no trace; and because the first xid of a page is never skipped,
a compute that starts there logs the new page, as every replay of its WAL needs.

Not here: keeping it up to date (`_native/wal_decoder.pyx`, `excimer.pageserver.special_records`).
"""

import struct
from typing import Self

import msgspec

from excimer.pgformat.checkpoint import CHECKPOINT_SIZE_BYTES, CheckPoint
from excimer.pgformat.control_file import ControlFile
from excimer.pgformat.slru import COMMIT_TIMES_PER_PAGE, FIRST_NORMAL_XID, XACTS_PER_PAGE

CHECKPOINT_STATE_SIZE_BYTES = 120

_SETTINGS = struct.Struct("<iiiiii??6x")
_PARAMETER_CHANGE = struct.Struct("<iiiiii??")
assert CHECKPOINT_SIZE_BYTES + _SETTINGS.size == CHECKPOINT_STATE_SIZE_BYTES


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """pg_control's copies of settings that matter to whoever replays WAL; xl_parameter_change's order."""

    max_connections: int
    max_worker_processes: int
    max_wal_senders: int
    max_prepared_xacts: int
    max_locks_per_xact: int
    wal_level: int
    wal_log_hints: bool
    track_commit_timestamp: bool

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From an XLOG_PARAMETER_CHANGE record's main data. Raises struct.error when it is short."""
        return cls(**dict(zip(cls.__struct_fields__, _PARAMETER_CHANGE.unpack_from(data), strict=True)))

    @classmethod
    def from_control_file(cls, control: ControlFile) -> Self:
        return cls(**{name: getattr(control, name) for name in cls.__struct_fields__})


class CheckpointState(msgspec.Struct, frozen=True):
    checkpoint: CheckPoint
    settings: ClusterSettings

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises struct.error when `data` is not 120 bytes."""
        settings = dict(
            zip(
                ClusterSettings.__struct_fields__,
                _SETTINGS.unpack(data[CHECKPOINT_SIZE_BYTES:]),
                strict=True,
            )
        )
        return cls(CheckPoint.unpack(data), ClusterSettings(**settings))

    def pack(self) -> bytes:
        settings = (getattr(self.settings, name) for name in ClusterSettings.__struct_fields__)
        return self.checkpoint.pack() + _SETTINGS.pack(*settings)

    def apply_to(self, control: ControlFile) -> ControlFile:
        """pg_control with this checkpoint and these settings."""
        settings = {name: getattr(self.settings, name) for name in ClusterSettings.__struct_fields__}
        return msgspec.structs.replace(control, checkpoint=self.checkpoint, **settings)


def stored_next_xid(next_xid: int) -> int:
    """`next_xid` (64 bits) rounded up to the first xid of a page, which may be itself.

    Xids 0 to 2 are permanent: the first page of all begins with 3, after every wraparound too.
    """
    epoch, xid = divmod(next_xid, 1 << 32)
    if xid > FIRST_NORMAL_XID:
        xid = min(-(-xid // per_page) * per_page for per_page in (XACTS_PER_PAGE, COMMIT_TIMES_PER_PAGE))
        epoch, xid = epoch + (xid >> 32), xid & 0xFFFFFFFF
    return epoch << 32 | max(xid, FIRST_NORMAL_XID)
