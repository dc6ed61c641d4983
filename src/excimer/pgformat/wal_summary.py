"""Summaries of WAL (PostgreSQL 17 and newer, pg_wal/summaries): which blocks changed between two LSNs.

Incremental backups rest upon them. PostgreSQL's summarizer begins where the newest summary ends, and without
any at the beginning of the oldest segment, of which a compute has nothing below its start. So a start
directory gets one summary that says where that is, and says nothing about any WAL::

    name   timeline (8 hex digits), start LSN (16), end LSN (16), ".summary"
    bytes  +-------+----------+-------------------------+--------+
           | magic | entries  | an entry that is all 0  | CRC-32C|
           | 4     | none     | 24                      | 4      |
           +-------+----------+-------------------------+--------+

From the start LSN to itself it covers no WAL, so no incremental backup can take it for a proof that
nothing changed: one whose base is older than the start fails with PostgreSQL's "WAL summaries are required".
Source: blkreftable.c, walsummary.c, walsummarizer.c (GetOldestUnsummarizedLSN).

Not here: summaries with entries, which PostgreSQL makes itself.
"""

import struct
from typing import Final

import google_crc32c

from excimer.base.lsn import Lsn

SUMMARIES_DIRECTORY: Final = "pg_wal/summaries"
FIRST_VERSION: Final = 17
_MAGIC: Final = 0x652B137B
_ENTRY_SIZE_BYTES: Final = 24
_TIMELINE: Final = 1


def start_summary(start_lsn: Lsn) -> tuple[str, bytes]:
    """Path in the data directory and content of a summary of no WAL, behind which PostgreSQL goes on.

    `start_lsn` must be the end of a record.
    """
    bounds = f"{start_lsn >> 32:08X}{start_lsn & 0xFFFFFFFF:08X}"
    body = struct.pack("<I", _MAGIC) + bytes(_ENTRY_SIZE_BYTES)
    content = body + struct.pack("<I", google_crc32c.value(body))
    return f"{SUMMARIES_DIRECTORY}/{_TIMELINE:08X}{bounds}{bounds}.summary", content
