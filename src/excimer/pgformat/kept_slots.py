"""All replication slots of a timeline as one object, as they were at the last change that PostgreSQL saved.

::

    excimer replication slots 1 CRC32C\\n   format version, crc32c (8 hex digits) of all that follows
    MessagePack of KeptSlots

A slot is its state file, byte for byte, and the snapshot that decoding from its restart LSN begins with:
without that it would skip what was open there. Both were on disk before PostgreSQL let go of anything older.

Not here: where the object lies (`excimer.storage`), what a clean stop saves (`saved_state`).
"""

import re
from typing import Final

import google_crc32c
import msgspec

from excimer.base.errors import CorruptionError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import MAX_LSN, Lsn
from excimer.pgformat.replication_slot import SLOT_VERSIONS, DamagedSlotError, ReplicationSlot, unpack_slot

FORMAT_VERSION: Final = 1
OBJECT_SIZE_BYTES_MAX: Final = 16 << 20

_FIRST_LINE = re.compile(rb"excimer replication slots ([0-9]{1,9}) ([0-9a-f]{8})\n")
_FIRST_LINE_BYTES_MAX: Final = 64


class DamagedSlotsError(CorruptionError):
    """Bytes are not the slots of a timeline."""


class KeptSlot(msgspec.Struct, frozen=True, kw_only=True):
    state: bytes
    """pg_replslot/NAME/state."""
    snapshot: bytes | None = None
    """The file of `snapshot_path`; None: there was none, and decoding finds one as it did at first."""


class KeptSlots(msgspec.Struct, frozen=True, kw_only=True):
    tenant_id: TenantId
    timeline_id: TimelineId
    pg_version: int
    wal_limit_bytes: int
    """How much WAL behind what is durable is kept for them; 0: any amount."""
    slots: list[KeptSlot]

    def parsed(self) -> list[tuple[ReplicationSlot, KeptSlot]]:
        return [(unpack_slot(slot.state, self.pg_version), slot) for slot in self.slots]

    def needed_lsn(self, durable_lsn: Lsn) -> Lsn:
        """WAL from here on is kept for them; `MAX_LSN`: they need none."""
        needed_lsn = min((slot.restart_lsn for slot, _ in self.parsed() if slot.needs_wal), default=MAX_LSN)
        return Lsn(max(needed_lsn, durable_lsn - self.wal_limit_bytes if self.wal_limit_bytes else 0))


def snapshot_path(restart_lsn: Lsn) -> str:
    """Of the snapshot that was written at a slot's restart LSN."""
    return f"pg_logical/snapshots/{restart_lsn >> 32:X}-{restart_lsn & 0xFFFFFFFF:X}.snap"


def pack_slots(slots: KeptSlots) -> bytes:
    body = msgspec.msgpack.encode(slots)
    return b"excimer replication slots %d %08x\n" % (FORMAT_VERSION, google_crc32c.value(body)) + body


def unpack_slots(data: bytes, name: str) -> KeptSlots:
    """Everything checked. Raises `DamagedSlotsError`, which names the object `name`."""
    match = _FIRST_LINE.match(data[:_FIRST_LINE_BYTES_MAX])
    if match is None:
        raise DamagedSlotsError(f"{name} is damaged: its first line is not that of replication slots")
    if int(match[1]) != FORMAT_VERSION:
        raise DamagedSlotsError(f"{name} has version {int(match[1])}, this program knows {FORMAT_VERSION}")
    body = data[match.end() :]
    if google_crc32c.value(body) != int(match[2], 16):
        raise DamagedSlotsError(f"{name} is damaged: it fails its checksum")
    try:
        slots = msgspec.msgpack.decode(body, type=KeptSlots)
        if slots.pg_version not in SLOT_VERSIONS:
            raise DamagedSlotsError(f"{name} is of PostgreSQL {slots.pg_version}")
        names = [slot.name for slot, _ in slots.parsed()]
    except (msgspec.DecodeError, UnicodeDecodeError, DamagedSlotError) as error:
        raise DamagedSlotsError(f"{name} cannot be understood: {error}") from error
    if len(set(names)) != len(names) or not all(re.fullmatch("[a-z0-9_]{1,63}", each) for each in names):
        raise DamagedSlotsError(f"{name} is damaged: it names the slots {', '.join(names)[:200]}")
    return slots
