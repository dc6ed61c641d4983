"""WAL as files and pages: segment names and page headers.

A segment (16 MiB unless initdb chose otherwise) is a run of 8 KiB pages; a page begins with a
header, and records flow through what remains, split wherever a page ends::

    0      2      4          8          16        20    24
    +------+------+----------+----------+---------+-----+   first page of a segment only:
    | magic| info | timeline | page LSN | rem_len | pad |   system id 8, segment size 4,
    +------+------+----------+----------+---------+-----+   block size 4 (40 bytes in all)

`rem_len` is how much of a record begun on an earlier page is still to come, and bit 0 of `info`
says that there is one. Source: src/include/access/xlog_internal.h.

Not here: records (`wal_record`), reading them out of a stream of pages (`wal_reader`).
"""

import re
import struct
from typing import NamedTuple

from excimer.base.errors import CorruptionError
from excimer.base.lsn import (
    WAL_PAGE_HEADER_LONG_BYTES,
    WAL_PAGE_HEADER_SHORT_BYTES,
    WAL_PAGE_SIZE_BYTES,
    Lsn,
    format_lsn,
)
from excimer.pgformat.control_file import WAL_PAGE_MAGICS

DEFAULT_SEGMENT_SIZE_BYTES = 16 << 20

CONTINUES_RECORD = 0x0001
LONG_HEADER = 0x0002
BACKUP_REMOVABLE = 0x0004
OVERWRITES_RECORD = 0x0008
"""The record that ran into this page was never finished; a new one begins behind the header."""
ALL_FLAGS = 0x000F

_SHORT = struct.Struct("<HHIQI4x")
_LONG = struct.Struct("<QII")
_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})\Z")


class InvalidWalError(CorruptionError):
    """WAL bytes are not what PostgreSQL writes; `lsn` is where the unreadable page or record starts."""

    def __init__(self, lsn: int, reason: str) -> None:
        super().__init__(f"WAL is not valid at {format_lsn(lsn)}: {reason}")
        self.lsn = Lsn(lsn)
        self.reason = reason


class SegmentName(NamedTuple):
    timeline: int
    number: int


class PageHeader(NamedTuple):
    magic: int
    info: int
    timeline: int
    page_lsn: int
    remaining_bytes: int
    system_id: int = 0
    segment_size_bytes: int = 0


def segment_name(timeline: int, number: int, segment_size_bytes: int) -> str:
    """File name of the `number`-th segment of history: 24 hex digits."""
    per_file_id = (1 << 32) // segment_size_bytes
    return f"{timeline:08X}{number // per_file_id:08X}{number % per_file_id:08X}"


def parse_segment_name(name: str, segment_size_bytes: int) -> SegmentName | None:
    """None when `name` is not a segment's (a history file, a partial segment…)."""
    match = _NAME.match(name)
    if match is None:
        return None
    timeline, high, low = (int(group, 16) for group in match.groups())
    return SegmentName(timeline, high * ((1 << 32) // segment_size_bytes) + low)


def pack_page_header(header: PageHeader) -> bytes:
    """24 bytes, or 40 when the header says that it is long."""
    short = _SHORT.pack(*header[:5])
    if not header.info & LONG_HEADER:
        return short
    return short + _LONG.pack(header.system_id, header.segment_size_bytes, WAL_PAGE_SIZE_BYTES)


def page_header_size(page_lsn: int, segment_size_bytes: int) -> int:
    return WAL_PAGE_HEADER_SHORT_BYTES if page_lsn % segment_size_bytes else WAL_PAGE_HEADER_LONG_BYTES


def unpack_page_header(data: bytes, page_lsn: int, pg_version: int, segment_size_bytes: int) -> PageHeader:
    """Parses and checks the header of the page at `page_lsn`, from its 24 (or 40) first bytes.

    Raises `InvalidWalError` unless it is exactly what PostgreSQL would have written there.
    """
    header = PageHeader(*_SHORT.unpack_from(data))
    if header.magic != WAL_PAGE_MAGICS[pg_version]:
        raise InvalidWalError(
            page_lsn, f"page magic is {header.magic:04X}, not {WAL_PAGE_MAGICS[pg_version]:04X}"
        )
    if header.info & ~ALL_FLAGS:
        raise InvalidWalError(page_lsn, f"page has unknown flags {header.info:04X}")
    if header.page_lsn != page_lsn:
        raise InvalidWalError(page_lsn, f"page says that it belongs at {format_lsn(header.page_lsn)}")
    starts_segment = page_lsn % segment_size_bytes == 0
    if starts_segment != bool(header.info & LONG_HEADER):
        raise InvalidWalError(page_lsn, "page header is long where it must be short, or the reverse")
    if not starts_segment:
        return header
    system_id, segment_size, block_size = _LONG.unpack_from(data, _SHORT.size)
    if segment_size != segment_size_bytes or block_size != WAL_PAGE_SIZE_BYTES:
        raise InvalidWalError(
            page_lsn, f"page was written with segments of {segment_size} and blocks of {block_size} bytes"
        )
    return header._replace(system_id=system_id, segment_size_bytes=segment_size)
