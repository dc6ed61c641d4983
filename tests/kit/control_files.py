"""A control file of PostgreSQL 18 with small WAL segments, for tests without a server."""

from typing import Any

from excimer.pgformat.checkpoint import CheckPoint
from excimer.pgformat.control_file import ControlFile

SEGMENT = 1 << 20

CHECKPOINT = CheckPoint(
    redo=0,
    timeline=1,
    prev_timeline=1,
    full_page_writes=False,
    wal_level=1,
    next_xid=750,
    next_oid=16384,
    next_multi=1,
    next_multi_offset=0,
    oldest_xid=731,
    oldest_xid_db=1,
    oldest_multi=1,
    oldest_multi_db=1,
    time=0,
    oldest_commit_ts_xid=0,
    newest_commit_ts_xid=0,
    oldest_active_xid=0,
)

_ZEROS: dict[str, Any] = dict.fromkeys(ControlFile.__struct_fields__, 0)

CONTROL = ControlFile(
    **_ZEROS
    | {
        "checkpoint": CHECKPOINT,
        "control_version": 1800,
        "wal_segment_size": SEGMENT,
        "nonce": bytes(range(32)),
        "char_signedness": True,
        "float_format": 1234567.0,
    }
)
