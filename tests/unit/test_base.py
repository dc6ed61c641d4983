"""LSNs, ids and keys: text and byte forms round-trip, bad ones are refused."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base import ids, keys, lsn

U32 = st.integers(0, 2**32 - 1)


@given(st.integers(0, 2**64 - 1))
def test_lsn_text_round_trip(value: int) -> None:
    assert lsn.parse_lsn(lsn.format_lsn(value)) == value


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "0/123456789", "G/0", "0/1\n", "-1/0"])
def test_bad_lsn_is_refused(text: str) -> None:
    with pytest.raises(lsn.InvalidLsnError, match="is not an LSN"):
        lsn.parse_lsn(text)


def test_record_start_skips_page_headers() -> None:
    segment = 1 << 24
    assert lsn.record_start(segment, segment) == segment + 40
    assert lsn.record_start(segment + 8192, segment) == segment + 8192 + 24
    assert lsn.record_start(segment + 64, segment) == segment + 64


def test_ids() -> None:
    made = ids.new_tenant_id(random.Random(1))
    assert ids.parse_tenant_id(made.upper()) == made
    with pytest.raises(ids.InvalidIdError, match="is not a timeline id"):
        ids.parse_timeline_id(made[:-1])


@given(st.tuples(st.sampled_from(list(keys.KeyKind)), U32, U32, U32, st.integers(0, 255), U32))
def test_key_round_trip(fields: tuple[int, int, int, int, int, int]) -> None:
    key = keys.make_key(*fields)
    assert len(key) == keys.KEY_SIZE_BYTES
    assert keys.parse_key(key) == fields
    assert keys.describe_key(key)


@given(*[st.tuples(st.sampled_from(list(keys.KeyKind)), U32, U32, U32, st.integers(0, 255), U32)] * 2)
def test_keys_order_as_their_fields(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert (keys.make_key(*a) < keys.make_key(*b)) == (a < b)
