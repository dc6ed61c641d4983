"""Native chains and Python's definition agree: on page images in every compression, and on malformed ones."""

import struct
from collections.abc import Callable

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native import page_chains
from excimer._native.page_chains import MalformedValueError, PageChains
from excimer.base.keys import BLOCK_SIZE_BYTES, Relation, relation_block_key
from excimer.storage.engine.page_reads import decompress_image
from excimer.storage.format.layer_block import pack_value
from excimer.storage.format.page_image import (
    PAGE_IMAGE_HEAD,
    MalformedImageError,
    decompress_pglz,
    restore_page_image,
)
from excimer.storage.format.values import Value, ValueKind

KEY = relation_block_key(Relation(1663, 5, 16384), 0, 7)


def native_restore(payload: bytes, lsn: int) -> bytes:
    chains = PageChains(KEY, 1, lsn)
    chains.add_block(pack_value(Value(KEY, lsn, ValueKind.PAGE_IMAGE, True, payload)), 0, lsn)
    for slot, compression, data, size in chains.restore_bases():
        chains.set_image_data(slot, decompress_image(compression, data, size))
    assert chains.take_redo() == ([], [])
    return chains.take_pages()


def literal_pglz(plain: bytes) -> bytes:
    """The simplest compressor there is: literals, and one kind of tag for runs of a byte."""
    out = bytearray()
    items: list[bytes | int] = []
    at = 0
    while at < len(plain):
        run = 1
        while at + run < len(plain) and run < 274 and plain[at + run] == plain[at]:
            run += 1
        items.append(plain[at])
        if run > 4:
            length = run - 1
            tag = bytes([0x0F, 1, length - 18]) if length >= 18 else bytes([length - 3, 1])
            items.append(tag)
            at += run
        else:
            at += 1
    for start in range(0, len(items), 8):
        group = items[start : start + 8]
        out.append(sum(1 << bit for bit, item in enumerate(group) if isinstance(item, bytes)))
        for item in group:
            out += item if isinstance(item, bytes) else bytes([item])
    return bytes(out)


COMPRESSORS: dict[int, Callable[[bytes], bytes]] = {
    0: lambda plain: plain,
    1: literal_pglz,
    2: lambda plain: lz4.block.compress(plain, store_size=False),
    3: lambda plain: zstandard.ZstdCompressor(level=1).compress(plain),
}


@settings(deadline=None)
@given(
    compression=st.sampled_from(sorted(COMPRESSORS)),
    hole_offset=st.integers(24, 4000),
    hole_length=st.integers(0, 4000),
    seed=st.binary(min_size=1, max_size=60),
    new=st.booleans(),
    lsn=st.integers(1, 2**64 - 2),
)
def test_every_compression_restores_the_same_page(
    compression: int, hole_offset: int, hole_length: int, seed: bytes, new: bool, lsn: int
) -> None:
    page = bytearray((seed + bytes(300)) * 200)[:BLOCK_SIZE_BYTES]
    page[14:16] = b"\0\0" if new else b"\x10\x20"
    page[hole_offset : hole_offset + hole_length] = bytes(hole_length)
    plain = bytes(page[:hole_offset] + page[hole_offset + hole_length :])
    payload = PAGE_IMAGE_HEAD.pack(compression, hole_offset, hole_length) + COMPRESSORS[compression](plain)
    if not new:
        page[:8] = struct.pack("<II", lsn >> 32, lsn & 0xFFFFFFFF)
    assert restore_page_image(payload, lsn) == page
    assert native_restore(payload, lsn) == page


@settings(deadline=None)
@given(
    head=st.tuples(st.integers(0, 5), st.integers(0, 65535), st.integers(0, 65535)),
    data=st.binary(max_size=200),
)
def test_malformed_images_are_refused_by_both(head: tuple[int, int, int], data: bytes) -> None:
    payload = PAGE_IMAGE_HEAD.pack(*head) + data
    try:
        expected = restore_page_image(payload, 99)
    except MalformedImageError:
        with pytest.raises((MalformedValueError, lz4.block.LZ4BlockError, zstandard.ZstdError)):
            native_restore(payload, 99)
    else:
        assert native_restore(payload, 99) == expected


@settings(deadline=None)
@given(data=st.binary(max_size=300), size=st.integers(0, 600))
def test_pglz_agrees_on_anything(data: bytes, size: int) -> None:
    try:
        expected = decompress_pglz(data, size)
    except MalformedImageError:
        with pytest.raises(MalformedValueError):
            page_chains.decompress_pglz(data, size)
    else:
        assert page_chains.decompress_pglz(data, size) == expected
