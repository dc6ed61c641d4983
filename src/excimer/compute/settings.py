"""What an operator (in practice the compute node) writes for one endpoint: a TOML file without secrets."""

from pathlib import Path
from typing import Literal

import msgspec

from excimer.service.settings import Settings
from excimer.wire.compute_limits import NO_LIMITS, ComputeLimits


class ComputeSettings(Settings, frozen=True, kw_only=True):
    endpoint_name: str
    endpoint_dir: Path
    """Where the endpoint keeps its lock and, while it runs, its data directory."""
    tenant_id: str
    timeline_id: str
    mode: Literal["primary", "static", "replica"] = "primary"
    """A primary writes and streams WAL; a static endpoint shows the branch at `lsn`, and a replica its head
    as it moves, both read-only."""
    lsn: str | None = None
    pg_version: int
    postgres_listen: str
    """host:port that clients connect to; other than loopback needs a certificate, and a build with TLS."""
    trusts_local: bool = False
    """Every user of this machine may connect as any role, without a password."""
    tls_certificate_path: Path | None = None
    """The endpoint's own; its build of PostgreSQL must then have TLS."""
    tls_key_path: Path | None = None
    default_tls_certificate_path: Path | None = None
    """The installation's, for an endpoint without its own; a build without TLS goes on without."""
    default_tls_key_path: Path | None = None
    http_listen: str
    """host:port of /healthz and /metrics."""
    pageserver_address: str
    pageserver_http_address: str = ""
    """Where an endpoint that only reads asks for a lease on its LSN; empty: it has none, and its history may
    go."""
    lease_holder: str = ""
    """In whose name: that of the endpoint, under which the controller gives the lease back."""
    safekeepers: list[str] = msgspec.field(default_factory=list)
    """Proposer addresses; used by a primary."""
    wal_sources: list[str] = msgspec.field(default_factory=list)
    """The same safekeepers' addresses for readers of WAL; used by a replica."""
    branch_start_lsn: str = "0/0"
    """Where the branch's own WAL begins."""
    controller_address: str
    """Where its settings are kept and its tokens renewed. The first ones come on the standard input."""
    pageserver_lag_max_mib: int = 64
    """How much committed WAL the pageserver may not have ingested before writers are held; 0: no limit."""
    saved_state_max_mib: int = 64
    """Of what a clean stop saves because WAL does not carry it, before it is compressed; 0: nothing."""
    saved_unlogged_max_mib: int = 16
    """Of that, of unlogged relations; those that do not fit begin empty, as after a crash."""
    prefetch_max_mib: int = 2048
    """What a start in an empty directory fetches unasked of what was used most; 0: nothing."""
    stopped_directories_max_mib: int = 10240
    """What the data directories of stopped endpoints beside this one may take together; 0: none is kept."""
    slot_wal_max_mib: int = 10240
    """How much WAL a replication slot without a consumer may hold before it is dropped; 0: any amount."""
    postgres_settings: dict[str, str] = msgspec.field(default_factory=dict)
    """The endpoint's own list at the start of the manager; later ones come from the controller."""
    quieting_id: str = ""
    """Under this id subscriptions that the branch inherited are disabled, once; empty: they go on."""
    extension_workers: bool = True
    """Whether background workers that extensions register are started."""
    cache_size_mib: int = 0
    """What relations' files may take on the disk, at the start of the manager; 0: no bound."""
    limits: ComputeLimits = NO_LIMITS
    """Of CPU and memory, at the start of the manager; whoever has started it keeps to them."""
    cgroup_dir: Path | None = None
    """The control group that it is in; None: none of its own."""
    suspend_delay_s: int = 0
    """How long nobody must have used it before it is suspended, at the start of the manager; 0: never."""
    generation: int = 0
    """Of the controller's decision that it be awake: a later one is for another manager."""
