"""What stands before every HTTP application: a request is bounded and authenticated before its body is read.

::

    headers --too long--> 431        token --none, wrong--> 401 (after which nothing more is read)
    body    --too long--> 413, --too slow--> 408

Paths in `OPEN_PATHS` need no token; a connection that asked for one of them, or was refused, is closed after
its answer. An authenticated connection may send another request within `KEEP_ALIVE_S`.

Not here: what a token grants (each route's `bearer_auth`).
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from starlette import types as asgi
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from excimer.base.clock import Clock
from excimer.service.bearer import UnauthorizedError, verify_bearer
from excimer.service.connections import Admission, TooManyConnectionsError
from excimer.service.error_answers import error_body
from excimer.service.logs import get_logger
from excimer.wire.auth import TokenVerifier

OPEN_PATHS: Final = frozenset(("/healthz", "/metrics", "/docs", "/openapi.json"))
KEEP_ALIVE_S: Final = 30
ADMISSION: Final = "admission"
"""In the state of a request's scope: the connection's `Admission`."""
CLAIMS: Final = "claims"
"""There too: the claims of a request that came with a token."""
_CLOSE: Final = (b"connection", b"close")
_LINGER_S: Final = 1.0
_LINGER_BYTES_MAX: Final = 64 << 10

log = get_logger(__name__)

Send = Callable[[asgi.Message], Any]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    head_bytes_max: int = 16 << 10
    """The request line and all headers."""
    body_bytes_max: int = 1 << 20
    body_s: float = 30.0
    """From the headers to the end of the body. Requests whose body is a stream bound it themselves."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that an error becomes before any route is asked."""

    status: int
    family: str
    kind: str
    message: str

    def body(self) -> bytes:
        return error_body(self.family, self.kind, self.message)


class RequestGuard:
    """ASGI middleware. `verifier` None lets every request pass without a token: its routes ask for one, or
    it is not reachable from outside. `is_stream(method, path)` names requests whose body has no bound here.
    """

    def __init__(
        self,
        app: asgi.ASGIApp,
        verifier: TokenVerifier | None,
        clock: Clock,
        limits: RequestLimits,
        is_stream: Callable[[str, str], bool],
    ) -> None:
        self._app = app
        self._verifier = verifier
        self._clock = clock
        self._limits = limits
        self._is_stream = is_stream

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        admission: Admission | None = scope.setdefault("state", {}).get(ADMISSION)
        refusal = self._refusal_of(scope, admission)
        if refusal is not None:
            log.info("request refused", path=scope["path"][:200], status=refusal.status, kind=refusal.kind)
            await _refuse(refusal, receive, send)
            return
        if CLAIMS not in scope["state"] and self._verifier is not None:
            await self._app(scope, self._bounded(scope, receive), _closing(send))
            return
        try:
            await self._app(scope, self._bounded(scope, receive), _closing_on_error(send))
        finally:
            if admission is not None:
                admission.waits_again(KEEP_ALIVE_S)

    def _refusal_of(self, scope: asgi.Scope, admission: Admission | None) -> Refusal | None:
        """Decided from the head alone; the claims of a good token go into the scope."""
        head_bytes = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        head_bytes += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if head_bytes > self._limits.head_bytes_max:
            message = f"the headers are longer than {self._limits.head_bytes_max} bytes"
            return Refusal(431, "refused", "HeadTooLargeError", message)
        headers = Headers(scope=scope)
        try:
            if self._verifier is None or scope["path"] not in OPEN_PATHS:
                if self._verifier is not None:
                    authorization = headers.get("authorization", "")
                    claims = verify_bearer(authorization, self._verifier, self._clock.now())
                    scope["state"][CLAIMS] = claims
                if admission is not None:
                    admission.authenticated()
        except UnauthorizedError as error:
            return Refusal(401, "unauthorized", "UnauthorizedError", str(error))
        except TooManyConnectionsError as error:
            return Refusal(503, "retryable", "TooManyConnectionsError", str(error))
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body_bytes_max(scope):
            return Refusal(413, "refused", "BodyTooLargeError", self._too_large(scope))
        return None

    def _body_bytes_max(self, scope: asgi.Scope) -> float:
        return (
            float("inf") if self._is_stream(scope["method"], scope["path"]) else self._limits.body_bytes_max
        )

    def _too_large(self, scope: asgi.Scope) -> str:
        return f"the body is longer than {self._body_bytes_max(scope)} bytes"

    def _bounded(self, scope: asgi.Scope, receive: asgi.Receive) -> asgi.Receive:
        """`receive`, which raises HTTPException when the body is too long or too slow."""
        if self._is_stream(scope["method"], scope["path"]):
            return receive
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.body_s
        size = 0
        is_whole = False

        async def receive_bounded() -> asgi.Message:
            nonlocal size, is_whole
            if is_whole:  # what comes now is the end of the connection, for which a route may wait
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                problem = f"the body did not come within {self._limits.body_s:g} s"
                raise HTTPException(408, problem) from error
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self._limits.body_bytes_max:
                raise HTTPException(413, self._too_large(scope))
            return message

        return receive_bounded


async def _refuse(refusal: Refusal, receive: asgi.Receive, send: asgi.Send) -> None:
    """Answers and closes. What the peer is sending meanwhile is taken for a moment and thrown away, because a
    socket closed with bytes unread resets the connection, and the peer may never see why.
    """
    body = refusal.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *([(b"www-authenticate", b"Bearer")] if refusal.status == 401 else []),
        *([(b"retry-after", b"1")] if refusal.status == 503 else []),
        _CLOSE,
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while taken < _LINGER_BYTES_MAX:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _closing(send: asgi.Send) -> asgi.Send:
    """`send`, with every answer the connection's last."""

    async def send_last(message: asgi.Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), _CLOSE]}
        await send(message)

    return send_last


def _closing_on_error(send: asgi.Send) -> asgi.Send:
    """`send`, which closes the connection after an answer to a body that was not read to its end."""

    async def send_on(message: asgi.Message) -> None:
        if message["type"] == "http.response.start" and message["status"] in (408, 413):
            message = {**message, "headers": [*message.get("headers", []), _CLOSE]}
        await send(message)

    return send_on
