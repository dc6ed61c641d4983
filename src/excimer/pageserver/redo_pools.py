"""Redo workers of every PostgreSQL version in use: one pool per version, made when it is first needed.

Not here: the pool itself (`storage.engine.redo_pool`), and finding PostgreSQL (`postgres`).
"""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from excimer.base.ids import TenantId
from excimer.io.confinement import Confinement, probe_confinement
from excimer.postgres import find_build
from excimer.service.health import Health
from excimer.service.logs import get_logger
from excimer.storage.engine.redo_pool import RedoPool, UnconfinedRedoError

log = get_logger(__name__)


class RedoPools:
    """Safe to use from any thread, except `close`."""

    def __init__(
        self, scratch_dir: Path, workers: int, *, processes_max: int, must_confine: bool = False
    ) -> None:
        self._scratch_dir = scratch_dir
        self._workers = workers
        self._processes_max = processes_max
        self._must_confine = must_confine
        self._pools: dict[int, RedoPool] = {}
        self._lock = threading.Lock()

    async def redo(
        self, requests: Sequence[bytes], pg_version: int, tenant: TenantId
    ) -> Sequence[bytes | Exception]:
        """As `RedoPool.redo`. The first call of a version may take long: it compiles the redo extension.

        Raises `PostgresMissingError`, `BuildUnusableError`, `RedoUnavailableError`, `UnconfinedRedoError`.
        """
        pool = self._pools.get(pg_version)
        if pool is None:
            pool = await asyncio.to_thread(self._make, pg_version)
        return await pool.redo(requests, tenant)

    def process_count(self) -> int:
        """Redo workers that run."""
        return sum(len(pool.supervisor.process_ids()) for pool in list(self._pools.values()))

    def recycled_count(self) -> int:
        """Workers that one tenant has lost to another so far."""
        return sum(pool.supervisor.recycled for pool in list(self._pools.values()))

    async def close(self) -> None:
        """Stops all workers."""
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))

    def _make(self, pg_version: int) -> RedoPool:
        with self._lock:
            if pg_version not in self._pools:
                self._pools[pg_version] = RedoPool(
                    find_build(pg_version),
                    self._scratch_dir,
                    self._workers,
                    processes_max=self._processes_max,
                    must_confine=self._must_confine,
                )
            return self._pools[pg_version]


def check_confinement(health: Health, *, must_confine: bool) -> Confinement:
    """Says what will keep redo workers from files that are not theirs. Blocks for a moment.

    Raises `UnconfinedRedoError` when that is nothing and `must_confine`.
    """
    confinement = probe_confinement()
    health.facts["redo_confinement"] = confinement.value
    if confinement is not Confinement.NONE:
        log.info("redo workers are confined to their scratch directories", by=confinement.value)
        return confinement
    if must_confine:
        raise UnconfinedRedoError
    problem = (
        "not confined: redo workers can open what their user can open, because this kernel offers neither "
        "Landlock nor user namespaces; redo_confinement_required = true refuses to run so"
    )
    log.warning("redo is " + problem)
    health.warn("redo", problem)
    return confinement
