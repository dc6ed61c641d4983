"""Looks again and again what endpoints use whose limits are ranges, and gives them the size that follows.

Costs nothing while there are none, and a few reads of small files a second for each.

Not here: which size follows (`scaling_policy`), what it takes to have it (`resources`).
"""

import asyncio
from pathlib import Path
from typing import Final, Never

from excimer.base.errors import ExcimerError
from excimer.compute.arena import Arena
from excimer.compute.places import locate_places
from excimer.compute_node.resources import Resources

INTERVAL_S: Final = 1.0


async def keep_scaling(resources: Resources, endpoints_dir: Path) -> Never:
    """Until cancelled."""
    while True:
        await asyncio.sleep(INTERVAL_S)
        for name in resources.elastic():
            resources.scale(name, read_reads(endpoints_dir / name))


def read_reads(endpoint_dir: Path) -> int:
    """Blocks that its PostgreSQL has read past shared buffers; 0 if that is not known."""
    try:
        arena = Arena.open(locate_places(endpoint_dir).arena)
    except (ExcimerError, OSError, ValueError):
        return 0
    try:
        return arena.statistics().reads
    finally:
        arena.close()
