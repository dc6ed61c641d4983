"""HTTP requests are bounded and authenticated before their body is read, on real sockets."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import pytest
from fastapi import Body, Request
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry

from excimer.base.address import Address
from excimer.service import http_guard
from excimer.service.connections import ConnectionLimits
from excimer.service.health import Health
from excimer.service.http import create_app, serving_http
from excimer.service.http_client import HttpClient
from excimer.service.http_guard import RequestLimits
from excimer.service.light_http import serving_light_http
from excimer.wire.auth import Right, TokenVerifier, generate_key_pair
from tests.kit.tokens import make_token

KEYS = generate_key_pair()
TOKEN = make_token(KEYS, Right.MANAGE)
BEARER = f"Authorization: Bearer {TOKEN}\r\n".encode()
LONG_PARTS = 256
"""16 MiB: more than the sockets of both sides hold."""
answers_ended: list[float] = []
LIMITS = RequestLimits(head_bytes_max=2000, body_bytes_max=1000, body_s=0.3)


@asynccontextmanager
async def server(
    connections: ConnectionLimits | None = None, limits: RequestLimits = LIMITS
) -> AsyncIterator[Address]:
    app = create_app(
        "test",
        "1",
        Health("test", ready=True),
        CollectorRegistry(),
        verifier=TokenVerifier(KEYS.public_pem),
        is_stream=lambda method, path: path == "/v1/stream",
        limits=limits,
    )

    @app.post("/v1/length")
    async def length(body: Annotated[dict[str, str], Body()]) -> int:
        return len(body["text"])

    @app.post("/v1/stream")
    async def stream(request: Request) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    @app.get("/v1/long")
    async def long() -> StreamingResponse:
        return StreamingResponse(parts())

    async def parts() -> AsyncIterator[bytes]:
        try:
            for _ in range(LONG_PARTS):
                yield bytes(1 << 16)
        finally:
            answers_ended.append(time.monotonic())

    async with serving_http(app, "127.0.0.1:0", "test http_listen", connections) as address:
        yield address


async def exchange(address: Address, *parts: bytes) -> tuple[int, bytes, int]:
    """The answer's status and body up to the end of the connection, and how many bytes it took from us."""
    reader, writer = await asyncio.open_connection(*address)
    sent = 0
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            sent += len(part)
            if reader._buffer:  # type: ignore[attr-defined]
                break
    except ConnectionError:
        pass
    answer = b""
    try:
        async with asyncio.timeout(30):
            while data := await reader.read(1 << 16):
                answer += data
    except ConnectionError:  # a reset, behind what had come
        answer += bytes(reader._buffer)  # type: ignore[attr-defined]
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body, sent


def post(path: str, body_size: int, extra: bytes = BEARER) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {body_size}\r\n".encode()
    return head + b"Content-Type: application/json\r\n" + extra + b"\r\n"


@pytest.mark.parametrize("extra", [b"", b"Authorization: Bearer nonsense\r\n", b"Authorization: Basic x\r\n"])
@pytest.mark.parametrize("path", ["/v1/length", "/v1/stream", "/nowhere"])
def test_a_stranger_is_refused_before_its_body_is_read(path: str, extra: bytes) -> None:
    async def main() -> None:
        async with server() as address:
            chunk = bytes(1 << 16)
            status, body, sent = await exchange(address, post(path, 64 << 20, extra), *[chunk] * 1024)
            assert (status, json.loads(body)["error"]) == (401, "unauthorized")
            # what fits into the sockets' own buffers has left us; the server has not asked for it
            assert sent < 16 << 20
            status, _, _ = await exchange(address, post(path, 64 << 20, extra))
            assert status == 401

    asyncio.run(main())


