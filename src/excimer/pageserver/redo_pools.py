"""Redo workers of every PostgreSQL version in use: one pool per version, made when it is first needed.

Not here: the pool itself (`storage.engine.redo_pool`), and finding PostgreSQL (`postgres`).
"""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from excimer.postgres import find_build
from excimer.storage.engine.redo_pool import RedoPool


class RedoPools:
    """Safe to use from any thread, except `close`."""

    def __init__(self, scratch_dir: Path, workers: int) -> None:
        self._scratch_dir = scratch_dir
        self._workers = workers
        self._pools: dict[int, RedoPool] = {}
        self._lock = threading.Lock()

    async def redo(self, requests: Sequence[bytes], pg_version: int) -> Sequence[bytes | Exception]:
        """As `RedoPool.redo`. The first call of a version may take long: it compiles the redo extension.

        Raises `PostgresMissingError`, `BuildUnusableError`, `RedoUnavailableError`.
        """
        pool = self._pools.get(pg_version)
        if pool is None:
            pool = await asyncio.to_thread(self._make, pg_version)
        return await pool.redo(requests)

    async def close(self) -> None:
        """Stops all workers."""
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))

    def _make(self, pg_version: int) -> RedoPool:
        with self._lock:
            if pg_version not in self._pools:
                build = find_build(pg_version)
                self._pools[pg_version] = RedoPool(build, self._scratch_dir, self._workers)
            return self._pools[pg_version]
