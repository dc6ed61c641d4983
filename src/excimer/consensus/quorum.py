"""Majorities: how many members decide.

Any two majorities of one set share a member. That one sentence is why a proposer elected by one
majority learns of everything that another has stored (D1).

Not here: who the members are. They are a fixed set; a changed set would need joint majorities,
and this module is the place for them. How far a majority has come is `_native/led_wal.pyx`'s.
"""

from excimer.base.errors import RefusedError


class MemberCountError(RefusedError):
    """A timeline must have an odd number of safekeepers."""


def check_member_count(member_count: int) -> None:
    """Refuses even numbers: a fourth member costs a disk and survives no more losses than three."""
    if member_count < 1 or member_count % 2 == 0:
        raise MemberCountError(f"{member_count} safekeepers: name an odd number of them, usually 3")


def majority(member_count: int) -> int:
    """The fewest members that outnumber the rest: 1 of 1, 2 of 3, 3 of 5."""
    return member_count // 2 + 1
