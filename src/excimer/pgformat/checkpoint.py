"""PostgreSQL's CheckPoint record body: 88 bytes, the same offsets in 14 to 18.

`wal_level` occupies bytes 20-23 from 17 on; before, they are padding that is kept as read.
Source: src/include/catalog/pg_control.h.
"""

import struct
from typing import Self

import msgspec

_LAYOUT = struct.Struct("<QII?3xiQIIIIIII4xqIII4x")
CHECKPOINT_SIZE_BYTES = 88
assert _LAYOUT.size == CHECKPOINT_SIZE_BYTES


class CheckPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint's fields, in the order of the C struct."""

    redo: int
    timeline: int
    prev_timeline: int
    full_page_writes: bool
    wal_level: int
    next_xid: int
    """64 bits: epoch and xid."""
    next_oid: int
    next_multi: int
    next_multi_offset: int
    oldest_xid: int
    oldest_xid_db: int
    oldest_multi: int
    oldest_multi_db: int
    time: int
    """Seconds since 1970 (pg_time_t)."""
    oldest_commit_ts_xid: int
    newest_commit_ts_xid: int
    oldest_active_xid: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From the first 88 bytes. Raises struct.error when there are fewer."""
        values = _LAYOUT.unpack_from(data)
        return cls(**dict(zip(cls.__struct_fields__, values, strict=True)))

    def pack(self) -> bytes:
        return _LAYOUT.pack(*(getattr(self, name) for name in self.__struct_fields__))
