"""Addresses to listen on: `host:port` texts and bound sockets, with clear errors.

A port taken by someone else is the most common reason why a service cannot start, so it is
found before anything else is begun, and named.
"""

import errno
import ipaddress
import socket

from excimer.base.address import Address, parse_address
from excimer.base.errors import RefusedError
from excimer.service.tls import has_tls

BACKLOG = 128


class ListenError(RefusedError):
    """An address cannot be listened on."""


def bind_listen(listen: str, what: str, *, is_ours: bool = True) -> socket.socket:
    """A listening socket on `listen`; port 0 takes any free one.

    One that `is_ours` carries tokens, and so has TLS or a loopback address. Raises `InvalidAddressError`, and
    `ListenError` naming `what`.
    """
    address = parse_address(listen)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ListenError(f"{what}: cannot resolve {listen}: {error.strerror}") from error
    if is_ours and not has_tls() and not ipaddress.ip_address(target[0]).is_loopback:
        raise ListenError(
            f"{what}: {address.host} is not a loopback address, and tokens would cross the network in clear: "
            "give the settings a block `tls` (excimer init --tls), or listen on 127.0.0.1"
        )
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


def bound_address(bound: socket.socket) -> Address:
    """Where a socket listens, with the port that was chosen if it asked for any."""
    host, port = bound.getsockname()[:2]
    return Address(host, port)
