"""HTTP for services: FastAPI under uvicorn, with everything that all of them share.

An app of `create_app` has `/healthz`, `/metrics`, `/openapi.json`, `/docs`, request metrics and
log context, and turns the error families into answers by `error_answers`. Before all of it stands
`http_guard`. uvicorn speaks HTTP; connections come from `accept`, as at every port.

Importing this module takes over half a second; processes in a user's wake-up path use
`light_http`.

Not here: routes.
"""

import asyncio
import contextlib
import linecache
import secrets
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from email.utils import formatdate
from typing import Any, Final

import fastapi.routing
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette import types as asgi
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from excimer.base.address import Address
from excimer.base.clock import Clock
from excimer.base.errors import ExcimerError
from excimer.base.ids import parse_tenant_id, parse_timeline_id
from excimer.service import metrics
from excimer.service.accept import accept_connections, serve_protocol
from excimer.service.bearer import verify_bearer
from excimer.service.connections import Admission, ConnectionGate, ConnectionLimits, process_limits
from excimer.service.error_answers import HTTP_UNAUTHORIZED, status_of
from excimer.service.health import Health
from excimer.service.http_front import FirstRequest
from excimer.service.http_guard import (
    ADMISSION,
    CLAIMS,
    KEEP_ALIVE_S,
    RequestGuard,
    RequestLimits,
)
from excimer.service.listen import bind_listen, bound_address
from excimer.service.logs import get_logger, log_context
from excimer.service.tasks import SystemClock, TaskScope
from excimer.wire.auth import Claims, Resource, Right, TokenVerifier, authorize

STOP_LIMIT_S: Final = 2

log = get_logger(__name__)


def bearer_auth(
    verifier: TokenVerifier, clock: Clock, right: Right | None = None
) -> Callable[[Request], Awaitable[Claims]]:
    """A FastAPI dependency that gives the claims of the request's bearer token.

    A missing or bad token is answered with 401; one that lacks `right` on what the path names
    (`path_resource`) with 403. Without `right` any valid token passes, and the route authorizes by
    itself. Use as ``app.include_router(router, dependencies=[Depends(bearer_auth(…))])``.
    """

    async def authenticate(request: Request) -> Claims:
        claims: Claims | None = getattr(request.state, CLAIMS, None)
        if claims is None:
            claims = verify_bearer(request.headers.get("authorization", ""), verifier, clock.now())
        if right is not None:
            authorize(claims, right, path_resource(request))
        return claims

    return authenticate


def path_resource(request: Request) -> Resource:
    """What a path with ``{tenant_id}``, or with ``{timeline_id}`` too, names; without them everything.

    Raises `InvalidIdError`.
    """
    tenant, timeline = (request.path_params.get(name) for name in ("tenant_id", "timeline_id"))
    return Resource(
        None if tenant is None else parse_tenant_id(tenant),
        None if timeline is None else parse_timeline_id(timeline),
    )


def no_stream(_method: str, _path: str) -> bool:
    return False


def create_app(
    title: str,
    version: str,
    health: Health,
    registry: CollectorRegistry,
    *,
    verifier: TokenVerifier | None,
    is_stream: Callable[[str, str], bool] = no_stream,
    limits: RequestLimits | None = None,
) -> FastAPI:
    """An app with the shared endpoints and error answers; the service adds its routers.

    Whatever is not a shared endpoint needs a token that `verifier` accepts, before its body is read; None is
    for an app that nobody else can reach. `is_stream(method, path)` names requests whose body has no bound.
    """
    app = FastAPI(title=title, version=version, redoc_url=None)
    app.state.health = health
    app.add_exception_handler(ExcimerError, _answer_error)
    app.add_exception_handler(OSError, _answer_os_error)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_middleware(
        RequestGuard,
        verifier=verifier,
        clock=SystemClock(),
        limits=limits or RequestLimits(),
        is_stream=is_stream,
    )
    app.add_middleware(_RequestObserver, registry=registry)

    @app.get("/healthz", tags=["process"], summary="Whether the service is up and well")
    async def healthz() -> Response:
        status, body = health.answer()
        return Response(body, status, media_type="application/json")

    @app.get("/metrics", tags=["process"], summary="Prometheus metrics")
    async def read_metrics() -> Response:
        return Response(metrics.render(registry), media_type=metrics.CONTENT_TYPE)

    return app


def complete_routes(app: FastAPI) -> None:
    """Does what FastAPI leaves to the first request at all, and to the first one of each route.

    It completes what `include_router` added when it first looks at it: 45,000 calls for the controller. To
    name a route's function in errors it reads the file that the function is in, which would stay in memory.
    """
    each_route: Callable[[Any], Iterable[Any]] = getattr(fastapi.routing, "iter_route_contexts", iter)
    locate = getattr(fastapi.routing, "_extract_endpoint_context", lambda _: None)
    for route in each_route(app.routes):
        locate(route.endpoint)
    linecache.clearcache()


