"""Where a service listens: a host and a port, or as libpq has it, a Unix socket's directory and a port."""

import ipaddress
import re
from typing import NamedTuple

from excimer.base.errors import RefusedError

_TEXT = re.compile(r"(?:\[([^\]]+)\]|([^:\[\]]*)):([0-9]{1,5})\Z")
_PORT_MAX = 65_535


class InvalidAddressError(RefusedError):
    """A text is not `host:port`."""


class Address(NamedTuple):
    """A host that begins with ``/`` is the directory of a Unix socket, as in libpq."""

    host: str
    port: int

    @property
    def unix_path(self) -> str | None:
        """Path of PostgreSQL's Unix socket, or None for TCP."""
        return f"{self.host}/.s.PGSQL.{self.port}" if self.host.startswith("/") else None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it; a name other than localhost may mean anything."""
        if self.host in ("", "localhost") or self.host.startswith("/"):
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(text: str) -> Address:
    """Reads ``host:port``, ``[v6]:port`` or ``/directory:port``. Raises `InvalidAddressError`."""
    match = _TEXT.match(text)
    if match is None or int(match[3]) > _PORT_MAX:
        raise InvalidAddressError(f"{text!r} is not an address: write it as host:port")
    return Address(match[1] or match[2] or "127.0.0.1", int(match[3]))
