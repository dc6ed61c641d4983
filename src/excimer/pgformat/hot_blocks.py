"""Which blocks of a branch an endpoint used most: a hint for its next start, and nothing more.

::

    excimer hot blocks 1 CRC32C\\n     format version, crc32c (8 hex digits) of all that follows
    MessagePack of HotBlocks

What is in it is fetched early, as of when the next compute reads; a list that is old, torn, another branch's
or made up costs fetching what nobody needs. So whatever the bytes are, `unpack_hot_blocks` gives a list
within bounds, or none.

Not here: what is hot (`excimer.compute.hot_collection`), fetching it (`excimer.compute.hot_prefetch`).
"""

import re
from typing import Final

import google_crc32c
import msgspec

from excimer.base.ids import TimelineId
from excimer.base.keys import SEGMENT_BLOCKS

FORMAT_VERSION: Final = 1
HOT_BLOCKS_MAX: Final = 1 << 18
"""2 GiB of them."""
HOT_BYTES_MAX: Final = 4 << 20
"""Of a packed list."""

_FIRST_LINE: Final = re.compile(rb"excimer hot blocks (\d{1,9}) ([0-9a-f]{8})\n")
_FIRST_LINE_BYTES_MAX: Final = 40
_PATH: Final = re.compile(r"(?:global|base/\d{1,10})/\d{1,10}(?:_vm)?(?:\.\d{1,6})?")


class HotFile(msgspec.Struct, frozen=True, array_like=True):
    """Adjacent blocks of a file, as block, count, block, count … in the order of blocks."""

    path: str
    runs: list[int]

    @property
    def blocks(self) -> int:
        return sum(self.runs[1::2])


class HotBlocks(msgspec.Struct, frozen=True, kw_only=True):
    timeline_id: str
    levels: list[list[HotFile]]
    """The most used first."""

    @property
    def blocks(self) -> int:
        return sum(file.blocks for level in self.levels for file in level)


def nothing_hot(timeline_id: TimelineId) -> HotBlocks:
    return HotBlocks(timeline_id=timeline_id, levels=[])


def pack_hot_blocks(hot: HotBlocks) -> bytes:
    """Empty if there is nothing in it, or more than a list may have."""
    body = msgspec.msgpack.encode(hot)
    if not hot.blocks or len(body) > HOT_BYTES_MAX:
        return b""
    return b"excimer hot blocks %d %08x\n" % (FORMAT_VERSION, google_crc32c.value(body)) + body


def unpack_hot_blocks(data: bytes) -> HotBlocks | None:
    """None for anything that is not a list as `pack_hot_blocks` makes it."""
    match = _FIRST_LINE.match(data[:_FIRST_LINE_BYTES_MAX])
    if match is None or int(match[1]) != FORMAT_VERSION or len(data) > HOT_BYTES_MAX + _FIRST_LINE_BYTES_MAX:
        return None
    body = data[match.end() :]
    if google_crc32c.value(body) != int(match[2], 16):
        return None
    try:
        hot = msgspec.msgpack.decode(body, type=HotBlocks)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    is_right = all(_is_right(file) for level in hot.levels for file in level)
    return hot if is_right and hot.blocks <= HOT_BLOCKS_MAX else None


def _is_right(file: HotFile) -> bool:
    end = 0
    for block, count in zip(file.runs[::2], file.runs[1::2], strict=False):
        if block < end or count < 1:
            return False
        end = block + count
    return len(file.runs) % 2 == 0 and end <= SEGMENT_BLOCKS and _PATH.fullmatch(file.path) is not None
