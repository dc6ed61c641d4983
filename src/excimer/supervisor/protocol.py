"""Requests to a supervisor: one per connection of its Unix socket, JSON both ways, each ended by end of file.

::

    client  {"type": "start", "part": "controller", …}
    server  {"type": "started", "pid": 4711, …}

The socket lies in `run/`, which is closed to other users; whoever can open it can start any module as us. Its
path may be longer than the 107 bytes that a socket's address holds, so it is reached through the directory.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

SOCKET_NAME: Final = "supervisor.sock"
MESSAGE_SIZE_MAX: Final = 4 << 20
"""An environment may have 2 MiB, and base64 makes 2.7 of them."""
_READ_SIZE_BYTES: Final = 1 << 16


class StartPart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="start"):
    """Start a part unless it runs; either way watch it from now on."""

    part: str
    module: str
    """Whose `__main__` it runs, with the path of its settings as the only argument."""
    lock_dir: Path
    log_path: Path
    environment: tuple[tuple[bytes, bytes], ...]
    """Names and values: they need not be text."""
    is_restarted: bool
    """Whether it comes back when it dies."""


class ForgetPart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="forget"):
    """It is going to be stopped: what becomes of it is no longer the supervisor's business."""

    part: str


class ReadParts(msgspec.Struct, frozen=True, tag_field="type", tag="parts"):
    """How are all that are watched?"""


Request: TypeAlias = StartPart | ForgetPart | ReadParts


class Started(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="started"):
    pid: int
    is_new: bool
    """False: it ran already."""
    log_start: int
    """Where in its log the words of a new process begin."""


class WatchedPart(msgspec.Struct, frozen=True, kw_only=True):
    pid: int | None
    """None: it does not run."""
    restarts: int = 0
    """Since a person started it."""
    last_end: str = ""
    """How its last process ended, as ``died of SIGKILL``; empty if none has."""
    last_exit_code: int | None = None
    is_awaited: bool = False
    """It does not run and is going to be started again."""


class Parts(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="parts"):
    parts: dict[str, WatchedPart]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="failed"):
    reason: str


Answer: TypeAlias = Started | Parts | Failed


@contextlib.contextmanager
def socket_address(run_dir: Path) -> Iterator[str]:
    """An address of the socket that is short enough, while the block runs. Raises OSError."""
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{SOCKET_NAME}"
    finally:
        os.close(directory)


def ask(run_dir: Path, request: Request, limit_s: float) -> Answer:
    """Asks the supervisor. Blocks up to `limit_s` at each step. Raises OSError (it does not run, it is slow,
    it ended meanwhile), `msgspec.DecodeError` for an answer that is none.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, socket_address(run_dir) as address:
        connection.settimeout(limit_s)
        connection.connect(address)
        connection.sendall(msgspec.json.encode(request, enc_hook=str))
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(_READ_SIZE_BYTES), b""))
    if not answer:
        raise ConnectionResetError("the supervisor ended while it was asked")
    decoded: Answer = msgspec.json.decode(answer, type=Answer)
    return decoded


def receive(connection: socket.socket, limit_s: float) -> Request:
    """Reads one request to its end, for up to `limit_s`. Raises OSError, `msgspec.DecodeError`."""
    content = bytearray()
    deadline = time.monotonic() + limit_s
    while True:
        connection.settimeout(max(1e-3, deadline - time.monotonic()))
        data = connection.recv(_READ_SIZE_BYTES)
        if not data:
            return _decode(content)
        content += data
        if len(content) > MESSAGE_SIZE_MAX:
            raise msgspec.DecodeError("a request is too long")


def _decode(content: bytearray) -> Request:
    """Raises `msgspec.DecodeError` and nothing else: the supervisor outlives whatever is sent to it."""
    try:
        request: Request = msgspec.json.decode(
            content, type=Request, dec_hook=lambda kind, value: kind(value)
        )
        _check(request)
    except msgspec.DecodeError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, nested too deep, or as `_check` says
        raise msgspec.DecodeError(f"a request makes no sense: {error}") from error
    return request


def _check(request: Request) -> None:
    """Raises ValueError for names and variables that no file or process can have."""
    if isinstance(request, ReadParts):
        return
    names = [request.part]
    if isinstance(request, StartPart):
        names += [request.module, str(request.lock_dir), str(request.log_path)]
        for name, value in request.environment:
            if not name or b"=" in name or b"\0" in name + value:
                raise ValueError(f"{name!r} cannot be a variable of an environment")
    if any("\0" in name for name in names):
        raise ValueError("a name has a zero byte")
