"""Masks take any bytes for a page: what a disk or a pageserver gives need not be one."""

import struct
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from excimer.base.keys import BLOCK_SIZE_BYTES, Fork
from excimer.pgformat.page_kinds import PageKind, page_kind
from excimer.pgformat.page_masks import masked_page, sequence_agrees

SPECIAL_ENDS = (
    b"",
    b"\x80\xff",
    b"\x81\xff",
    b"\x82\xff",
    b"\x91\xf0",
    b"\x93\xf0",
    b"\0\0",
    b"\x04\0",
    b"\x83\xff",
)


@st.composite
def pages(draw: st.DrawFn) -> bytes:
    """Random pages, most of them with a header that leads somewhere."""
    lower, upper, special = draw(st.tuples(*[st.integers(0, 0xFFFF)] * 3))
    if draw(st.booleans()):
        lower = draw(st.integers(0, 2200))
        special = BLOCK_SIZE_BYTES - draw(st.sampled_from((0, 4, 8, 16, 32)))
        upper = draw(st.integers(1, special))
    head = struct.pack("<QHHHHHHI", draw(st.integers(0, 2**40)), 7, 7, lower, upper, special, 0x2004, 9)
    body = Random(draw(st.integers(0, 2**32 - 1))).randbytes(BLOCK_SIZE_BYTES - len(head))
    end = draw(st.sampled_from(SPECIAL_ENDS))
    page = head + body
    return page[: len(page) - len(end)] + end


@given(pages(), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_any_bytes_are_of_some_kind_and_masking_twice_changes_nothing(
    page: bytes, fork: int, block: int
) -> None:
    kind = page_kind(page, fork, block)
    masked = masked_page(page, kind, block)
    assert len(masked) == BLOCK_SIZE_BYTES
    if kind not in (PageKind.NEW, PageKind.VISIBILITY_MAP):
        assert masked[:10] == bytes(10)
    if kind is not PageKind.SEQUENCE:
        assert masked_page(masked, kind, block) == masked
    assert sequence_agrees(page, page)


@given(pages())
def test_a_map_is_a_map_whatever_it_looks_like(page: bytes) -> None:
    assert page_kind(page, Fork.VM, 3) is PageKind.VISIBILITY_MAP
