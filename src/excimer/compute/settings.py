"""What an operator (in practice the controller) writes for one endpoint: a TOML file."""

from typing import Literal

import msgspec


class ComputeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    endpoint_dir: str
    """Where the endpoint keeps its lock and, while it runs, its data directory."""
    tenant_id: str
    timeline_id: str
    mode: Literal["primary", "static"] = "primary"
    """A primary writes and streams WAL; a static endpoint shows the branch at `lsn`, read-only."""
    lsn: str | None = None
    pg_version: int
    postgres_listen: str
    """host:port that clients connect to."""
    http_listen: str
    """host:port of /healthz and /metrics."""
    pageserver_address: str
    safekeepers: list[str] = []
    """Proposer addresses; empty only for a static endpoint."""
    token: str
    """JWT with scope "tenant"."""
    postgres_settings: dict[str, str] = {}
    """Passed on to postgresql.conf; settings that Excimer's durability rests upon are refused."""
    log_level: str = "info"
