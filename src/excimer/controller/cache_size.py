"""How much of its local disk an endpoint's cache may take: the one place where it is kept.

A running compute reads its bound here when it is told to look (SIGHUP).

Not here: keeping to it (`excimer.compute.cache_keeper`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from excimer.controller.model import UNBOUNDED, BadRequestError, Endpoint
from excimer.controller.store import MetadataStore
from excimer.service.logs import get_logger

SIZE_MIB_MIN: Final = 16
SIZE_MIB_MAX: Final = 1 << 26
"""64 TiB."""

log = get_logger(__name__)


def check_cache_size(size_mib: int) -> None:
    """Raises `BadRequestError`."""
    if size_mib != UNBOUNDED and not SIZE_MIB_MIN <= size_mib <= SIZE_MIB_MAX:
        raise BadRequestError(
            f"a cache has {SIZE_MIB_MIN} MiB to {SIZE_MIB_MAX >> 20} TiB, or no bound (0): "
            f"{size_mib} MiB is neither"
        )


class CacheSizes:
    """Reads and changes it."""

    def __init__(
        self, store: MetadataStore, find_endpoint: Callable[[str], Awaitable[tuple[Endpoint, str]]]
    ) -> None:
        self._store = store
        self._find_endpoint = find_endpoint

    async def read(self, name: str) -> int:
        """MiB; 0: no bound. Raises `UnknownNameError`."""
        return (await self._find_endpoint(name))[0].cache_size_mib

    async def change(self, name: str, size_mib: int) -> int:
        """Durable when it returns. Raises `UnknownNameError`, `BadRequestError`."""
        check_cache_size(size_mib)
        endpoint, _ = await self._find_endpoint(name)
        if endpoint.cache_size_mib != size_mib:
            await asyncio.to_thread(self._store.put_cache_size, endpoint.name, size_mib)
            log.info("cache size changed", endpoint=name, size_mib=size_mib)
        return size_mib
