"""Both HTTP servers and the client: health, metrics, errors over the wire, tokens, bad input."""

import asyncio
import errno
import linecache
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI

from excimer.base.address import Address, InvalidAddressError, parse_address
from excimer.base.errors import (
    ConflictError,
    CorruptionError,
    ExcimerError,
    FencedError,
    NotFoundError,
    RefusedError,
    RetryableError,
)
from excimer.base.ids import TenantId
from excimer.service.health import HTTP_OK, Health
from excimer.service.http import bearer_auth, complete_routes, create_app, serving_http
from excimer.service.http_client import (
    HttpClient,
    RemoteBusyError,
    RemoteRefusedError,
    UnreachableError,
    path_of,
)
from excimer.service.light_http import serving_light_http
from excimer.service.listen import ListenError, bind_listen, bound_address
from excimer.service.metrics import new_registry
from excimer.service.plain_metrics import PlainMetric, render_plain
from excimer.service.tasks import SystemClock
from excimer.wire.auth import Right, TokenVerifier, generate_key_pair
from tests.kit.tokens import make_token

TENANT = TenantId("ab" * 16)
KEYS = generate_key_pair()
TOKEN = make_token(KEYS, Right.MANAGE)
ERRORS: dict[str, ExcimerError] = {
    "refused": RefusedError("no such option"),
    "missing": NotFoundError("no tenant x"),
    "conflict": ConflictError("name taken"),
    "busy": RetryableError("later"),
    "fenced": FencedError("newer generation"),
    "corrupt": CorruptionError("bad layer"),
}


@asynccontextmanager
async def full_server(health: Health) -> AsyncIterator[Address]:
    async with serving_http(make_app(health), "127.0.0.1:0", "test http_listen") as address:
        yield address


def make_app(health: Health) -> FastAPI:
    verifier = TokenVerifier(KEYS.public_pem)
    app = create_app("test", "1", health, new_registry("test", "1"), verifier=verifier)
    admin = Depends(bearer_auth(verifier, SystemClock(), Right.MANAGE))

    @app.get("/v1/fail/{how}")
    async def fail(how: str) -> None:
        raise ERRORS[how]

    @app.get("/v1/disk")
    async def disk() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @app.get("/v1/bug")
    async def bug() -> None:
        raise ZeroDivisionError

    @app.get("/v1/number/{number}")
    async def number(number: int) -> int:
        return number

    @app.get("/v1/secret", dependencies=[admin])
    async def secret() -> str:
        return "gold"

    included = APIRouter(prefix="/v1/included", dependencies=[admin])
    for name in range(30):
        included.get(f"/{name}/{{number}}")(number)
    app.include_router(included)
    return app


@contextmanager
def counting_calls() -> Iterator[list[int]]:
    """Of Python functions, in this thread."""
    calls = [0]

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        calls[0] += event == "call"

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def ask(app: FastAPI, path: str) -> None:
    async def main() -> None:
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            assert (await client.get(path, headers=headers)).status_code == HTTP_OK

    asyncio.run(main())


def test_nothing_is_left_for_the_first_request_of_a_route() -> None:
    """What a process does at its first request, it does not share with those that are forked before."""
    app = make_app(Health("test"))
    ask(make_app(Health("test")), "/v1/included/1/2")  # libraries have beginnings of their own
    complete_routes(app)
    with counting_calls() as first:
        ask(app, "/v1/included/3/4")
    with counting_calls() as later:
        ask(app, "/v1/included/3/4")
    assert first[0] < 1.5 * later[0], (first, later)
    assert __file__ not in linecache.cache


def test_a_token_is_checked_without_a_thread() -> None:
    before = set(threading.enumerate())
    seen: set[threading.Thread] = set()
    app = make_app(Health("test"))

    @app.get(
        "/v1/threads", dependencies=[Depends(bearer_auth(TokenVerifier(KEYS.public_pem), SystemClock()))]
    )
    async def threads() -> None:
        seen.update(threading.enumerate())

    ask(app, "/v1/threads")
    assert seen <= before


def test_error_families_cross_the_wire() -> None:
    expected: dict[str, type[ExcimerError]] = {
        "refused": RemoteRefusedError,
        "missing": NotFoundError,
        "conflict": ConflictError,
        "busy": RemoteBusyError,
        "fenced": RemoteRefusedError,
        "corrupt": RemoteBusyError,
    }

    async def main() -> None:
        async with full_server(Health("test")) as address:
            client = HttpClient("pageserver 1", str(address), TOKEN)
            for how, kind in expected.items():
                with pytest.raises(kind, match=f"pageserver 1: {ERRORS[how]}"):
                    await client.get(f"/v1/fail/{how}")
            with pytest.raises(RemoteBusyError, match="pageserver 1: No space left on device"):
                await client.get("/v1/disk")
            with pytest.raises(RemoteBusyError, match="pageserver 1: an unexpected ZeroDivisionError"):
                await client.get("/v1/bug")
            with pytest.raises(RemoteRefusedError, match=r"number: .*valid integer"):
                await client.get("/v1/number/x")
            with pytest.raises(NotFoundError, match="GET /nowhere: Not Found"):
                await client.get("/nowhere")

    asyncio.run(main())


