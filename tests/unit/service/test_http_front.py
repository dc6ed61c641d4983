"""Health is answered before the application; everything else reaches it, however it is cut."""

import asyncio
import contextlib

import pytest

from excimer.service.health import Health
from excimer.service.http import create_app, serving_http
from excimer.service.http_front import is_health_request
from excimer.service.metrics import new_registry

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
OTHER = b"GET /healthz?x=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def _answer(request: bytes, piece: int) -> bytes:
    health = Health("test", ready=True)
    app = create_app("test", "1", health, new_registry("test", "1"), verifier=None)
    async with serving_http(app, "127.0.0.1:0", "test") as address:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        for start in range(0, len(request), piece):
            writer.write(request[start : start + piece])
            await writer.drain()
            await asyncio.sleep(0)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    return answer


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(("request_", "is_of_application"), [(HEALTH, False), (OTHER, True)])
def test_a_request_in_pieces(request_: bytes, piece: int, is_of_application: bool) -> None:
    """Only the application's server says who it is."""
    answer = asyncio.run(_answer(request_, piece))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"service":"test"' in answer.replace(b" ", b"")
    assert (b"server: uvicorn" in answer) == is_of_application


def test_a_connection_that_says_nothing_does_not_hold_up_the_end() -> None:
    async def story() -> None:
        app = create_app("test", "1", Health("test"), new_registry("test", "1"), verifier=None)
        async with serving_http(app, "127.0.0.1:0", "test") as address:
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(HEALTH[:5])
            await writer.drain()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()

    asyncio.run(story())


@pytest.mark.parametrize("end", range(len(b"GET /healthz HTTP/1.1\r\n") + 1))
def test_every_beginning_of_it_may_become_it(end: int) -> None:
    assert is_health_request(HEALTH[:end])
    assert not is_health_request(HEALTH[:end] + b"\0") or end == len(b"GET /healthz HTTP/1.1\r\n")
