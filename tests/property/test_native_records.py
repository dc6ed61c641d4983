"""Native records: what they do to pages, and that both implementations do the same."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excimer._native import native_apply
from excimer.pgformat import native_records as records
from excimer.pgformat.native_records import InvalidNativeRecordError, NativeOp, XactStatus

LSN = 0x1_2345_6789
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
PAGES = st.one_of(
    st.just(bytes(8192)),
    st.binary(min_size=64, max_size=64).map(lambda seed: seed * 128),
    st.just(b"\xff" * 8192),
)
BLOCKS = st.lists(st.tuples(U32, st.integers(0, 3)), max_size=5)
PAYLOADS = st.one_of(
    st.builds(records.encode_clog_status, st.sampled_from(XactStatus), st.lists(U32, max_size=20)),
    st.builds(records.encode_offsets, st.lists(st.tuples(U32, U32), max_size=5)),
    st.builds(records.encode_members, st.lists(st.tuples(U32, U32, st.integers(0, 5)), max_size=9)),
    st.builds(
        records.encode_commit_times, st.integers(-(2**63), 2**63 - 1), st.integers(0, 65535), st.lists(U32)
    ),
    st.builds(records.encode_clog_status_set, st.sampled_from(XactStatus), st.lists(U32, max_size=20)),
    st.builds(
        records.encode_commit_times_set,
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 65535),
        st.lists(U32),
    ),
    st.builds(records.encode_vm_set, U32, st.integers(0, 3)),
    st.builds(records.encode_vm_clear, BLOCKS, sets_lsn=st.booleans()),
    st.builds(records.encode_vm_truncate, U32),
)


def applied(apply: object, page: bytes, payload: bytes, lsn: int) -> bytes | None:
    """The page afterwards; None when the payload is refused, and then the page must be as it was."""
    changed = bytearray(page)
    try:
        apply(changed, payload, lsn)  # type: ignore[operator]
    except InvalidNativeRecordError:
        assert changed == page
        return None
    return bytes(changed)


@given(PAGES, PAYLOADS, U64)
def test_both_do_the_same(page: bytes, payload: bytes, lsn: int) -> None:
    definition = applied(records.apply_native, page, payload, lsn)
    assert definition is not None
    assert applied(native_apply.apply_native, page, payload, lsn) == definition


@settings(max_examples=300)
@given(
    PAGES,
    st.one_of(
        st.binary(max_size=40),
        st.tuples(PAYLOADS, st.integers(0, 40), st.integers(0, 255)).map(
            lambda given: given[0][: given[1]] + bytes([given[2]]) + given[0][given[1] + 1 :]
        ),
        st.tuples(PAYLOADS, st.integers(0, 20)).map(lambda given: given[0][: -given[1]]),
    ),
)
def test_damaged_records_are_refused_alike(page: bytes, payload: bytes) -> None:
    assert applied(native_apply.apply_native, page, payload, LSN) == applied(
        records.apply_native, page, payload, LSN
    )


@pytest.mark.parametrize("apply", [records.apply_native, native_apply.apply_native])
def test_wrong_page_size_is_refused(apply: object) -> None:
    with pytest.raises(InvalidNativeRecordError, match="page of 100"):
        apply(bytearray(100), records.encode_vm_set(0, 3), LSN)  # type: ignore[operator]


def after(page: bytes, *payloads: bytes) -> bytes:
    changed = bytearray(page)
    for payload in payloads:
        native_apply.apply_native(changed, payload, LSN)
    return bytes(changed)


def test_commit_status_takes_two_bits_of_each_xid() -> None:
    page = after(
        bytes(8192),
        records.encode_clog_status(XactStatus.COMMITTED, [32768 + 5, 32768 + 6]),
        records.encode_clog_status(XactStatus.ABORTED, [7, 5]),
        records.encode_clog_status(XactStatus.SUB_COMMITTED, [6]),
    )
    assert page[:3] == bytes([0, 0b10_01_10_00, 0])


@given(PAGES, st.sampled_from(XactStatus), st.lists(U32, max_size=60))
def test_a_set_does_what_the_list_does(page: bytes, status: XactStatus, xids: list[int]) -> None:
    assert after(page, records.encode_clog_status_set(status, xids)) == after(
        page, records.encode_clog_status(status, xids)
    )
    assert after(page, records.encode_commit_times_set(-7, 5, xids)) == after(
        page, records.encode_commit_times(-7, 5, xids)
    )


def test_a_set_that_says_another_count_or_goes_beyond_the_page_is_refused() -> None:
    miscounted = bytearray(records.encode_clog_status_set(XactStatus.COMMITTED, [1, 2]))
    miscounted[2] = 3
    beyond = bytearray(records.encode_commit_times_set(-7, 5, [1]))
    beyond[2], beyond[-1] = 2, 0x08
    for apply in (records.apply_native, native_apply.apply_native):
        for payload in (miscounted, beyond):
            assert applied(apply, bytes(8192), bytes(payload), LSN) is None


def test_multixact_entries() -> None:
    page = after(bytes(8192), records.encode_offsets([(2047, 77), (2046, 70)]))
    assert struct.unpack_from("<II", page, 8184) == (70, 77)
    members = after(bytes(8192), records.encode_members([(1635, 900, 5), (1636 * 3 + 1, 901, 2)]))
    assert members[:4] == bytes([0, 2, 0, 0])
    assert struct.unpack_from("<I", members, 8) == (901,)
    assert members[20 * 408 + 3] == 5
    assert struct.unpack_from("<I", members, 20 * 408 + 16) == (900,)


def test_commit_times_are_ten_bytes_each() -> None:
    page = after(bytes(8192), records.encode_commit_times(-5, 3, [819 + 818, 1]))
    assert page[10:20] == page[8180:8190] == struct.pack("<qH", -5, 3)


def test_visibility_bits_and_lsn() -> None:
    page = after(bytes(8192), records.encode_vm_set(32672 + 6, 3))
    assert struct.unpack_from("<II", page) == (1, 0x2345_6789)
    assert struct.unpack_from("<HHHH", page, 12) == (24, 8192, 8192, 8196)
    assert page[25] == 0b11_00_00
    again = bytearray(page)
    native_apply.apply_native(again, records.encode_vm_set(6, 3), LSN + 8)
    assert again == page, "bits that are set already leave the LSN alone"
    frozen = after(page, records.encode_vm_clear([(6, records.VM_ALL_FROZEN)], sets_lsn=False))
    assert frozen[25] == 0b01_00_00
    native_apply.apply_native(again, records.encode_vm_clear([(6, 3)], sets_lsn=True), LSN + 16)
    assert (again[25], struct.unpack_from("<II", again)) == (0, (1, 0x2345_6799))


def test_truncation_clears_the_tail_only() -> None:
    full = after(bytes(8192), *(records.encode_vm_set(block, 3) for block in range(12)))
    page = after(full, records.encode_vm_truncate(32672 * 2 + 6))
    assert page[24:28] == bytes([0xFF, 0x0F, 0, 0])
    assert page[:24] == full[:24]


def test_operations_are_numbered_for_ever() -> None:
    assert [(op.name, op.value) for op in NativeOp][-1] == ("COMMIT_TIMES_SET", 9)
