"""pgbench's TPC-B as a test: its four sums must be equal at every moment of the history."""

from typing import NamedTuple

from tests.kit.stack import Stack

CLIENTS = 8

SUMS = """
select (select count(*) from pgbench_history),
       (select coalesce(sum(delta), 0) from pgbench_history),
       (select sum(abalance) from pgbench_accounts),
       (select sum(tbalance) from pgbench_tellers),
       (select sum(bbalance) from pgbench_branches)
"""


class Sums(NamedTuple):
    transactions: int
    history: int
    accounts: int
    tellers: int
    branches: int

    @property
    def is_balanced(self) -> bool:
        return self.history == self.accounts == self.tellers == self.branches


def load(stack: Stack, scale: int) -> None:
    stack.check_program("pgbench", "-i", "-q", "-s", str(scale))


def read_sums(stack: Stack, name: str = "main") -> Sums:
    [row] = stack.query(SUMS, name)
    return Sums._make(int(value) for value in row)


def check(stack: Stack, name: str = "main", *, amcheck: bool = True) -> Sums:
    """The invariant holds, and no relation is damaged."""
    sums = read_sums(stack, name)
    assert sums.is_balanced, sums
    if amcheck:
        stack.check_program("pg_amcheck", "--install-missing", "--heapallindexed", "postgres", name=name)
    return sums
