"""Keeps the list of an endpoint's hot blocks for its next start in an empty directory.

::

    clean stop:     list --> saved state, for a start there anywhere --> the first choice of a cold start
                      `----> hot_blocks in the endpoint's directory ---> the second: after a crash, say
    while it runs:  now and then the same file, so that a crash loses little

Nothing here can fail a stop or a start: what cannot be read or written is a list less.

Not here: what is in a list (`hot_collection`), and what becomes of it (`hot_prefetch`).
"""

import asyncio
import os
import subprocess
import time
from pathlib import Path
from typing import Final

from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.compute.arena import Arena, preload_environment
from excimer.compute.hot_collection import collect_hot_blocks
from excimer.compute.hot_prefetch import Outcome, PrefetchEndedError, Prefetcher, prefetch_hot_blocks
from excimer.compute.spec import ComputeSpec
from excimer.io.private_files import write_private
from excimer.io.processes import spawn
from excimer.pgformat.hot_blocks import HOT_BYTES_MAX, HotBlocks, pack_hot_blocks, unpack_hot_blocks
from excimer.service.logs import get_logger
from excimer.service.tasks import SystemClock, finish_in_thread

PREFETCH_VARIABLE: Final = "EXCIMER_PREFETCH"
"""Same as in csrc/libhydrate/library.c."""
FREE_BYTES_MIN: Final = 2 << 30
"""With less on the disk nothing is fetched that nobody asked for."""
NOTE_S: Final = 300.0
"""Between two lists while PostgreSQL runs,"""
FIRST_NOTE_S: Final = 60.0
"""and before the first."""
COST_PART_MAX: Final = 1000
"""A list of very many files takes long: at most one part in so many of the time goes into it."""
READ_BYTES_MAX: Final = HOT_BYTES_MAX + 64

log = get_logger(__name__)


class HotKeeper:
    """Of one attempt: one start of PostgreSQL."""

    def __init__(self, spec: ComputeSpec) -> None:
        self._spec = spec
        self._places = spec.places
        self.is_cold = False
        """The directory is new: what is hot is not in it."""
        self.saved = b""
        """The list of the state with which a cold start begins."""

    async def run(self, arena: Arena) -> None:
        """Beside a primary's PostgreSQL, until cancelled."""
        if self.is_cold and self._spec.prefetch_bytes_max:
            self.is_cold = False
            hot = await finish_in_thread(self.choose, self.saved)
            self.saved = b""
            if hot is not None:
                await self._prefetch(hot, arena)
        wait_s, noted = FIRST_NOTE_S, -1
        while True:
            await asyncio.sleep(wait_s)
            began = time.monotonic()
            reads = arena.statistics().reads
            if reads != noted:
                await finish_in_thread(self._write, arena, None)
                noted = reads
            wait_s = max(NOTE_S, (time.monotonic() - began) * COST_PART_MAX)

    async def _prefetch(self, hot: HotBlocks, arena: Arena) -> None:
        """Says how it went."""
        spec, began = self._spec, time.monotonic()
        environment = preload_environment(self._places.arena) | {"LC_ALL": "C", PREFETCH_VARIABLE: "1"}
        process = spawn(
            [spec.build.postgres, "--version"],  # never gets there: see csrc/libhydrate/prefetch.c
            environment=spec.build.whole_environment(environment),
            directory=self._places.data_dir,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        prefetcher = Prefetcher(process)
        try:
            cache = ArenaCache(arena, self._places.data_dir)
            outcome = await prefetch_hot_blocks(
                hot,
                prefetcher.fetch,
                cache,
                bound_bytes=lambda: spec.cache.size_bytes,
                bytes_max=spec.prefetch_bytes_max,
                clock=SystemClock(),
            )
        except PrefetchEndedError as error:
            outcome = Outcome(0, str(error))
        finally:
            prefetcher.close()
        log.info(
            "hot blocks are fetched",
            listed=hot.blocks,
            fetched=outcome.fetched_blocks,
            end=outcome.why,
            ms=round((time.monotonic() - began) * 1000),
        )

    def close(self, arena: Arena) -> bytes:
        """The list of a PostgreSQL that has been shut down; blocks. Empty if there is none."""
        packed = self._write(arena, self._places.hot_buffers)
        self._places.hot_buffers.unlink(missing_ok=True)
        return packed

    def forget_buffers(self) -> None:
        """Before a PostgreSQL starts: what an earlier one left says nothing of it. Raises OSError."""
        self._places.hot_buffers.unlink(missing_ok=True)

    def choose(self, saved: bytes) -> HotBlocks | None:
        """What a start had better fetch: what was saved where it begins, else what this endpoint knew last.

        Blocks.
        """
        found = unpack_hot_blocks(saved)
        if found is not None:
            return found
        try:
            with self._places.hot_blocks.open("rb") as file:
                found = unpack_hot_blocks(file.read(READ_BYTES_MAX))
        except OSError:
            return None
        return found if found is not None and found.timeline_id == self._spec.timeline_id else None

    def _write(self, arena: Arena, buffers: Path | None) -> bytes:
        try:
            hot = collect_hot_blocks(self._places.data_dir, arena, buffers, self._spec.timeline_id)
            packed = pack_hot_blocks(hot)
            if packed:
                write_private(self._places.hot_blocks, packed)
        except (OSError, ValueError) as error:
            log.info("which blocks are hot is not known", error=error)
            return b""
        return packed


class ArenaCache:
    """What `hot_prefetch` asks of an arena and of the disk."""

    def __init__(self, arena: Arena, data_dir: Path) -> None:
        self._arena = arena
        self._data_dir = data_dir
        self._used_bytes = self._blocks = 0
        """As they were at the last look of whoever keeps the bound."""

    def foreground_misses(self) -> int:
        return self._arena.statistics().read_misses

    def bytes_in_use(self) -> int:
        used_bytes, blocks = self._arena.cache()[1], self._arena.statistics().blocks
        if used_bytes != self._used_bytes:
            self._used_bytes, self._blocks = used_bytes, blocks
        return self._used_bytes + (blocks - self._blocks) * BLOCK_SIZE_BYTES

    def has_disk(self) -> bool:
        disk = os.statvfs(self._data_dir)
        return disk.f_bavail * disk.f_frsize >= FREE_BYTES_MIN