def test_bodies_are_bounded() -> None:
    async def main() -> None:
        async with server() as address:
            for declared in (post("/v1/length", 1001), post("/v1/length", 10**15)):
                status, body, _ = await exchange(address, declared)
                assert (status, json.loads(body)["kind"]) == (413, "BodyTooLargeError")
            chunked = post("/v1/length", 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            chunks = [b"3e8\r\n" + b"a" * 1000 + b"\r\n"] * 3
            status, body, _ = await exchange(address, chunked, *chunks)
            assert (status, json.loads(body)["error"]) == (413, "refused")
            good = json.dumps({"text": "a" * 900}).encode()
            closing = BEARER + b"Connection: close\r\n"
            status, body, _ = await exchange(address, post("/v1/length", len(good), closing), good)
            assert (status, body) == (200, b"900")
            status, body, _ = await exchange(address, post("/v1/stream", 10**6, closing), bytes(10**6))
            assert (status, body) == (200, b"1000000")

    asyncio.run(main())


def test_a_body_has_one_deadline_however_slowly_it_drips() -> None:
    async def main() -> None:
        async with server() as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(post("/v1/length", 900))
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while not reader._buffer and time.monotonic() - started < 20:  # type: ignore[attr-defined]
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            assert time.monotonic() - started < 10
            assert bytes(reader._buffer).startswith(b"HTTP/1.1 408")  # type: ignore[attr-defined]
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("started", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: b"])
def test_headers_have_one_deadline(started: bytes) -> None:
    async def main() -> None:
        async with server(ConnectionLimits(handshake_s=0.2)) as address:
            before = time.monotonic()
            status, _, _ = await exchange(address, started)
            assert status == 0
            assert 0.1 < time.monotonic() - before < 10

    asyncio.run(main())


def test_headers_are_bounded() -> None:
    async def main() -> None:
        async with server() as address:
            for extra in (b"A: " + b"a" * 2000 + b"\r\n", b"A: b\r\n" * 90 + b"C: " + b"c" * 1500 + b"\r\n"):
                status, body, _ = await exchange(address, post("/v1/length", 0, BEARER + extra))
                assert (status, json.loads(body)["kind"]) == (431, "HeadTooLargeError")
            status, _, _ = await exchange(address, post("/v1/length", 0, b"A: " + b"a" * 10**6))
            assert status in (400, 0)
            assert (await HttpClient("x", str(address)).get("/healthz"))["status"] == "ok"

    asyncio.run(main())


def test_strangers_do_not_keep_others_from_the_port() -> None:
    async def main() -> None:
        async with server(ConnectionLimits(waiting_max=4)) as address:
            crowd = [await asyncio.open_connection(*address) for _ in range(50)]
            length = await HttpClient("x", str(address), TOKEN).post("/v1/length", {"text": "abc"})
            assert length == 3
            assert (await HttpClient("x", str(address)).get("/healthz"))["status"] == "ok"
            for _, writer in crowd:
                writer.close()

    asyncio.run(main())


def test_an_authenticated_connection_may_ask_again_but_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_guard, "KEEP_ALIVE_S", 0.3)

    async def main() -> None:
        async with server() as address:
            reader, writer = await asyncio.open_connection(*address)
            body = json.dumps({"text": "abc"}).encode()
            for _ in range(3):
                writer.write(post("/v1/length", len(body)) + body)
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                assert await reader.readexactly(1) == b"3"
            writer.write(b"POST /v1/le")
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            assert time.monotonic() - started < 10
            writer.close()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 30)
            assert answer.startswith(b"HTTP/1.1 200"), "an open path's answer is the connection's last"
            writer.close()

    asyncio.run(main())


def test_a_request_may_take_longer_than_a_proof() -> None:
    async def main() -> None:
        async with server(ConnectionLimits(handshake_s=0.1)) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(post("/v1/stream", 4, BEARER + b"Connection: close\r\n"))
            for _ in range(4):
                await asyncio.sleep(0.1)
                writer.write(b"x")
            assert (await asyncio.wait_for(reader.read(), 30)).endswith(b"\r\n\r\n4")
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("is_light", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_random_bytes(seed: int, is_light: bool) -> None:
    chance = random.Random(seed)
    health = Health("test", ready=True)

    async def main() -> None:
        light = serving_light_http("127.0.0.1:0", health, lambda: b"", ConnectionLimits(handshake_s=2))
        async with light if is_light else server(ConnectionLimits(handshake_s=2)) as address:
            good = post("/v1/length", 5) + b'{"a":'
            for _ in range(30):
                data = bytearray(good if chance.random() < 0.7 else chance.randbytes(300))
                for _ in range(chance.randrange(4)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                reader, writer = await asyncio.open_connection(*address)
                writer.write(data[: chance.randrange(len(data) + 1)])
                writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    answer = await asyncio.wait_for(reader.read(), 30)
                    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
                writer.close()
            assert (await HttpClient("x", str(address)).get("/healthz"))["status"] == "ok"

    asyncio.run(main())


def test_an_answer_that_is_not_read_does_not_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has a token may read slowly, but not a byte a minute: what makes the answer ends, and its place
    is free for others."""

    async def main() -> None:
        limits = ConnectionLimits(authenticated_max=1, read_s=0.5)
        async with server(limits) as address:
            answers_ended.clear()
            reader, writer = await asyncio.open_connection(*address, limit=1024)
            writer.write(b"GET /v1/long HTTP/1.1\r\nHost: x\r\n" + BEARER + b"\r\n")
            assert await reader.readexactly(8) == b"HTTP/1.1"
            async with asyncio.timeout(60):
                while not answers_ended:
                    await reader.read(1)
                    await asyncio.sleep(0.05)
            head = b"POST /v1/length HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 12\r\n"
            head += b"Content-Type: application/json\r\n"
            status, _, _ = await exchange(address, head + BEARER + b'\r\n{"text":"x"}')
            assert status == 200
            writer.close()

    asyncio.run(main())
    assert "its answer is not read" in capsys.readouterr().err


def test_an_answer_that_is_read_slowly_but_steadily_comes_whole() -> None:
    limit_s = 5.0

    async def main() -> None:
        async with server(ConnectionLimits(read_s=limit_s)) as address:
            reader, writer = await asyncio.open_connection(*address, limit=1 << 16)
            started = time.monotonic()
            writer.write(b"GET /v1/long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + BEARER + b"\r\n")
            received, pauses = 0, 0
            while part := await reader.read(1 << 16):
                received += len(part)
                if received >> 20 > pauses:  # every MiB, of more than 16
                    pauses += 1
                    await asyncio.sleep(limit_s / 14)
            assert received > LONG_PARTS << 16
            assert time.monotonic() - started > limit_s, "as a whole it took longer than one part may"
            writer.close()

    asyncio.run(main())
