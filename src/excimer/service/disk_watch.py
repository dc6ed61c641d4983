"""Watches the disks that a service writes to, and says in its health and metrics when one is full.

A full disk is a warning, not a problem: what must be written waits, and goes on when there is room, which
starting the service again would not bring about sooner. Whether there is room is tried, because quotas do not
show in what a file system says of itself: a megabyte is allocated and given back.

Not here: waiting for room, which is the business of whoever writes.
"""

import asyncio
import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Never

from excimer.service.health import Health
from excimer.service.logs import get_logger
from excimer.service.plain_metrics import PlainMetric

LOOK_S: Final = 3.0
PROBE_BYTES: Final = 1 << 20
NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)

log = get_logger(__name__)


def find_trouble(directory: Path) -> str | None:
    """Why nothing can be written in a directory; None: it can, or there is no such directory. Blocks."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".room-", dir=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        return _sentence(directory, error)
    try:
        os.posix_fallocate(descriptor, 0, PROBE_BYTES)
    except OSError as error:
        return _sentence(directory, error)
    finally:
        os.close(descriptor)
        os.unlink(name)
    return None


def _sentence(directory: Path, error: OSError) -> str:
    if error.errno in NO_SPACE:
        free = _free_bytes(directory)
        return f"full ({free >> 20} MiB free): what is written there waits until there is room"
    return f"not writable: {error.strerror}"


def _free_bytes(directory: Path) -> int:
    try:
        status = os.statvfs(directory)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


class DiskWatch:
    """`service.metrics.add_disks` puts what it knows into a registry."""

    def __init__(
        self, health: Health, directories: Sequence[Path], ask_writers: Callable[[], str | None] | None = None
    ) -> None:
        """`ask_writers` says who waits for room there although a look finds some; None: nobody."""
        self._health = health
        self._ask_writers = ask_writers or (lambda: None)
        self._directories = directories
        self.full: dict[Path, bool] = dict.fromkeys(directories, False)

    async def run(self) -> Never:
        """Looks now and then, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        for directory in self._directories:
            trouble = await asyncio.to_thread(find_trouble, directory) or self._ask_writers()
            if (trouble is not None) != self.full[directory]:
                self.full[directory] = trouble is not None
                if trouble is None:
                    log.info("disk has room again", path=str(directory))
                else:
                    log.error("disk cannot be written to", path=str(directory), why=trouble)
            self._health.warn(f"the disk of {directory}", trouble)

    def samples(self) -> Iterable[PlainMetric]:
        for path, is_full in self.full.items():
            description = "1 while nothing can be written there"
            yield PlainMetric("excimer_disk_full", "gauge", description, float(is_full), {"path": str(path)})
        for path in self.full:
            free = float(_free_bytes(path))
            yield PlainMetric("excimer_disk_free_bytes", "gauge", "Free space", free, {"path": str(path)})
