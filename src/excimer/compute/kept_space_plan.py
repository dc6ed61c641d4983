"""Which directories of stopped endpoints go, when they take too much of the disk: the oldest first.

Not here: finding and removing them (`kept_space`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class KeptEntry(NamedTuple):
    """The directory that one stopped endpoint left."""

    endpoint_dir: Path
    stopped_at_s: float
    size_bytes: int


def plan_removals(
    kept: Iterable[KeptEntry], *, size_bytes_max: int, free_bytes: int, free_bytes_min: int
) -> list[KeptEntry]:
    """In the order in which they go: until all together are within `size_bytes_max`, and `free_bytes_min`
    are free on their disk, of which `free_bytes` are now.
    """
    oldest_first = sorted(kept, key=lambda entry: (entry.stopped_at_s, entry.endpoint_dir))
    total_bytes = sum(entry.size_bytes for entry in oldest_first)
    removals = []
    for entry in oldest_first:
        if total_bytes <= size_bytes_max and free_bytes >= free_bytes_min:
            break
        removals.append(entry)
        total_bytes -= entry.size_bytes
        free_bytes += entry.size_bytes
    return removals
