"""The header that every page but those of SLRUs begins with, and the checksum that it may carry.

::

    0          8           10       12       14       16         18             20
    +----------+-----------+--------+--------+--------+----------+--------------+-----------+
    | pd_lsn   | checksum  | flags  | lower  | upper  | special  | size|version | prune xid |
    | hi32 lo32|           |        |        |        |          |              |           |
    +----------+-----------+--------+--------+--------+----------+--------------+-----------+

Source: bufpage.h, checksum_impl.h.
"""

import struct
from typing import NamedTuple, Self

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.base.lsn import Lsn

PAGE_HEADER_SIZE_BYTES = 24
FLAG_NAMES = {0x0001: "has free lines", 0x0002: "page full", 0x0004: "all visible"}

_HEADER = struct.Struct("<IIHHHHHHI")
_WORDS = struct.Struct(f"<{BLOCK_SIZE_BYTES // 4}I")
_CHECKSUM_WORD = 2
"""pd_checksum is the lower half of the third word, pd_flags the upper."""

_SUMS = 32
_PRIME = 16_777_619
_MASK = 0xFFFFFFFF
# fmt: off
_BASE_OFFSETS = (
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
)
# fmt: on


class PageHeader(NamedTuple):
    lsn: Lsn
    checksum: int
    """0 where the cluster has no checksums."""
    flags: int
    lower: int
    upper: int
    special: int
    page_size_bytes: int
    layout_version: int
    prune_xid: int

    @classmethod
    def unpack(cls, page: bytes) -> Self:
        high, low, checksum, flags, lower, upper, special, size_version, prune_xid = _HEADER.unpack_from(page)
        lsn = Lsn(high << 32 | low)
        size, version = size_version & 0xFF00, size_version & 0xFF
        return cls(lsn, checksum, flags, lower, upper, special, size, version, prune_xid)

    @property
    def is_new(self) -> bool:
        """Never initialised: pd_upper is zero."""
        return self.upper == 0

    @property
    def flag_names(self) -> list[str]:
        known = [name for bit, name in FLAG_NAMES.items() if self.flags & bit]
        unknown = self.flags & ~sum(FLAG_NAMES)
        return [*known, *([f"{unknown:#x}"] if unknown else [])]


def page_checksum(page: bytes, block: int) -> int:
    """What PostgreSQL writes into pd_checksum of an initialised page at this block of its relation."""
    words = list(_WORDS.unpack(page))
    words[_CHECKSUM_WORD] &= 0xFFFF0000
    sums = list(_BASE_OFFSETS)
    rows = [words[start : start + _SUMS] for start in range(0, len(words), _SUMS)]
    for row in [*rows, [0] * _SUMS, [0] * _SUMS]:
        for index, word in enumerate(row):
            mixed = sums[index] ^ word
            sums[index] = (mixed * _PRIME & _MASK) ^ (mixed >> 17)
    result = block
    for value in sums:
        result ^= value
    return result % 65_535 + 1
