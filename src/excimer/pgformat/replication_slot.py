"""pg_replslot/NAME/state: what PostgreSQL keeps of a replication slot on disk. Read only.

::

    0      4      8        12      16    80        84           88    92            96           104
    +------+------+--------+-------+-----+---------+------------+-----+-------------+------------+--------+
    | magic| CRC  | version| length| name| database| persistency| xmin| catalog xmin| restart LSN| invalid|
    +------+------+--------+-------+-----+---------+------------+-----+-------------+------------+--------+

The checksum is of all from byte 8 on. `persistency` is 0 unless the slot is not made yet (1), or goes with
its session (2). `invalid` is not zero once PostgreSQL has given the slot up: an LSN (14, 15) or a cause (from
16 on). The database is 0 for a physical slot. Source: ReplicationSlotOnDisk, slot.c and slot.h.
"""

import struct
from typing import NamedTuple

import google_crc32c

from excimer.base.errors import CorruptionError
from excimer.base.lsn import Lsn

SLOT_MAGIC = 0x1051CA1
SLOT_VERSIONS = {14: 2, 15: 2, 16: 3, 17: 5, 18: 5}

_HEAD = struct.Struct("<IIII64sIIIIQI")
_CHECKED_FROM = 8


class DamagedSlotError(CorruptionError):
    """A slot's file is not what PostgreSQL writes."""


class ReplicationSlot(NamedTuple):
    name: str
    is_logical: bool
    restart_lsn: Lsn
    """The oldest WAL that it needs; 0: none yet."""
    is_invalidated: bool
    """PostgreSQL has given it up: it needs no WAL, and gives none."""
    is_persistent: bool
    """A restart of PostgreSQL keeps it."""
    is_unfinished: bool
    """It is being made, which may wait for transactions, and already needs its WAL; a restart drops it."""

    @property
    def needs_wal(self) -> bool:
        return bool(self.restart_lsn) and not self.is_invalidated


def unpack_slot(data: bytes, pg_version: int) -> ReplicationSlot:
    """Parses and checks. Raises `DamagedSlotError`."""
    if len(data) < _HEAD.size:
        raise DamagedSlotError(f"a slot's file has only {len(data)} bytes")
    head = _HEAD.unpack_from(data)
    magic, checksum, version, length, name, database, persistency, *_, restart_lsn, invalid = head
    if magic != SLOT_MAGIC or version != SLOT_VERSIONS[pg_version]:
        raise DamagedSlotError(f"a slot's file begins with {magic:#x} and has version {version}")
    if length != len(data) - 16 or google_crc32c.value(data[_CHECKED_FROM:]) != checksum:
        raise DamagedSlotError("a slot's file fails its checksum")
    text = name.partition(b"\0")[0].decode("ascii", "replace")
    return ReplicationSlot(
        text,
        bool(database),
        Lsn(restart_lsn),
        bool(invalid),
        is_persistent=persistency == 0,
        is_unfinished=persistency == 1,
    )
