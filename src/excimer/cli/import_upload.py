"""Sends an import stream to a pageserver: one chunked POST whose answer may come before its end.

A pageserver that refuses says so at once; then no more is sent. If anything fails here, the connection is
closed, which is what tells the pageserver that nothing is to be kept.

Not here: what is sent (`import_source`).
"""

import http.client
import json
import select
from collections.abc import Callable, Iterable
from typing import Any, Final

from excimer.base.errors import ConflictError, NotFoundError, RefusedError, RetryableError
from excimer.service.blocking_http import http_connection

SILENCE_S: Final = 3600.0
"""Longest wait for the pageserver to take, or answer, anything: it may be sorting."""


class PageserverLostError(RetryableError):
    """The pageserver went away, or cannot take the import now."""


def upload(
    address: str, path: str, token: str, frames: Iterable[bytes], on_sent: Callable[[int], None]
) -> dict[str, Any]:
    """The pageserver's answer. `on_sent` is told the size of each frame. Raises RefusedError,
    `PageserverLostError`, and what `frames` does.
    """
    connection = http_connection(address, SILENCE_S)
    try:
        connection.putrequest("POST", path)
        connection.putheader("Authorization", f"Bearer {token}")
        connection.putheader("Content-Type", "application/octet-stream")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        _send(connection, frames, on_sent)
        answer = connection.getresponse()
        return _result(answer.status, answer.read())
    except (OSError, http.client.HTTPException) as error:
        raise PageserverLostError(f"the connection to the pageserver at {address} broke: {error}") from error
    finally:
        connection.close()


def _send(
    connection: http.client.HTTPConnection, frames: Iterable[bytes], on_sent: Callable[[int], None]
) -> None:
    for frame in frames:
        if select.select([connection.sock], [], [], 0)[0]:
            return  # it has answered already
        try:
            connection.send(b"%x\r\n" % len(frame) + frame + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return  # what it said before it closed can still be read
        on_sent(len(frame))
    connection.send(b"0\r\n\r\n")


def _result(status: int, content: bytes) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise PageserverLostError(f"the pageserver answered with status {status} and no JSON") from error
    if 200 <= status < 300:
        return value
    message = str(value.get("message", f"HTTP status {status}"))
    kinds: dict[int, type[Exception]] = {404: NotFoundError, 409: ConflictError}
    if status >= 500:
        raise PageserverLostError(message)
    raise kinds.get(status, RefusedError)(message)
