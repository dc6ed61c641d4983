"""Addresses to listen on: `host:port` texts and bound sockets, with clear errors.

A port taken by someone else is the most common reason why a service cannot start, so it is
found before anything else is begun, and named.
"""

import errno
import socket
from typing import NamedTuple

from excimer.base.errors import RefusedError

BACKLOG = 128
PORT_MAX = 65535


class ListenError(RefusedError):
    """An address is malformed or cannot be listened on."""


class HostPort(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_host_port(text: str) -> HostPort:
    """`127.0.0.1:5432`, `name:5432`, `[::1]:5432`. Raises `ListenError`."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > PORT_MAX:
        raise ListenError(f"{text!r} is not an address: write host:port, like 127.0.0.1:5432")
    return HostPort(host, int(port))


def bind_listen(listen: str, what: str) -> socket.socket:
    """A listening socket on `listen`; port 0 takes any free one. Raises `ListenError` naming `what`."""
    address = parse_host_port(listen)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ListenError(f"{what}: cannot resolve {listen}: {error.strerror}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(target)
        bound.listen(BACKLOG)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            problem = f"port {address.port} of {address.host} is taken by another program"
        else:
            problem = f"cannot listen on {listen}: {error.strerror}"
        raise ListenError(f"{what}: {problem}") from error
    return bound


def bound_address(bound: socket.socket) -> HostPort:
    """Where a socket listens, with the port that was chosen if it asked for any."""
    host, port = bound.getsockname()[:2]
    return HostPort(host, port)
