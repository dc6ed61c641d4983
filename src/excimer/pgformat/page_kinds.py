"""Which part of PostgreSQL wrote a page, told by the page itself.

Access methods put a special space at the page's end, of a size of their own, and those of one size put a
number into its last two bytes that no other uses there. That is PostgreSQL's own arrangement, so that a page
can be told without its catalogs:

=======  ==========================  ====================
special  last two bytes              page of
=======  ==========================  ====================
none                                 a table (heap), TOAST
16       FF80                        a hash index
16       FF81                        a GiST index
16       up to FF7F (a cycle id)     a B-tree
8        FF82                        an SP-GiST index
8        F091 to F093                a BRIN index
8        up to 00FF (flags)          a GIN index
8        block 0, begins with 1717   a sequence
any      anything else               an extension's index, by generic WAL records
=======  ==========================  ====================

Source: hash.h, gist.h, nbtree.h, spgist_private.h, brin_page.h, ginblock.h, sequence.c.
"""

import struct
from enum import Enum
from typing import Final

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork
from excimer.pgformat.page_header import PageHeader

HASH_PAGE_ID: Final = 0xFF80
GIST_PAGE_ID: Final = 0xFF81
SPGIST_PAGE_ID: Final = 0xFF82
BTREE_CYCLE_ID_MAX: Final = 0xFF7F
BRIN_PAGE_TYPES: Final = range(0xF091, 0xF094)
GIN_FLAGS_MAX: Final = 0xFF
SEQUENCE_MAGIC: Final = 0x1717

_LARGE_SPECIAL: Final = 16
_SMALL_SPECIAL: Final = 8


class PageKind(Enum):
    """The values are words for people."""

    NEW = "new"
    """Never initialised: what PostgreSQL extends files with."""
    VISIBILITY_MAP = "visibility map"
    HEAP = "heap"
    BTREE = "btree"
    HASH = "hash"
    GIN = "gin"
    GIST = "gist"
    SPGIST = "spgist"
    BRIN = "brin"
    SEQUENCE = "sequence"
    GENERIC = "extension"


def page_kind(page: bytes, fork: int, block: int) -> PageKind:
    """Of a page of a relation. Any bytes are of some kind."""
    if fork == Fork.VM:
        return PageKind.VISIBILITY_MAP
    header = PageHeader.unpack(page)
    if header.is_new:
        return PageKind.NEW
    special_size = BLOCK_SIZE_BYTES - header.special
    if special_size == 0:
        return PageKind.HEAP
    (last,) = struct.unpack_from("<H", page, BLOCK_SIZE_BYTES - 2)
    if special_size == _LARGE_SPECIAL:
        return _of_large_special(last)
    if special_size == _SMALL_SPECIAL:
        (magic,) = struct.unpack_from("<I", page, header.special)
        return _of_small_special(last, is_sequence=block == 0 and magic == SEQUENCE_MAGIC)
    return PageKind.GENERIC


def _of_large_special(last: int) -> PageKind:
    if last == HASH_PAGE_ID:
        return PageKind.HASH
    if last == GIST_PAGE_ID:
        return PageKind.GIST
    return PageKind.BTREE if last <= BTREE_CYCLE_ID_MAX else PageKind.GENERIC


def _of_small_special(last: int, *, is_sequence: bool) -> PageKind:
    if last == SPGIST_PAGE_ID:
        return PageKind.SPGIST
    if last in BRIN_PAGE_TYPES:
        return PageKind.BRIN
    if last > GIN_FLAGS_MAX:
        return PageKind.GENERIC
    return PageKind.SEQUENCE if is_sequence and last == 0 else PageKind.GIN
