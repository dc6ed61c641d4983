"""How the installation's user connects to a running endpoint: as its bootstrap superuser, by its socket.

Written down at each start for commands that run beside the manager; each waits for what this imports.

Not here: how the superuser's name is found (`superuser_names`).
"""

from pathlib import Path

import msgspec


class LocalAccess(msgspec.Struct, frozen=True, kw_only=True):
    socket_dir: str
    port: int
    superuser: str
    pg_version: int = 0
    """Major version; 0 if an older Excimer started the endpoint."""
    has_tls: bool | None = None
    """Whether clients may ask it for TLS; None as above."""


def write_local_access(path: Path, access: LocalAccess) -> None:
    path.write_bytes(msgspec.json.encode(access))


def read_local_access(path: Path) -> LocalAccess | None:
    """None while no PostgreSQL serves there."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=LocalAccess)
    except (OSError, msgspec.MsgspecError):
        return None
