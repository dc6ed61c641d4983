"""pg_authid as pages: who the bootstrap superuser is, and the verifier that a fresh cluster has.

The bootstrap superuser is the role with oid 10. It always exists, but it is not always called postgres:
whoever ran initdb chose its name. A compute must know it before it starts PostgreSQL.

::

    page header 24 | line pointers 4 each (offset 15 bits, flags 2, length 15) | … | tuples
    tuple: xmin 4, xmax 4, field3 4, ctid 6, infomask2 2, infomask 2, hoff 1, … | oid 4, rolname 64, …

Sources: htup_details.h, itemid.h, pg_authid.h.

Not here: visibility. Of a role that was renamed the candidates are given, the likeliest first; PostgreSQL
itself says which of them exists.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from excimer.base.errors import CorruptionError
from excimer.pgformat.page_header import PAGE_HEADER_SIZE_BYTES

AUTHID_OID: Final = 1260
"""Of the catalog pg_authid, by which the global pg_filenode.map knows its file."""

BOOTSTRAP_SUPERUSER_OID: Final = 10

_LOWER = struct.Struct("<H")
_LOWER_OFFSET = 12
_LINE_POINTER = struct.Struct("<I")
_OFFSET_MASK = 0x7FFF
_FLAGS_SHIFT, _FLAGS_MASK, _NORMAL = 15, 3, 1
_TUPLE_HEAD = struct.Struct("<II12xHB")
_ROW = struct.Struct("<I64s")
_XMAX_INVALID = 0x0800

_VERIFIER = re.compile(rb"SCRAM-SHA-256\$4096:[A-Za-z0-9+/]{22}==\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=")
"""As initdb writes it: always of the same length."""


class RoleCatalogError(CorruptionError):
    """pg_authid of a fresh cluster is not what initdb makes."""


class _Version(NamedTuple):
    is_deleted: bool
    xmin: int
    name: str


def bootstrap_superuser_names(pages: Iterable[bytes]) -> list[str]:
    """Names that the role has in some version of its row on these pages of pg_authid, the likeliest first."""
    versions = [version for page in pages for version in _versions(page)]
    versions.sort(key=lambda version: (version.is_deleted, -version.xmin))
    return list(dict.fromkeys(version.name for version in versions))


def _versions(page: bytes) -> Iterator[_Version]:
    (lower,) = _LOWER.unpack_from(page, _LOWER_OFFSET)
    for place in range(PAGE_HEADER_SIZE_BYTES, min(lower, len(page)), _LINE_POINTER.size):
        (pointer,) = _LINE_POINTER.unpack_from(page, place)
        start = pointer & _OFFSET_MASK
        if pointer >> _FLAGS_SHIFT & _FLAGS_MASK != _NORMAL or start + _TUPLE_HEAD.size > len(page):
            continue
        xmin, xmax, infomask, header_size = _TUPLE_HEAD.unpack_from(page, start)
        if start + header_size + _ROW.size > len(page):
            continue
        oid, name = _ROW.unpack_from(page, start + header_size)
        if oid == BOOTSTRAP_SUPERUSER_OID:
            is_deleted = bool(xmax) and not infomask & _XMAX_INVALID
            yield _Version(is_deleted, xmin, name.rstrip(b"\0").decode(errors="replace"))


def is_initial_verifier(text: str) -> bool:
    """Whether a fresh cluster can have it: of a salt of 16 bytes and 4096 iterations."""
    return _VERIFIER.fullmatch(text.encode()) is not None


def replace_verifier(pages: Sequence[bytes], verifier: str) -> list[bytes]:
    """The same pages of a fresh cluster's pg_authid, in which its only password has another verifier.

    It must be as long as initdb's: a salt of 16 bytes and 4096 iterations. Copies that lie in a page's free
    space are replaced as well. Raises `RoleCatalogError` unless there is one verifier to be replaced,
    ValueError for one of another length.
    """
    new = verifier.encode()
    if not is_initial_verifier(verifier):
        raise ValueError("a fresh cluster's verifier has a salt of 16 bytes and 4096 iterations")
    found = {old for page in pages for old in _VERIFIER.findall(page)}
    if len(found) != 1:
        raise RoleCatalogError(f"pg_authid of a fresh cluster has {len(found)} passwords instead of one")
    return [_VERIFIER.sub(new, page) for page in pages]
