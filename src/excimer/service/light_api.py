"""Routes of a process that serves by `light_http`: token, JSON body, JSON answer, errors by their family.

For a process that may have no thread, and so no FastAPI, whose dependencies run in threads: the compute node
forks at any moment.

Not here: reading bytes (`light_http`), the table of answers (`error_answers`).
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import h11
import msgspec

from excimer.base.clock import Clock
from excimer.base.errors import ExcimerError, NotFoundError, RefusedError
from excimer.service.bearer import verify_bearer
from excimer.service.connections import Admission
from excimer.service.error_answers import error_body, status_of
from excimer.service.health import HTTP_OK
from excimer.service.light_http import JSON, LightAnswer
from excimer.service.logs import get_logger
from excimer.wire.auth import EVERYTHING, Right, TokenVerifier, authorize

BODY_LIMIT_S: Final = 30.0

log = get_logger(__name__)

Handler = Callable[[Mapping[str, str], Any], Awaitable[object]]


class NoRouteError(NotFoundError):
    """Nothing is served at this path by this method."""


class BodyError(RefusedError):
    """The body is not what the route takes."""


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    """As ``/v1/endpoints/{name}``."""
    body: type | None
    """A msgspec Struct; None: the route takes no body."""
    handle: Handler
    """Gets the parts of the path by name, and the body; answers what msgspec encodes."""

    def match(self, method: str, path: str) -> dict[str, str] | None:
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.path)
        found = re.fullmatch(pattern, path) if method == self.method else None
        return None if found is None else {name: unquote(text) for name, text in found.groupdict().items()}


class LightApi:
    """All routes ask for the right `manage` on everything, before a body is read."""

    def __init__(self, routes: Sequence[Route], verifier: TokenVerifier, clock: Clock) -> None:
        self.routes = routes
        self._verifier = verifier
        self._clock = clock

    async def answer(
        self, request: h11.Request, admission: Admission, read_body: Callable[[], Awaitable[bytes]]
    ) -> LightAnswer:
        try:
            value = await self._serve(request, admission, read_body)
        except ExcimerError as error:
            status, family = status_of(error)
            path = request.target.decode("ascii", "replace")[:200]
            (log.error if status == 500 else log.info)("request failed", path=path, error=error)
            return LightAnswer(status, JSON, error_body(family, type(error).__name__, str(error)))
        except OSError as error:
            log.error("request failed", error=error)
            return LightAnswer(503, JSON, error_body("retryable", type(error).__name__, str(error)))
        return LightAnswer(HTTP_OK, JSON, msgspec.json.encode(value))

    async def _serve(
        self, request: h11.Request, admission: Admission, read_body: Callable[[], Awaitable[bytes]]
    ) -> object:
        authorization = dict(request.headers).get(b"authorization", b"").decode("latin-1")
        claims = verify_bearer(authorization, self._verifier, self._clock.now())
        authorize(claims, Right.MANAGE, EVERYTHING)
        admission.authenticated()
        method, path = request.method.decode("ascii"), request.target.partition(b"?")[0].decode("ascii")
        for route in self.routes:
            parts = route.match(method, path)
            if parts is not None:
                return await route.handle(parts, await _body_of(route, read_body))
        raise NoRouteError(f"{method} {path[:200]}: nothing is served here")


async def _body_of(route: Route, read_body: Callable[[], Awaitable[bytes]]) -> Any:
    """Raises `BodyError`, `h11.RemoteProtocolError`."""
    try:
        async with asyncio.timeout(BODY_LIMIT_S):
            content = await read_body()
    except TimeoutError as error:
        raise BodyError(f"the body did not come within {BODY_LIMIT_S:g} s") from error
    if route.body is None:
        return None
    try:
        return msgspec.json.decode(content, type=route.body)
    except msgspec.DecodeError as error:
        raise BodyError(f"the body is not understood: {error}") from error
