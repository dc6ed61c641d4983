"""Where logs part, by their histories alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excimer.base.lsn import Lsn
from excimer.consensus.term_history import HistoryMismatchError, TermHistory
from excimer.wire.safekeeping import Term, TermStart


def history(*pairs: tuple[int, int]) -> TermHistory:
    return TermHistory(tuple(TermStart(Term(term), Lsn(start)) for term, start in pairs))


@pytest.mark.parametrize(
    ("mine", "end", "elected", "common"),
    [
        pytest.param([(0, 10)], 50, [(0, 10), (1, 50)], 50, id="equal"),
        pytest.param([(0, 10)], 50, [(0, 10), (1, 80)], 50, id="mine is shorter"),
        pytest.param([(0, 10)], 50, [(0, 10), (1, 30)], 30, id="the elected one left term 0 earlier"),
        pytest.param([(0, 10), (1, 30)], 50, [(0, 10), (2, 40)], 30, id="I left term 0 earlier"),
        pytest.param([(0, 10), (1, 30)], 30, [(0, 10), (2, 40)], 30, id="term 1 wrote nothing here"),
        pytest.param([(0, 10), (1, 30)], 50, [(0, 10), (2, 30)], 30, id="both start at one place"),
        pytest.param([(0, 10), (1, 90)], 50, [(0, 10), (1, 90), (2, 99)], 50, id="WAL of term 1 to come"),
        pytest.param([(1, 10), (2, 40)], 50, [(0, 5), (1, 10), (3, 45)], 40, id="mine is trimmed"),
        pytest.param([(0, 5), (1, 10)], 50, [(1, 10), (3, 45)], 45, id="the elected one's is trimmed"),
    ],
)
def test_common_end(
    mine: list[tuple[int, int]], end: int, elected: list[tuple[int, int]], common: int
) -> None:
    assert history(*mine).common_end(Lsn(end), history(*elected)) == common


def test_strangers_have_nothing_in_common() -> None:
    with pytest.raises(HistoryMismatchError, match="no term in common"):
        history((0, 10)).common_end(Lsn(20), history((1, 10)))


@pytest.mark.parametrize("pairs", [[], [(1, 5), (1, 6)], [(2, 5), (1, 6)], [(1, 6), (2, 5)]])
def test_impossible_histories_are_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(HistoryMismatchError, match="not a term history"):
        history(*pairs)


def test_extended_cuts_what_starts_above() -> None:
    assert history((0, 10), (1, 50)).extended(Term(2), Lsn(40)) == history((0, 10), (2, 40))
    assert history((0, 10), (1, 40)).extended(Term(2), Lsn(40)) == history((0, 10), (1, 40), (2, 40))
    with pytest.raises(HistoryMismatchError, match="before its history begins"):
        history((0, 10)).extended(Term(2), Lsn(9))


def test_trimmed_keeps_who_wrote_the_byte_before_the_horizon() -> None:
    whole = history((0, 10), (1, 50), (2, 50), (3, 90))
    assert whole.trimmed(Lsn(10)) == whole
    assert whole.trimmed(Lsn(50)) == whole
    assert whole.trimmed(Lsn(51)) == history((2, 50), (3, 90))
    assert whole.trimmed(Lsn(90)) == history((2, 50), (3, 90))
    assert whole.trimmed(Lsn(91)) == history((3, 90))


TREES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12
)


def grow(tree: list[tuple[int, int, int]]) -> list[tuple[TermHistory, list[int]]]:
    """Logs as elections make them, each term's from a prefix of an earlier one; a byte is who wrote it."""
    logs: list[tuple[TermHistory, list[int]]] = [(history((0, 0)), [0] * 10)]
    for term, (parent, cut, growth) in enumerate(tree, start=1):
        parent_history, parent_log = logs[parent % len(logs)]
        inherited = parent_log[:cut]
        extended = parent_history.extended(Term(term), Lsn(len(inherited)))
        logs.append((extended, inherited + [term] * growth))
    return logs


@given(TREES)
def test_logs_that_end_at_one_lsn_with_one_writer_are_the_same(tree: list[tuple[int, int, int]]) -> None:
    logs = grow(tree)
    for one_history, one in logs:
        writer = one_history.writer_of(Lsn(len(one)))
        assert (None if writer is None else writer.term) == (one[-1] if one else None)
        for other_history, other in logs:
            if len(one) == len(other):
                assert (writer == other_history.writer_of(Lsn(len(other)))) == (one == other)


@given(TREES, st.data())
def test_common_end_agrees_with_comparing_bytes(
    tree: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Byte by byte."""
    logs = grow(tree)
    elected_history, elected_log = logs[-1]
    endless_log = elected_log + [elected_history.last.term] * 100
    mine_history, whole_log = data.draw(st.sampled_from(logs))
    mine_log = whole_log[: data.draw(st.integers(0, len(whole_log)))]
    common = mine_history.common_end(Lsn(len(mine_log)), elected_history)
    parted = [a != b for a, b in zip(mine_log, endless_log, strict=False)]
    assert common == (parted.index(True) if True in parted else len(mine_log))
