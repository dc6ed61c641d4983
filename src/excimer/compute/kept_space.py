"""Bounds what the directories of stopped endpoints take: each manager looks after those beside its own.

Once when its own endpoint has stopped, and now and then while it runs, for the disk may fill meanwhile. An
endpoint that starts holds its directory's lock and is let alone.

Not here: which go (`kept_space_plan`).
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Never

from excimer.compute.directory_lock import DirectoryBusyError, directory_lock
from excimer.compute.kept_directory import hide, read_record, remove_hidden
from excimer.compute.kept_space_plan import KeptEntry, plan_removals
from excimer.compute.places import SHUTDOWN_RECORD_NAME, locate_places
from excimer.service.logs import get_logger

LOOK_S: Final = 10.0
FREE_BYTES_MIN: Final = 1 << 30
"""With less on the disk a stopped endpoint's cache is worth less than room."""

MADE_ROOM: Final = "it was removed to make room on the disk"

log = get_logger(__name__)


def keep_within(endpoints_dir: Path, size_bytes_max: int, free_bytes_min: int = FREE_BYTES_MIN) -> None:
    """Removes what is too much. Blocks. Raises OSError when the directory cannot be listed."""
    removals = plan_removals(
        find_kept(endpoints_dir),
        size_bytes_max=size_bytes_max,
        free_bytes=_free_bytes(endpoints_dir),
        free_bytes_min=free_bytes_min,
    )
    for entry in removals:
        if _remove(entry):
            log.info(
                "a stopped endpoint's data directory is removed",
                endpoint=entry.endpoint_dir.name,
                size_bytes=entry.size_bytes,
            )


async def keep_watching(endpoints_dir: Path, size_bytes_max: int) -> Never:
    """Until cancelled."""
    while True:
        await asyncio.sleep(LOOK_S)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(keep_within, endpoints_dir, size_bytes_max)


def find_kept(endpoints_dir: Path) -> Iterator[KeptEntry]:
    """Of all endpoints there. Raises OSError."""
    for path in endpoints_dir.glob(f"*/{SHUTDOWN_RECORD_NAME}"):
        record = read_record(path)
        if record is None:
            yield KeptEntry(path.parent, 0.0, 0)
        else:
            yield KeptEntry(path.parent, record.stopped_at_s, record.size_bytes)


def _remove(entry: KeptEntry) -> bool:
    """False if it is in use, or cannot be removed."""
    places = locate_places(entry.endpoint_dir)
    run_dir = places.run_dir
    try:
        with directory_lock(run_dir, wait_s=0):
            is_kept = places.shutdown_record.exists()
            if is_kept:
                hide(places, MADE_ROOM)
        if is_kept:
            remove_hidden(run_dir)
    except (DirectoryBusyError, OSError) as error:
        log.debug("a stopped endpoint's data directory stays", path=str(run_dir), error=error)
        return False
    return is_kept


def _free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
