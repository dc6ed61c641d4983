"""A small HTTP client on h11, JSON but for `get_bytes` and `put_bytes`, for services that call each other.

One connection per call: these are management calls, a few per second at most. Failures become
the error families: unreachable, timeouts and 5xx are `UnreachableError` / `RemoteBusyError`
(retryable), 404 `NotFoundError`, 409 `ConflictError`, other 4xx `RemoteRefusedError`, each with
the remote's own sentence and the name of who said it.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode

import h11
import msgspec

from excimer.base.address import parse_address
from excimer.base.errors import ConflictError, ExcimerError, NotFoundError, RefusedError, RetryableError
from excimer.service.tls import client_tls

READ_SIZE_BYTES: Final = 64 * 1024
ANSWER_SIZE_MAX: Final = 64 * 1024 * 1024


class UnreachableError(RetryableError):
    """No answer from a service: it is down, starting, or the network is."""


class RemoteBusyError(RetryableError):
    """A service answered that it cannot do this now."""


class RemoteRefusedError(RefusedError):
    """A service refused a request as it is."""


@dataclass(frozen=True, slots=True)
class HttpClient:
    """Calls one service. `service` is how it is named in messages, like ``pageserver 1``."""

    service: str
    address: str
    token: str = ""
    timeout_s: float = 30.0
    is_plain: bool = False
    """To a program of our own on this machine, which has no TLS although all services have."""

    async def get(self, path: str, query: dict[str, str] | None = None) -> Any:
        """The decoded JSON answer (None when empty); so for all calls."""
        return await self.call("GET", path + ("?" + urlencode(query) if query else ""))

    async def post(self, path: str, body: object = None) -> Any:
        return await self.call("POST", path, body)

    async def delete(self, path: str) -> Any:
        return await self.call("DELETE", path)

    async def call(self, method: str, target: str, body: object = None) -> Any:
        """One request. Raises the errors named above."""
        payload = None if body is None else msgspec.json.encode(body)
        answer = await self._call(method, target, payload, "application/json")
        return msgspec.json.decode(answer) if answer else None

    async def get_bytes(self, path: str) -> bytes:
        """An answer that is not JSON."""
        return await self._call("GET", path, None, "")

    async def post_for_bytes(self, path: str) -> bytes:
        """The same of a request that changes something."""
        return await self._call("POST", path, None, "")

    async def look(self, path: str) -> tuple[int, bytes]:
        """Status and body of an answer, whatever the status. Raises `UnreachableError`."""
        return await self._reach("GET", path, None, "")

    async def put_bytes(self, path: str, body: bytes) -> None:
        """A body that is not JSON."""
        await self._call("PUT", path, body, "application/octet-stream")

    async def _call(self, method: str, target: str, payload: bytes | None, media_type: str) -> bytes:
        status, answer = await self._reach(method, target, payload, media_type)
        if 200 <= status < 300:
            return answer
        raise _error_of(status, f"{self.service}: {_message_of(status, answer)}")

    async def _reach(
        self, method: str, target: str, payload: bytes | None, media_type: str
    ) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                return await self._exchange(method, target, payload, media_type)
        except (
            OSError,
            EOFError,
            h11.ProtocolError,
        ) as error:  # a TimeoutError is of the limit, or ETIMEDOUT
            if limit.expired():
                raise UnreachableError(
                    f"{self.service} did not answer within {self.timeout_s:g} s"
                ) from error
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreachableError(
                f"{self.service} is not reachable at {self.address}: {_plain_reason(reason)}"
            ) from error

    async def _exchange(
        self, method: str, target: str, payload: bytes | None = None, media_type: str = ""
    ) -> tuple[int, bytes]:
        host, port = parse_address(self.address)
        context = None if self.is_plain else client_tls()
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        try:
            connection = h11.Connection(h11.CLIENT)
            content_length = len(payload) if payload is not None else 0
            headers = [
                ("host", self.address),
                ("connection", "close"),
                ("content-length", str(content_length)),
            ]
            if payload is not None:
                headers.append(("content-type", media_type))
            if self.token:
                headers.append(("authorization", f"Bearer {self.token}"))
            head = connection.send(h11.Request(method=method, target=target, headers=headers))
            writer.write(head or b"")
            if payload:
                writer.write(connection.send(h11.Data(data=payload)) or b"")
            writer.write(connection.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            return await _read_answer(connection, reader)
        finally:
            writer.close()


async def _read_answer(connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[int, bytes]:
    status = 0
    parts: list[bytes] = []
    size = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(READ_SIZE_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            parts.append(bytes(event.data))
            size += len(event.data)
            if size > ANSWER_SIZE_MAX:
                raise EOFError(f"the answer is longer than {ANSWER_SIZE_MAX} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return status, b"".join(parts)
        elif isinstance(event, h11.ConnectionClosed):
            raise EOFError("the connection was closed before the answer")


def path_of(*parts: str) -> str:
    """``path_of("v1", "tenant", name)`` -> ``/v1/tenant/name``, each part quoted."""
    return "".join("/" + quote(part, safe="") for part in parts)


def _plain_reason(reason: str) -> str:
    """``Multiple exceptions: [Errno 111] Connect call failed …`` is asyncio's, not a person's, sentence."""
    return "connection refused" if "Connect call failed" in reason else reason


def _message_of(status: int, answer: bytes) -> str:
    try:
        message = msgspec.json.decode(answer)["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        text = answer.decode("utf-8", "replace").strip()
        return text.splitlines()[0][:500] if text else f"HTTP status {status}"
    return str(message)


def _error_of(status: int, message: str) -> ExcimerError:
    if status >= 500:
        return RemoteBusyError(message)
    if status == 404:
        return NotFoundError(message)
    if status == 409:
        return ConflictError(message)
    return RemoteRefusedError(message)
