"""What the controller keeps of this endpoint, as its manager reads and changes it.

Each part of the record has a route, `/v1/endpoints/NAME/PART`, of its own.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from excimer.base.errors import ExcimerError, RetryableError
from excimer.service.http_client import HttpClient, path_of
from excimer.service.logs import get_logger

RETRY_S: Final = 5.0

T = TypeVar("T")

log = get_logger(__name__)


class EndpointRecord:
    """The record of one endpoint; `read_token` gives the token that is in force."""

    def __init__(self, address: str, name: str, read_token: Callable[[], str]) -> None:
        self._address = address
        self._name = name
        self._read_token = read_token

    async def read(self, part: str, answer: type[T], limit_s: float) -> T:
        """Raises ExcimerError."""
        return _understood(await self._client(limit_s).get(self._path(part)), answer)

    async def change(self, part: str, body: Mapping[str, object], answer: type[T], limit_s: float) -> T:
        """Durable when it returns. Raises `RefusedError` with the reason, and other ExcimerErrors."""
        return _understood(await self._client(limit_s).call("PATCH", self._path(part), body), answer)

    def _path(self, part: str) -> str:
        return path_of("v1", "endpoints", self._name, part)

    def _client(self, limit_s: float) -> HttpClient:
        return HttpClient("the controller", self._address, self._read_token(), limit_s)


def _understood(answer: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise RetryableError(f"the controller's answer is not understood: {error}") from error


async def read_when_heard(what: str, read: Callable[[], Awaitable[T]]) -> T | None:
    """What the controller has now, asked again until it answers; None when it refuses, which is logged."""
    while True:
        try:
            return await read()
        except RetryableError as error:
            log.warning(f"{what} cannot be read from the controller", reason=str(error))
            await asyncio.sleep(RETRY_S)
        except ExcimerError as error:
            log.error(f"{what} cannot be read from the controller", reason=str(error))
            return None
