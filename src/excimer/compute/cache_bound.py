"""How much of the local disk the relations of an endpoint may take, as the controller has it.

A PostgreSQL that began without a bound has none until its next start: what it has written was not followed,
so none of it could be told to be at the pageserver (`csrc/libhydrate/local_changes.c`).

Not here: keeping to it (`cache_keeper`).
"""

import asyncio
from typing import Final

import msgspec

from excimer.compute.endpoint_record import EndpointRecord, read_when_heard

CALL_LIMIT_S: Final = 3.0
MIB: Final = 1 << 20


class CacheSizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The controller's."""

    cache_size_mib: int


async def read_cache_size(record: EndpointRecord) -> int:
    """Bytes. Raises ExcimerError."""
    return (await record.read("cache_size", CacheSizeAnswer, CALL_LIMIT_S)).cache_size_mib * MIB


class CacheBound:
    """The bound, which may change while PostgreSQL runs; 0: none."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._changed = asyncio.Event()

    @property
    def is_bounded(self) -> bool:
        return self.size_bytes > 0

    def set(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._changed.set()

    async def wait(self, wait_s: float) -> None:
        """Less if it changes meanwhile."""
        self._changed.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def refresh(self, record: EndpointRecord) -> None:
        """Takes over what the controller has now, trying again until it is heard of."""
        size_bytes = await read_when_heard("the cache size", lambda: read_cache_size(record))
        if size_bytes is not None:
            self.set(size_bytes)
