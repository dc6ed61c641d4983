"""The window returns the bytes that went in, wherever the cuts fall."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.lsn import Lsn
from excimer.consensus.wal_window import WalWindow

START = 1000


@given(st.lists(st.binary(max_size=20), max_size=10), st.integers(0, 100), st.data())
def test_slices_are_the_bytes_that_went_in(chunks: list[bytes], trim: int, data: st.DataObject) -> None:
    window = WalWindow(Lsn(START))
    whole = b"".join(chunks)
    for chunk in chunks:
        window.append(chunk)
    assert window.end_lsn == START + len(whole)
    window.trim(Lsn(START + trim))
    assert window.start_lsn <= max(START, min(START + trim, window.end_lsn))
    start = data.draw(st.integers(window.start_lsn, window.end_lsn))
    end = data.draw(st.integers(start, window.end_lsn))
    assert window.slice(Lsn(start), Lsn(end)) == whole[start - START : end - START]


def test_what_is_not_there_is_an_error() -> None:
    window = WalWindow(Lsn(START))
    window.append(b"abc")
    window.append(b"def")
    window.trim(Lsn(START + 3))
    for start, end in [(START, START + 4), (START + 3, START + 7), (START + 5, START + 4)]:
        with pytest.raises(IndexError, match="is not within"):
            window.slice(Lsn(start), Lsn(end))
