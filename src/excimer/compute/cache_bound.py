"""How much of the local disk the relations of an endpoint may take, as the controller has it.

A PostgreSQL that began without a bound has none until its next start: what it has written was not followed,
so none of it could be told to be at the pageserver (`csrc/libhydrate/local_changes.c`).

Not here: keeping to it (`cache_keeper`).
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec

from excimer.base.errors import ExcimerError, RetryableError
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger

CALL_LIMIT_S: Final = 3.0
RETRY_S: Final = 5.0
MIB: Final = 1 << 20

log = get_logger(__name__)


class CacheSizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The controller's."""

    cache_size_mib: int


class CacheSizeDoor:
    """The controller's route about it."""

    def __init__(self, address: str, name: str, read_token: Callable[[], str]) -> None:
        self._address = address
        self._path = path_of("v1", "endpoints", name, "cache_size")
        self._read_token = read_token

    async def read(self) -> int:
        """Bytes. Raises ExcimerError."""
        client = HttpClient("the controller", self._address, self._read_token(), CALL_LIMIT_S)
        return _understood(await client.get(self._path)).cache_size_mib * MIB


def _understood(answer: Any) -> CacheSizeAnswer:
    try:
        return msgspec.convert(answer, CacheSizeAnswer)
    except msgspec.ValidationError as error:
        raise RetryableError(f"the controller's answer is not understood: {error}") from error


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

    async def refresh(self, door: CacheSizeDoor) -> None:
        """Takes over what the controller has now, trying again until it is heard of."""
        while True:
            try:
                self.set(await door.read())
            except RetryableError as error:
                log.warning("the cache size cannot be read from the controller", reason=str(error))
                await asyncio.sleep(RETRY_S)
            except ExcimerError as error:
                log.error("the cache size cannot be read from the controller", reason=str(error))
                return
            else:
                return
