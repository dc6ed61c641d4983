"""Rows of two catalogs as pages: which libraries a database's functions are in, which databases sort by ICU.

::

    pg_proc:     oid 4 | proname 64 | pronamespace 4 | proowner 4 | prolang 4 | … | prosrc, probin
    pg_database: oid 4 | datname 64 | datdba 4 | encoding 4 | datlocprovider 1 (15 and newer) | …

Sources: htup_details.h, pg_proc.h, pg_database.h of PostgreSQL 14 to 18.

Not here: where the pages are, and pg_authid (`role_catalog`).
"""

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from excimer.pgformat.page_header import PAGE_HEADER_SIZE_BYTES

PROC_OID: Final = 1255
DATABASE_OID: Final = 1262

_LOWER = struct.Struct("<H")
_LOWER_OFFSET = 12
_LINE_POINTER = struct.Struct("<I")
_OFFSET_MASK, _LENGTH_SHIFT = 0x7FFF, 17
_FLAGS_SHIFT, _FLAGS_MASK, _NORMAL = 15, 3, 1
_TUPLE_HEAD = struct.Struct("<II12xHB")
_XMIN_COMMITTED, _XMIN_INVALID = 0x0100, 0x0200
_XMAX_COMMITTED, _XMAX_INVALID = 0x0400, 0x0800
_NO_DELETION = _XMAX_INVALID | 0x0080 | 0x1000
"""No xmax, one that only locks, or several, of which catalogs have only lockers."""

_OID = struct.Struct("<I")
_NAME_OFFSET, _NAME_SIZE = 4, 64
_LANGUAGE_OFFSET = _PROVIDER_OFFSET = 76
_LANGUAGE_C: Final = 13
_LIBRARY_START: Final = b"$libdir/"
_LIBRARY = re.compile(rb"\$libdir/([A-Za-z0-9_.+-]+)")
_LONG_HEADER = struct.Struct("<I")

IsCommitted = Callable[[int], bool]
"""Whether a transaction, by its xid, is committed."""


def library_names(pages: Iterable[bytes], is_committed: IsCommitted) -> set[str]:
    """Of pg_proc: the libraries that functions in C are in, of those in the build's own directory."""
    return {
        found[1].decode().removesuffix(".so")
        for row in _live_rows(pages, is_committed)
        if row[_LANGUAGE_OFFSET : _LANGUAGE_OFFSET + _OID.size] == _OID.pack(_LANGUAGE_C)
        if (found := _LIBRARY.fullmatch(_text_with(_LIBRARY_START, row)))
    }


def _text_with(start: bytes, row: bytes) -> bytes:
    """The text column that begins with `start`, by the length before it; empty if there is none.

    What follows it without a gap is another column, whose first byte may be a letter.
    """
    place = row.find(start)
    if place < _LONG_HEADER.size:
        return b""
    if row[place - 1] & 1:  # short: one byte, its own included
        return row[place : place - 1 + (row[place - 1] >> 1)]
    (header,) = _LONG_HEADER.unpack_from(row, place - _LONG_HEADER.size)
    return row[place : place - _LONG_HEADER.size + (header >> 2)]


def icu_databases(pages: Iterable[bytes], is_committed: IsCommitted) -> set[str]:
    """Of pg_database of PostgreSQL 15 or newer: names of those whose default collation is ICU's."""
    return {
        row[_NAME_OFFSET : _NAME_OFFSET + _NAME_SIZE].rstrip(b"\0").decode(errors="replace")
        for row in _live_rows(pages, is_committed)
        if row[_PROVIDER_OFFSET : _PROVIDER_OFFSET + 1] == b"i"
    }


def _live_rows(pages: Iterable[bytes], is_committed: IsCommitted) -> Iterator[bytes]:
    """What follows the header of each tuple that a new snapshot of a stopped cluster would see."""
    for page in pages:
        (lower,) = _LOWER.unpack_from(page, _LOWER_OFFSET)
        for place in range(PAGE_HEADER_SIZE_BYTES, min(lower, len(page)) - 3, _LINE_POINTER.size):
            (pointer,) = _LINE_POINTER.unpack_from(page, place)
            start = pointer & _OFFSET_MASK
            end = min(start + (pointer >> _LENGTH_SHIFT), len(page))
            if pointer >> _FLAGS_SHIFT & _FLAGS_MASK != _NORMAL or start + _TUPLE_HEAD.size > end:
                continue
            xmin, xmax, infomask, header_size = _TUPLE_HEAD.unpack_from(page, start)
            is_there = infomask & _XMIN_COMMITTED or (not infomask & _XMIN_INVALID and is_committed(xmin))
            is_gone = not infomask & _NO_DELETION and (infomask & _XMAX_COMMITTED or is_committed(xmax))
            if is_there and not is_gone:
                yield page[start + header_size : end]
