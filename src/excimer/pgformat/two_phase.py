"""Two-phase state files: what PostgreSQL keeps of a prepared transaction, `pg_twophase/XID`.

::

    magic 4 | total length 4 | xid 4 | ... | subxact count 4 (at 28) | ... | gid length 2 | ... |
    gid, padded to 8 | subxact xids, 4 each | relations, statistics, messages, records | crc32c 4

The header is 64 bytes in 14 and 72 from 15 on, which added two counts of dropped statistics.
Source: TwoPhaseFileHeader (xl_xact_prepare) in src/include/access/xact.h.

Not here: the records behind the subxacts; only restoring the transaction needs those.
"""

import struct
from typing import NamedTuple

from excimer.base.errors import CorruptionError

_XID_OFFSET = 8
_SUBXACTS_OFFSET = 28
_GID_LENGTH_OFFSETS = {14: 46}
_GID_LENGTH_OFFSET = 54
_HEADER_BYTES = {14: 64}
_HEADER_SIZE_BYTES = 72


class TwoPhaseError(CorruptionError):
    """A two-phase state file does not hold what its header says."""


class PreparedTransaction(NamedTuple):
    xid: int
    """32 bits."""
    subxids: tuple[int, ...]


def parse_two_phase(data: bytes, pg_version: int) -> PreparedTransaction:
    """The xids that committing this transaction marks. Raises `TwoPhaseError`."""
    header = _HEADER_BYTES.get(pg_version, _HEADER_SIZE_BYTES)
    try:
        (xid,) = struct.unpack_from("<I", data, _XID_OFFSET)
        (count,) = struct.unpack_from("<i", data, _SUBXACTS_OFFSET)
        (gid,) = struct.unpack_from("<H", data, _GID_LENGTH_OFFSETS.get(pg_version, _GID_LENGTH_OFFSET))
        start = header + (gid + 7 & ~7)
        if count < 0 or start + 4 * count > len(data):
            raise TwoPhaseError(f"a two-phase file of {len(data)} bytes claims {count} subtransactions")
        return PreparedTransaction(xid, struct.unpack_from(f"<{count}I", data, start))
    except struct.error as error:
        raise TwoPhaseError(f"a two-phase file has only {len(data)} bytes") from error


def two_phase_path(full_xid: int, pg_version: int) -> str:
    """Path inside a data directory: 8 hex digits up to 16, 16 (epoch and xid) from 17 on."""
    if pg_version >= 17:
        return f"pg_twophase/{full_xid:016X}"
    return f"pg_twophase/{full_xid & 0xFFFFFFFF:08X}"
