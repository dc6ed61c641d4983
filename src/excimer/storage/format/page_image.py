"""PAGE_IMAGE values: full-page images as WAL carries them, and how a page comes out of one.

``u8 compression, u8 0, u16 hole offset, u16 hole length, data``. The data is the page without its
hole (the unused middle), compressed in one of PostgreSQL's three ways.

This is the definition; `_native/page_chains.pyx` does the same at speed.
"""

import struct

import lz4.block
import zstandard

from excimer.base.errors import CorruptionError
from excimer.base.keys import BLOCK_SIZE_BYTES

COMPRESSION_NONE = 0
COMPRESSION_PGLZ = 1
COMPRESSION_LZ4 = 2
COMPRESSION_ZSTD = 3

PAGE_IMAGE_HEAD = struct.Struct("<BxHH")

_PD_UPPER = slice(14, 16)


class MalformedImageError(CorruptionError):
    """A page image does not yield a page."""


def restore_page_image(payload: bytes, lsn: int) -> bytes:
    """The page: hole filled with zeros and, unless the page is new, pd_lsn set to `lsn`."""
    if len(payload) < PAGE_IMAGE_HEAD.size:
        raise MalformedImageError("the image's head is cut short")
    compression, hole_offset, hole_length = PAGE_IMAGE_HEAD.unpack_from(payload)
    size = BLOCK_SIZE_BYTES - hole_length
    if size < 0 or hole_offset > size:
        raise MalformedImageError("the hole reaches past the page")
    plain = _decompress(compression, payload[PAGE_IMAGE_HEAD.size :], size)
    if len(plain) != size:
        raise MalformedImageError(f"the image has {len(plain)} bytes instead of {size}")
    page = plain[:hole_offset] + bytes(hole_length) + plain[hole_offset:]
    if page[_PD_UPPER] != b"\0\0":
        page = struct.pack("<II", lsn >> 32, lsn & 0xFFFFFFFF) + page[8:]
    return page


def decompress_pglz(data: bytes, size: int) -> bytes:
    """PostgreSQL's own LZ (src/common/pg_lzcompress.c): `size` bytes, or `MalformedImageError`."""
    plain = bytearray()
    at = 0
    while at < len(data) and len(plain) < size:
        control = data[at]
        at += 1
        for bit in range(8):
            if at >= len(data) or len(plain) >= size:
                break
            if not control >> bit & 1:
                plain.append(data[at])
                at += 1
                continue
            tag = data[at : at + 2]
            at += 2
            if len(tag) < 2:
                raise MalformedImageError("a tag is cut short")
            length, offset = (tag[0] & 0x0F) + 3, (tag[0] & 0xF0) << 4 | tag[1]
            if length == 18:
                if at >= len(data):
                    raise MalformedImageError("a tag is cut short")
                length += data[at]
                at += 1
            if not 0 < offset <= len(plain):
                raise MalformedImageError("a tag points before the start")
            for _ in range(min(length, size - len(plain))):
                plain.append(plain[-offset])
    if at != len(data) or len(plain) != size:
        raise MalformedImageError(f"{len(plain)} bytes came out instead of {size}")
    return bytes(plain)


def _decompress(compression: int, data: bytes, size: int) -> bytes:
    try:
        if compression == COMPRESSION_NONE:
            return data
        if compression == COMPRESSION_PGLZ:
            return decompress_pglz(data, size)
        if compression == COMPRESSION_LZ4:
            return bytes(lz4.block.decompress(data, uncompressed_size=size))
        if compression == COMPRESSION_ZSTD:
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except (lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
        raise MalformedImageError(str(error)) from error
    raise MalformedImageError(f"unknown compression {compression}")
