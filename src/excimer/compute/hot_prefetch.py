"""Fetches an endpoint's hot blocks in the background, after a start in an empty directory.

::

    list --> batches: up to 32 runs, 128 blocks, of one file --> a process with libhydrate --> the local files
                 ^                                                  |
                 +-- it answers; PostgreSQL has missed meanwhile: a pause, and smaller batches

One batch is under way at a time. PostgreSQL's own reads go first: while it fetches, batches are small, and
there is a pause after each that is as long as it took. It is over before the cache is full, so nothing is
evicted for it.

Not here: how blocks are fetched (`csrc/libhydrate/prefetch.c`), which are hot (`hot_collection`).
"""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Protocol

from excimer.base.clock import Clock
from excimer.base.errors import RetryableError
from excimer.base.keys import BLOCK_SIZE_BYTES
from excimer.pgformat.hot_blocks import HotBlocks
from excimer.service.logs import get_logger

RUNS_MAX: Final = 32
"""As many as libhydrate has under way at once."""
BLOCKS_MAX: Final = 128
SHARED_BLOCKS_MAX: Final = 64
"""While PostgreSQL fetches, too."""
GAP_MAX: Final = 4
"""Blocks between two runs that are fetched with them."""
FREE_PART: Final = 16
"""Of a bounded cache one part in so many is left free: more than eviction would make room for."""
FAILURES_MAX: Final = 10
RETRY_S: Final = 1.0

log = get_logger(__name__)


class PrefetchEndedError(RetryableError):
    """The process that fetches is gone."""


class Cache(Protocol):
    """What is asked of the arena."""

    def foreground_misses(self) -> int:
        """Blocks that PostgreSQL had to wait for, ever."""

    def bytes_in_use(self) -> int:
        """On the disk, at least about."""

    def has_disk(self) -> bool:
        """Whether the disk has so much room that nobody misses it."""


class Batch(NamedTuple):
    path: str
    runs: list[int]
    blocks: int

    def line(self) -> bytes:
        return f"{self.path} {' '.join(map(str, self.runs))}\n".encode()


class Outcome(NamedTuple):
    fetched_blocks: int
    why: str


Fetch = Callable[[bytes], Awaitable[int]]
"""Blocks that came for a line; less than 0: the page server did not answer. Raises `PrefetchEndedError`."""


async def prefetch_hot_blocks(
    hot: HotBlocks,
    fetch: Fetch,
    cache: Cache,
    *,
    bound_bytes: Callable[[], int],
    bytes_max: int,
    clock: Clock,
) -> Outcome:
    """Until all is here or `bytes_max` have come, the cache is nearly full or no page server answers."""
    fetched = failures = 0
    misses = cache.foreground_misses()
    blocks_max = BLOCKS_MAX
    for file in (file for level in hot.levels for file in level):
        rest = _joined(file.runs)
        while rest:
            bound = bound_bytes()
            if bound and cache.bytes_in_use() >= bound - bound // FREE_PART - blocks_max * BLOCK_SIZE_BYTES:
                return Outcome(fetched, "the cache has no more room")
            if (fetched + blocks_max) * BLOCK_SIZE_BYTES > bytes_max:
                return Outcome(fetched, "no more may be fetched")
            if not cache.has_disk():
                return Outcome(fetched, "the disk has little room")
            batch, rest = _next_batch(file.path, rest, blocks_max)
            began = clock.monotonic()
            came = await fetch(batch.line())
            fetched += max(came, 0)
            failures = failures + 1 if came < 0 else 0
            if failures > FAILURES_MAX:
                return Outcome(fetched, "the page server does not answer")
            now_misses = cache.foreground_misses()
            is_shared, misses = now_misses != misses, now_misses
            blocks_max = SHARED_BLOCKS_MAX if is_shared else BLOCKS_MAX
            if failures:
                await asyncio.sleep(RETRY_S)
            elif is_shared:
                await asyncio.sleep(clock.monotonic() - began)
    return Outcome(fetched, "all of it is here")


def _joined(runs: list[int]) -> list[tuple[int, int]]:
    """As (block, end), with small gaps filled."""
    joined: list[tuple[int, int]] = []
    for block, count in zip(runs[::2], runs[1::2], strict=True):
        if joined and block - joined[-1][1] <= GAP_MAX:
            joined[-1] = joined[-1][0], block + count
        else:
            joined.append((block, block + count))
    joined.reverse()  # taken from the end
    return joined


def _next_batch(
    path: str, rest: list[tuple[int, int]], blocks_max: int
) -> tuple[Batch, list[tuple[int, int]]]:
    runs: list[int] = []
    blocks = 0
    while rest and blocks < blocks_max and len(runs) < 2 * RUNS_MAX:
        block, end = rest.pop()
        count = min(end - block, blocks_max - blocks)
        runs += (block, count)
        blocks += count
        if block + count < end:
            rest.append((block + count, end))
    return Batch(path, runs, blocks), rest


class Prefetcher:
    """The process that fetches; it ends when its standard input does, so it does not outlive us."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    async def fetch(self, line: bytes) -> int:
        """Raises `PrefetchEndedError`."""
        return await asyncio.to_thread(self._exchange, line)

    def _exchange(self, line: bytes) -> int:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(line)
            return int(stdout.readline())
        except (OSError, ValueError) as error:
            raise PrefetchEndedError(f"the process that fetches hot blocks has ended: {error}") from error

    def close(self) -> None:
        """Blocks for a moment; a `fetch` that is under way ends."""
        self._process.kill()
        self._process.wait()
