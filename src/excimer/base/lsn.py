"""Log sequence numbers: byte positions in a timeline's WAL.

An LSN is a plain ``int`` under a distinct type, so that arithmetic costs nothing. Text is
PostgreSQL's ``16/B374D848``. Positions *between* records come in two spellings that this module
converts: the **end** of a record may lie on a page boundary, while the **start** of the next one
is then behind that page's header (see `record_start`).
"""

import re
from typing import NewType

from excimer.base.errors import RefusedError

Lsn = NewType("Lsn", int)

INVALID_LSN = Lsn(0)
MAX_LSN = Lsn((1 << 64) - 1)

WAL_PAGE_SIZE_BYTES = 8192
WAL_PAGE_HEADER_SHORT_BYTES = 24
WAL_PAGE_HEADER_LONG_BYTES = 40

_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})\Z")


class InvalidLsnError(RefusedError):
    """A text is not an LSN."""


def parse_lsn(text: str) -> Lsn:
    """The LSN written as ``16/B374D848``. Raises `InvalidLsnError`."""
    match = _TEXT.match(text)
    if match is None:
        raise InvalidLsnError(f"{text!r} is not an LSN: write it as PostgreSQL does, like 0/16B3748")
    return Lsn(int(match[1], 16) << 32 | int(match[2], 16))


def format_lsn(lsn: int) -> str:
    """PostgreSQL's text for an LSN: ``0/16B3748``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def align_lsn(lsn: int) -> Lsn:
    """The next multiple of 8, where PostgreSQL (MAXALIGN) starts every record."""
    return Lsn((lsn + 7) & ~7)


def record_start(end_lsn: int, segment_size_bytes: int) -> Lsn:
    """Where the record after `end_lsn` starts: past the page header if `end_lsn` is on a page boundary."""
    if end_lsn % WAL_PAGE_SIZE_BYTES:
        return Lsn(end_lsn)
    if end_lsn % segment_size_bytes:
        return Lsn(end_lsn + WAL_PAGE_HEADER_SHORT_BYTES)
    return Lsn(end_lsn + WAL_PAGE_HEADER_LONG_BYTES)


def record_end(lsn: int, segment_size_bytes: int) -> Lsn:
    """`lsn` rounded down to where a record can end: a multiple of 8, not in or just behind a header.

    The inverse of `record_start`. Between the ends of two records all such positions show the same state.
    """
    aligned = lsn & ~7
    page = aligned - aligned % WAL_PAGE_SIZE_BYTES
    is_long = page % segment_size_bytes == 0
    header = WAL_PAGE_HEADER_LONG_BYTES if is_long else WAL_PAGE_HEADER_SHORT_BYTES
    return Lsn(page if aligned - page <= header else aligned)
