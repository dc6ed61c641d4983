"""What an operator may write in the pageserver's settings file."""

from pathlib import Path

import msgspec

from excimer.service.settings import Settings


class PageserverSettings(Settings, frozen=True):
    id: int
    """Unique among the installation's pageservers."""
    data_dir: Path
    """Local files: copies of what is elsewhere, and each tenant's generation."""
    object_store_url: str
    """``file:///path``, ``s3://bucket/prefix``, ``gs://…``, ``az://…``: docs/operating/object_storage.md."""
    page_service_listen: str
    http_listen: str
    auth_public_key_path: Path
    controller_address: str
    """``host:port``. Names the safekeepers of a timeline, and gives the token to read its WAL with."""
    auth_token_path: Path
    """A token without rights, by which the controller knows this pageserver."""
    broker_url: str = ""
    """``nats://user:password@host:port``; empty: nobody says when a safekeeper has more."""
    lsn_wait_timeout_s: float = 60.0
    """How long a request for pages may wait for WAL that has not arrived."""
    redo_workers: int = 2
    """PostgreSQL processes that apply WAL to pages at the same time, per PostgreSQL version in use."""
    redo_processes_max: int = 64
    """Such processes in all, per version: each serves one tenant, and most wait for its next read."""
    redo_confinement_required: bool = False
    """Refuse to run where a redo worker could open files beyond its scratch directory."""
    flush_size_mib: int = 64
    """WAL values kept in memory per timeline before they become a layer."""
    flush_interval_s: float = 60.0
    """Values that waited for so long become a layer even if they are few."""
    object_store_options: dict[str, str] = msgspec.field(default_factory=dict)
    """Credentials, endpoint and the like that are not in the environment."""
    local_disk_max_mib: int = 10 * 1024
    """Above this, the local copies of layers that were not read for longest are removed; 0: no bound."""