@contextlib.asynccontextmanager
async def serving_http(
    app: FastAPI, listen: str, what: str, limits: ConnectionLimits | None = None
) -> AsyncIterator[Address]:
    """Serves `app` while the block runs; yields the address once requests are answered.

    Raises `ListenError` before anything else happens if the port is taken. Leaving the block lets
    running requests finish for `STOP_LIMIT_S`.
    """
    bound = bind_listen(listen, what)
    gate = ConnectionGate(what, process_limits(limits))
    async with TaskScope() as scope:
        server = _Server(app, scope)
        accepting = scope.start(f"accept {what}", accept_connections(bound, gate, server.accepted))
        try:
            yield bound_address(bound)
        finally:
            accepting.cancel()
            await asyncio.wait([accepting])
            bound.close()
            await server.end()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, for the process belongs to `process_main`, and without its way to
    accept connections: descriptors that run out, and strangers in thousands, are `accept`'s business. It
    begins with the first request that `http_front` does not answer.
    """

    def __init__(self, app: FastAPI, scope: TaskScope) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_LIMIT_S,
        )
        super().__init__(config)
        self.servers = []
        self._health: Health = app.state.health
        self._scope = scope
        self._serving: asyncio.Task[None] | None = None
        self._waiting: weakref.WeakSet[FirstRequest] = weakref.WeakSet()

    def accepted(self, admission: Admission) -> None:
        first = FirstRequest(admission, self._health, self._begin_application)
        self._waiting.add(first)
        self._scope.contain("http connection", serve_protocol(admission, first))

    def _begin_application(self, admission: Admission) -> asyncio.Protocol:
        if self._serving is None:
            self.config.load()
            self.lifespan = self.config.lifespan_class(self.config)
            date = (b"date", formatdate(usegmt=True).encode())
            self.server_state.default_headers = [date, *self.config.encoded_headers]
            self._serving = self._scope.start("http", self._serve())
        return _HttpConnection(self.config, self.server_state, admission)

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self.main_loop()
        await self.shutdown()

    async def end(self) -> None:
        """Lets running requests finish for `STOP_LIMIT_S`."""
        for waiting in list(self._waiting):
            waiting.abort()
        if self._serving is not None:
            self.should_exit = True
            await asyncio.wait([self._serving], timeout=STOP_LIMIT_S + 1)


class _HttpConnection(H11Protocol):
    """uvicorn's connection, which knows its place at the port and lets its requests know it."""

    def __init__(
        self, config: uvicorn.Config, server_state: uvicorn.server.ServerState, admission: Admission
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state={ADMISSION: admission})
        self._admission = admission
        self._read_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(self._admission.limits.read_s, self._end_slow_reader)

    def resume_writing(self) -> None:
        self._stop_read_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._admission.release()
        super().connection_lost(exc)

    def _end_slow_reader(self) -> None:
        """What is buffered for the peer, and whoever makes more of it, is not kept for ever."""
        log.warning(
            "connection dropped",
            port=self._admission.port,
            reason="its answer is not read",
            limit_s=self._admission.limits.read_s,
        )
        self.transport.abort()

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


class _RequestObserver:
    """Counts and times requests by route, and gives each an id in the log."""

    def __init__(self, app: asgi.ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        labels = ["method", "route"]
        self._seconds = Histogram(
            "excimer_http_request_seconds",
            "Time to answer HTTP requests.",
            labels,
            buckets=metrics.LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._answers = Counter(
            "excimer_http_answers", "HTTP answers by status.", [*labels, "status"], registry=registry
        )

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 500

        async def observe(message: asgi.Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with log_context(request_id=secrets.token_hex(4)):
            try:
                await self._app(scope, receive, observe)
            finally:
                route = getattr(scope.get("route"), "path", "(none)")
                method = scope["method"] if route != "(none)" else "(any)"
                elapsed_s = time.monotonic() - started
                self._seconds.labels(method, route).observe(elapsed_s)
                self._answers.labels(method, route, str(status)).inc()
                log.debug("request", method=method, path=scope["path"], status=status, elapsed_s=elapsed_s)


def _error_answer(status: int, family: str, kind: str, message: str) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else {}
    if status == HTTP_UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": family, "kind": kind, "message": message}, status, headers=headers)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ExcimerError)
    status, family = status_of(error)
    (log.error if status == 500 else log.info)("request failed", path=request.url.path, error=error)
    return _error_answer(status, family, type(error).__name__, str(error))


async def _answer_os_error(request: Request, error: Exception) -> JSONResponse:
    """The machine, not the request, is at fault: a disk that is full, files that are all open."""
    assert isinstance(error, OSError)
    log.error("request failed", path=request.url.path, error=error)
    where = f"{error.filename}: " if error.filename else ""
    return _error_answer(503, "retryable", type(error).__name__, f"{where}{error.strerror or error}")


async def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    """The traceback goes into the log, for the error is raised on."""
    message = f"an unexpected {type(error).__name__}; the log of the service has all about it"
    return _error_answer(500, "error", "UnexpectedError", message)


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return _error_answer(
        400, "refused", "ValidationError", f"{where}: {first['msg']}" if where else first["msg"]
    )


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    family = "not_found" if error.status_code == 404 else "refused"
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error_answer(error.status_code, family, "HTTPException", message)
