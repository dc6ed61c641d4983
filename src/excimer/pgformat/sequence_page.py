"""The one page of a sequence, and whether WAL is ahead of it.

PostgreSQL writes a WAL record for a sequence only once in 32 values, and in it the last of them: who knows
only WAL goes on from there. The page itself says how many of those are left (`log_cnt`); with none left both
are the same.

::

    page header | line pointer ...        | tuple: header, last_value 8, log_cnt 8, is_called 1 | magic 4
    0           24                                                                       pd_special = 8184

Source: src/backend/commands/sequence.c, the same in 14 to 18.
"""

import struct
from typing import Final

from excimer.base.keys import BLOCK_SIZE_BYTES

SEQUENCE_MAGIC: Final = 0x1717
_SPECIAL_OFFSET: Final = BLOCK_SIZE_BYTES - 8
_LOWER_UPPER_SPECIAL = struct.Struct("<HHH")
_LINE_POINTER = struct.Struct("<I")
_DATA = struct.Struct("<qqB")
_HEADER_SIZE_OFFSET: Final = 22
_FIRST_LINE_POINTER: Final = 24


def log_count(page: bytes) -> int | None:
    """How many values WAL is ahead; None for a page that is no sequence's."""
    lower, upper, special = _LOWER_UPPER_SPECIAL.unpack_from(page, 12)
    if special != _SPECIAL_OFFSET or int.from_bytes(page[special : special + 4], "little") != SEQUENCE_MAGIC:
        return None
    (pointer,) = _LINE_POINTER.unpack_from(page, _FIRST_LINE_POINTER)
    offset = pointer & 0x7FFF
    if lower < _FIRST_LINE_POINTER + _LINE_POINTER.size or not upper <= offset < special:
        return None
    start = offset + page[offset + _HEADER_SIZE_OFFSET]
    if start + _DATA.size > special:
        return None
    _, count, _ = _DATA.unpack_from(page, start)
    return int(count)
