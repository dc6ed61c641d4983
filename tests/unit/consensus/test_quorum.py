"""Majorities."""

from itertools import combinations

import pytest

from excimer.consensus.quorum import MemberCountError, check_member_count, majority


@pytest.mark.parametrize(("count", "needed"), [(1, 1), (3, 2), (5, 3)])
def test_any_two_majorities_share_a_member(count: int, needed: int) -> None:
    assert majority(count) == needed
    groups = [set(group) for group in combinations(range(count), needed)]
    assert all(a & b for a in groups for b in groups)


@pytest.mark.parametrize("count", [0, 2, 4, -1])
def test_even_numbers_are_refused(count: int) -> None:
    with pytest.raises(MemberCountError, match="odd number"):
        check_member_count(count)
