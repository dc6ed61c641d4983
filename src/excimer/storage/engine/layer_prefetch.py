"""Fetching what several layers have for one read at once, where it would else be one after the other.

A read walks its layers from the newest to the oldest. Where they are on the local disk that costs
microseconds; where they are not, each costs one or two round trips to object storage, and the first page
after an attachment would wait for all of them in turn. So the walk is looked over before: if two or more of
its layers would have to be fetched from, they all are, at the same time, and the walk finds the blocks in
the cache.
Some of that may be in vain, because the walk can end early; a read visits few layers, so it is little.

Errors are left to the walk, which meets them again exactly where it needs what is missing.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial

from excimer.base.errors import ExcimerError
from excimer.storage.engine.disk_layer import DiskLayer
from excimer.storage.plan.read_path import Visit


def prefetch(
    visits: Iterable[Visit], files: Mapping[str, DiskLayer], first_key: bytes, last_key: bytes
) -> None:
    """Blocks until it is done, or not worth while. Never raises."""
    cold = []
    for visit in visits:
        file = files[visit.layer.description.name]
        if file.needs_fetch(first_key, last_key, visit.low_lsn, visit.high_lsn):
            cold.append((file, visit))
    if len(cold) > 1:
        cold[0][0].disk.run_together(
            partial(_take, file, first_key, last_key, visit.low_lsn, visit.high_lsn) for file, visit in cold
        )


def _take(file: DiskLayer, first_key: bytes, last_key: bytes, low_lsn: int, high_lsn: int) -> None:
    with suppress(ExcimerError, OSError):
        for _ in file.blocks(first_key, last_key, low_lsn, high_lsn):
            pass
