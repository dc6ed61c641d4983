"""Redo requests: what is encoded decodes to the same, and nothing else is accepted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.keys import Relation, parse_key
from excimer.wire.redo import (
    RedoRequestError,
    decode_redo_request,
    encode_redo_request,
    request_key,
)

u32 = st.integers(0, (1 << 32) - 1)
lsn = st.integers(0, (1 << 64) - 1)
records = st.lists(st.tuples(lsn, lsn, st.binary(max_size=300)), max_size=8)
relations = st.tuples(u32, u32, u32)


@given(relation=relations, fork=st.integers(0, 3), block=u32, has_base=st.booleans(), chain=records)
def test_round_trip(
    relation: tuple[int, int, int],
    fork: int,
    block: int,
    has_base: bool,
    chain: list[tuple[int, int, bytes]],
) -> None:
    base = bytes(range(256)) * 32 if has_base else None
    request = encode_redo_request(relation, fork, block, base, chain)
    assert len(request) % 8 == 0
    decoded = decode_redo_request(request)
    assert decoded.relation == Relation(*relation)
    assert (decoded.fork, decoded.block, decoded.base) == (fork, block, base)
    assert [tuple(record) for record in decoded.records] == chain
    fields = parse_key(request_key(request))
    assert (fields.spc, fields.db, fields.rel, fields.fork, fields.block) == (*relation, fork, block)


@given(chain=records, cut=st.integers(0, 400))
def test_a_shortened_request_is_refused(chain: list[tuple[int, int, bytes]], cut: int) -> None:
    request = encode_redo_request((1, 2, 3), 0, 4, None, chain)
    with pytest.raises(RedoRequestError):
        decode_redo_request(request[: min(cut, len(request) - 1)])


def test_a_base_must_be_a_page() -> None:
    with pytest.raises(RedoRequestError, match="8192"):
        encode_redo_request((1, 2, 3), 0, 4, b"short", [])
