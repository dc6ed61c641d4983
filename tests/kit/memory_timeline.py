"""A timeline in memory: the store's contract with a dict behind it, for tests of what stands upon it.

Values are whole (a page, a size, a map): nothing is redone here.
"""

import asyncio
import bisect
from collections.abc import Awaitable, Callable
from functools import partial

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.ids import TenantId, TimelineId
from excimer.base.keys import BLOCK_SIZE_BYTES, KeyKind, describe_key, make_key, parse_key
from excimer.base.lsn import Lsn, format_lsn
from excimer.storage.format.relation_size import size_blocks


class MemoryTimeline:
    def __init__(self, tenant_id: TenantId, timeline_id: TimelineId, pg_version: int = 18) -> None:
        self.tenant_id = tenant_id
        self.timeline_id = timeline_id
        self.pg_version = pg_version
        self.ancestor: MemoryTimeline | None = None
        self.ancestor_lsn = Lsn(0)
        self.last_record_lsn = Lsn(0)
        self.prev_record_lsn = Lsn(0)
        self.disk_consistent_lsn = Lsn(0)
        self.remote_consistent_lsn = Lsn(0)
        self.reads: list[tuple[bytes, int, int]] = []
        """Every `get_pages`: key, count, LSN."""
        self.gate = asyncio.Event()
        """Reads of pages wait for it; open unless a test clears it."""
        self.gate.set()
        self.at_once = False
        """Whether `start_read` answers on the spot."""
        self.reading = 0
        self.reading_most = 0
        self._values: dict[bytes, list[tuple[Lsn, bytes | None]]] = {}
        self._arrived = asyncio.Condition()

    def put(self, key: bytes, lsn: int, value: bytes | None) -> None:
        """None is a tombstone. LSNs of one key must grow."""
        self._values.setdefault(key, []).append((Lsn(lsn), value))

    async def advance(self, lsn: int) -> None:
        """A record ends at `lsn`; wakes whoever waits for it."""
        self.prev_record_lsn, self.last_record_lsn = self.last_record_lsn, Lsn(lsn)
        async with self._arrived:
            self._arrived.notify_all()

    async def wait_for_lsn(self, lsn: Lsn, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s), self._arrived:
                await self._arrived.wait_for(lambda: self.last_record_lsn >= lsn)
        except TimeoutError as error:
            raise RetryableError(
                f"no WAL up to {format_lsn(lsn)} in {timeout_s} s: "
                f"the newest is {format_lsn(self.last_record_lsn)}"
            ) from error

    def get_value(self, key: bytes, lsn: Lsn) -> bytes | None:
        history = self._values.get(key, [])
        index = bisect.bisect_right(history, lsn, key=lambda entry: entry[0])
        if index:
            return history[index - 1][1]
        if self.ancestor is not None:
            return self.ancestor.get_value(key, Lsn(min(lsn, self.ancestor_lsn)))
        return None

    def scan(self, start: bytes, end: bytes, lsn: Lsn) -> list[tuple[bytes, bytes]]:
        found = [(key, self.get_value(key, lsn)) for key in sorted(self._values) if start <= key < end]
        return [(key, value) for key, value in found if value is not None]

    async def get_pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        self.reads.append((key, count, lsn))
        self.reading += 1
        self.reading_most = max(self.reading_most, self.reading)
        try:
            await self.gate.wait()
            return self._pages(key, count, lsn)
        finally:
            self.reading -= 1

    def start_read(self, key: bytes, count: int, lsn: Lsn) -> bytes | Callable[[], Awaitable[bytes]]:
        if self.at_once:
            self.reads.append((key, count, lsn))
            return self._pages(key, count, lsn)
        return partial(self.get_pages, key, count, lsn)

    def _pages(self, key: bytes, count: int, lsn: Lsn) -> bytes:
        kind, spc, db, rel, fork, block = parse_key(key)
        size_kind = KeyKind.RELATION_SIZE if kind == KeyKind.RELATION_BLOCK else KeyKind.SLRU_SIZE
        size = self.get_value(make_key(size_kind, spc, db, rel, fork), lsn)
        if size is None or block + count > size_blocks(size):
            raise RefusedError(f"no {describe_key(key)} at {format_lsn(lsn)}")
        keys = (make_key(kind, spc, db, rel, fork, block + index) for index in range(count))
        return b"".join(self.get_value(key, lsn) or bytes(BLOCK_SIZE_BYTES) for key in keys)
