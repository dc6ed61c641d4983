"""Redo workers of one PostgreSQL version: batches of requests in, pages or errors out, in order.

::

    redo(requests) --.--> batch --thread--> worker process of this tenant --> pages
    redo(requests) --'--> batch --thread--> worker process of this tenant --> pages

Each worker serves one batch at a time, driven by a thread that blocks on its pipes: an event loop
step per page would cost more than the page. Requests of several reads that wait at the same time share a
batch (`redo_batcher`). Workers start when first needed, and never serve a second tenant.

Not here: what happens when a worker fails, and how many there are (`redo_supervisor`), PostgreSQL's side
(`csrc/redo`), and which records make up a page (`storage.plan`).
"""

import asyncio
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from excimer.base.errors import RefusedError
from excimer.base.ids import TenantId
from excimer.io.cache import make_reachable_dir, remove_reachable_dir
from excimer.io.confinement import Confinement
from excimer.postgres import PostgresBuild, redo_extension
from excimer.postgres.redo_template import redo_control_file
from excimer.storage.engine.redo_batcher import RedoBatcher
from excimer.storage.engine.redo_supervisor import (
    IDLE_S_MAX,
    REQUEST_TIMEOUT_S,
    RedoError,
    RedoSupervisor,
    RedoUnavailableError,
)
from excimer.storage.engine.redo_worker import RedoWorker

__all__ = ["PROCESSES_MAX", "RedoError", "RedoPool", "RedoUnavailableError", "UnconfinedRedoError"]

PROCESSES_MAX = 64
"""Most of them idle, 2.5 to 4 MB each."""


class UnconfinedRedoError(RefusedError):
    """A redo worker could open files that are not its own, and the operator does not want that."""

    def __init__(self) -> None:
        super().__init__(
            "redo workers cannot be confined to their scratch directories here: this kernel has no Landlock "
            "(Linux 5.13 and newer have it, unless it is off in the boot parameter lsm=, or a container's "
            "system-call filter hides it) and does not allow user namespaces. Mend that, or set "
            "redo_confinement_required = false and trust every tenant with what the user of redo workers "
            "can read"
        )


class RedoPool:
    """Redo workers of one build: up to `workers` at work at once, up to `processes_max` processes in all.

    Close it: its processes live as long as we do.

    `scratch_dir` is the page server's own: what a killed page server left there is removed. The
    constructor blocks while the redo extension is compiled (once per build) and raises
    `BuildUnusableError` when it cannot be. `wal_log_hints` must say whether the timelines' clusters log
    hint bits (by that setting or by data checksums): it decides which LSN some records leave on a page.
    `extension` is one that was compiled otherwise than usual. With `must_confine` a worker that could open
    files beyond its scratch directory is not used.
    """

    def __init__(
        self,
        build: PostgresBuild,
        scratch_dir: Path,
        workers: int,
        *,
        processes_max: int = PROCESSES_MAX,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        wal_log_hints: bool = False,
        extension: Path | None = None,
        must_confine: bool = False,
        without: Sequence[str] = (),
    ) -> None:
        self._build = build
        self._wal_log_hints = wal_log_hints
        self._must_confine = must_confine
        self._without = without
        self._scratch_name = scratch_dir / f"redo-{build.version}{'-hints' if wal_log_hints else ''}"
        self._library = extension or redo_extension(build)
        self._control_file = redo_control_file(build)
        self._scratch_dir = make_reachable_dir(self._scratch_name)
        for leftover in self._scratch_dir.glob("worker-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.supervisor = RedoSupervisor(
            self._start_worker, max(processes_max, workers), request_timeout_s=request_timeout_s
        )
        # As many threads as workers at work: a thread always finds an idle worker, or room for one more.
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix=f"redo-{build.version}")
        self._batcher = RedoBatcher(
            self.supervisor.run_batch, self._executor, workers, self.supervisor.would_recycle
        )
        self._idle_check: asyncio.TimerHandle | None = None

    async def redo(self, requests: Sequence[bytes], tenant: TenantId) -> list[bytes | RedoError]:
        """Pages for requests (`encode_redo_request`) of one tenant, in their order; a `RedoError` in place of
        a page that cannot be rebuilt. Raises `RedoUnavailableError`, `UnconfinedRedoError`. Of one event loop
        at a time.
        """
        if self._idle_check is None:
            self._check_later()
        return await self._batcher.redo(requests, tenant)

    async def close(self) -> None:
        """Waits for batches under way, then stops all workers. May be called more than once."""
        self._batcher.close()
        if self._idle_check is not None:
            self._idle_check.cancel()
        await asyncio.to_thread(self._executor.shutdown)
        self.supervisor.close()
        remove_reachable_dir(self._scratch_name, self._scratch_dir)

    def _start_worker(self) -> RedoWorker:
        worker = RedoWorker(
            self._build,
            self._library,
            self._control_file,
            self._scratch_dir,
            wal_log_hints=self._wal_log_hints,
            without=self._without,
        )
        if self._must_confine and worker.confinement is Confinement.NONE:
            worker.close()
            raise UnconfinedRedoError
        return worker

    def _check_later(self) -> None:
        self._idle_check = asyncio.get_running_loop().call_later(IDLE_S_MAX / 2, self._check_idle)

    def _check_idle(self) -> None:
        self._idle_check = None
        if self.supervisor.has_workers:
            asyncio.get_running_loop().run_in_executor(self._executor, self.supervisor.close_idle)
            self._check_later()