def test_tokens() -> None:
    async def main() -> None:
        async with full_server(Health("test")) as address:
            token = make_token(KEYS, Right.MANAGE)
            assert await HttpClient("p", str(address), token).get("/v1/secret") == "gold"
            reader = make_token(KEYS, Right.READ_PAGES, Right.READ_WAL)
            of_a_tenant = make_token(KEYS, Right.MANAGE, tenant_id=TENANT)
            foreign = make_token(generate_key_pair(), Right.MANAGE)
            for token, problem in (
                ("", "needs a token"),
                (foreign, "not one of this"),
                (reader, "does not have the right manage"),
                (of_a_tenant, "all of them"),
            ):
                with pytest.raises(RemoteRefusedError, match=problem):
                    await HttpClient("p", str(address), token).get("/v1/secret")

    asyncio.run(main())


def test_health_and_metrics_on_both_servers() -> None:
    async def check(address: Address, health: Health) -> None:
        client = HttpClient("x", str(address))
        with pytest.raises(RemoteBusyError):
            await client.get("/healthz")
        health.ready = True
        assert (await client.get("/healthz"))["status"] == "ok"
        health.report("disk", "it is full")
        with pytest.raises(RemoteBusyError):
            await client.get("/healthz")
        _, body = await client._exchange("GET", "/metrics", None)
        assert b"# TYPE" in body
        assert b"excimer_" in body

    async def main() -> None:
        health = Health("full")
        async with full_server(health) as address:
            await check(address, health)
        health = Health("light")
        metrics = render_plain([PlainMetric("excimer_x", "gauge", 'a "b"', 1.5, {"name": 'a"\n\\b'})])
        assert metrics == (
            b'# HELP excimer_x a \\"b\\"\n# TYPE excimer_x gauge\n' + b'excimer_x{name="a\\"\\n\\\\b"} 1.5\n'
        )
        async with serving_light_http("127.0.0.1:0", health, lambda: metrics) as address:
            await check(address, health)
            with pytest.raises(NotFoundError):
                await HttpClient("x", str(address)).get("/other")
            with pytest.raises(RemoteRefusedError, match="only GET"):
                await HttpClient("x", str(address)).post("/healthz")

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent", [b"\x00" * 100, b"GET /" + b"a" * 70_000, b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"]
)
def test_light_server_survives_bad_input(sent: bytes) -> None:
    async def main() -> None:
        health = Health("light", ready=True)
        async with serving_light_http("127.0.0.1:0", health, lambda: b"") as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(sent)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 30)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
            writer.close()
            assert (await HttpClient("x", str(address)).get("/healthz"))["status"] == "ok"

    asyncio.run(main())


def test_unreachable_and_silent_services() -> None:
    async def main() -> None:
        silent = bind_listen("127.0.0.1:0", "silent")
        address = bound_address(silent)
        with pytest.raises(UnreachableError, match=r"did not answer within 0\.1 s"):
            await HttpClient("safekeeper 2", str(address), timeout_s=0.1).get("/")
        silent.close()
        with pytest.raises(
            UnreachableError, match=r"safekeeper 2 is not reachable at .*: connection refused"
        ):
            await HttpClient("safekeeper 2", str(address)).get("/")

    asyncio.run(main())


def test_a_taken_port_is_named() -> None:
    taken = bind_listen("127.0.0.1:0", "first")
    port = bound_address(taken).port
    with pytest.raises(ListenError, match=f"pageserver http_listen: port {port} of 127.0.0.1 is taken"):
        bind_listen(f"127.0.0.1:{port}", "pageserver http_listen")
    taken.close()


@pytest.mark.parametrize("text", ["", "127.0.0.1", "127.0.0.1:", "h:65536", "h:-1", "h:٣"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(InvalidAddressError, match="is not an address"):
        parse_address(text)


def test_paths_are_quoted() -> None:
    assert parse_address("[::1]:80") == Address("::1", 80)
    assert str(Address("::1", 80)) == "[::1]:80"
    assert path_of("v1", "a/b c") == "/v1/a%2Fb%20c"
