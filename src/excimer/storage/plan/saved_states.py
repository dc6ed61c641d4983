"""Which of a timeline's saved states answers for an LSN, and which are worth nothing any more.

A state holds at its LSN alone. An endpoint begins at the end of WAL, and a branch at its branch point:
states of other LSNs are superseded.
"""

from collections.abc import Collection, Iterable

from excimer.base.lsn import Lsn
from excimer.storage.format.saved_state_name import SavedStateName


def states_at(names: Iterable[SavedStateName], lsn: Lsn, generation: int) -> list[SavedStateName]:
    """Those of exactly this LSN, of our generation or older ones, the best first."""
    found = [name for name in names if name.lsn == lsn and name.generation <= generation]
    return sorted(found, key=lambda name: -name.generation)


def superseded_states(
    names: Iterable[SavedStateName], *, end_lsn: Lsn, wanted: Collection[Lsn], generation: int
) -> list[SavedStateName]:
    """Of our generation or older ones: what is below the end of WAL and at no wanted LSN, and all but the
    newest at one LSN (G1). What is above the end of WAL as we know it may be where others know it to be.
    """
    superseded = []
    kept: set[int] = set()
    for name in sorted((each for each in names if each.generation <= generation), reverse=True):
        is_worthless = name.lsn < end_lsn and name.lsn not in wanted
        if is_worthless or name.lsn in kept:
            superseded.append(name)
        kept.add(name.lsn)
    return superseded
