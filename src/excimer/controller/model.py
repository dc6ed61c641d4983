"""What the controller knows, as frozen values; each is one row of the metadata database."""

from typing import Final, Literal

import msgspec

from excimer.base.errors import ConflictError, NotFoundError, RefusedError
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.wire.compute_limits import NO_LIMITS, ComputeLimits, ComputeSize
from excimer.wire.endpoint_tokens import EndpointTokens

State = Literal[
    "creating",
    "importing",
    "replacing",
    "active",
    "archiving",
    "archived",
    "unarchiving",
    "detaching",
    "deleting",
]
"""`creating`: rows exist, remote parts perhaps. `importing`: a branch whose content somebody is sending to
the pageserver; hidden until it is all there. `replacing`: made to take over another timeline's name, hidden
until it does. `archived`: only kept. `deleting`: the name is free, remote parts perhaps not gone; hidden.
All but `active` and `archived` are driven to their end after a crash.
"""

EndpointMode = Literal["primary", "static", "replica"]

EndpointState = Literal["stopped", "running", "suspended"]
"""`running`: it is to be awake; whether its process lives is known where it runs. `suspended`: nobody used
it, and whoever wants it again starts it. `stopped`: somebody has stopped it, or it has never run.
"""

SUSPEND_DELAY_S: Final = 300
NEVER: Final = 0
UNBOUNDED: Final = 0

MAIN_BRANCH: Final = "main"
LOOPBACK: Final = "127.0.0.1"


class UnknownNameError(NotFoundError):
    """No tenant, branch or endpoint has this name or id."""


class NameTakenError(ConflictError):
    """The name (or port) is in use."""


class InUseError(ConflictError):
    """Something still depends on what should be deleted."""


class BadRequestError(RefusedError):
    """A name is malformed, or options contradict each other."""


HIDDEN_STATES: Final = ("importing", "replacing", "deleting")
"""Of branches that users do not see."""


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    tenant_id: TenantId
    name: str
    """Unique among tenants; the id unless the user gave one."""
    state: State
    pageserver_id: NodeId
    generation: int
    """Grows with each attachment to a pageserver (G1)."""
    created_at: float


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    tenant_id: TenantId
    timeline_id: TimelineId
    name: str
    """The branch's name, unique within its tenant."""
    state: State
    pg_version: int
    ancestor_timeline_id: TimelineId | None
    ancestor_lsn: Lsn | None
    """Where it branched off; None before creation is complete, and for a timeline without ancestor."""
    start_lsn: Lsn | None
    """Where its own WAL begins; None before creation is complete."""
    system_id: int
    wal_segment_size: int
    created_at: float
    replaces_timeline_id: TimelineId | None = None
    """While it is `replacing`: whose name and endpoints it is to take over."""
    replaced_name: str | None = None
    """Under which name that one is then kept; None: it goes."""
    quieting_id: str | None = None
    """Subscriptions that it took over from another cluster's catalogs are disabled before they act, once
    under this id; None: they go on. Another id is another quieting.
    """
    extension_workers: bool = True
    """Whether background workers that extensions register (schedulers of jobs) run on it."""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """A safekeeper that is to have a timeline; `ready` once it said so."""

    tenant_id: TenantId
    timeline_id: TimelineId
    safekeeper_id: NodeId
    ready: bool


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    tenant_id: TenantId
    timeline_id: TimelineId
    mode: EndpointMode
    lsn: Lsn | None
    """The moment that a static endpoint shows; None for others, which show the head."""
    pg_version: int
    postgres_port: int
    http_port: int
    postgres_settings: dict[str, str]
    created_at: float
    listen_host: str = LOOPBACK
    """Where PostgreSQL listens, at `postgres_port`; other than loopback only with a certificate."""
    tls_certificate_path: str | None = None
    tls_key_path: str | None = None
    """Both or none: files of the machine where the endpoint runs."""
    suspend_delay_s: int = NEVER
    """How long nobody must have used it before it is suspended."""
    state: EndpointState = "stopped"
    last_active_at: float | None = None
    """When it was last used, as far as is known; None: it has never run."""
    suspends: int = 0
    """How often it has been suspended."""
    suspend_reason: str = ""
    """Of the last time: `idle`, or `asked` by a person."""
    generation: int = 0
    """Grows with each decision that it be awake."""
    node_id: NodeId | None = None
    """The compute node on which it is, or was last, awake."""
    cache_size_mib: int = UNBOUNDED
    """What its relations' files may take on its local disk before cold blocks are evicted."""
    limits: ComputeLimits = NO_LIMITS
    """Of CPU and memory."""


class RolePassword(msgspec.Struct, frozen=True, kw_only=True):
    """A password that a role was given: what is known of it beside the verifier in the branch's own data."""

    tenant_id: TenantId
    timeline_id: TimelineId
    """Where it was set, or first seen; branches of it inherit it with the data."""
    role: str
    is_bootstrap: bool
    """Whether the role is the cluster's bootstrap superuser, whatever its name is."""
    verifier: str
    """As in pg_authid: SCRAM, md5 of an imported cluster, or empty: the role has none."""
    password: str | None
    """Kept if it was generated; None if only its owner knows it."""
    lsn: Lsn | None
    """In force from here on, until the next one of the same role; None: it was to be set, and perhaps was."""
    created_at: float


class Pageserver(msgspec.Struct, frozen=True, kw_only=True):
    id: NodeId
    http_address: str
    page_service_address: str


class Safekeeper(msgspec.Struct, frozen=True, kw_only=True):
    id: NodeId
    http_address: str
    proposer_address: str
    replication_address: str


class ComputeNode(msgspec.Struct, frozen=True, kw_only=True):
    """A process that starts and stops endpoints on its machine."""

    id: NodeId
    http_address: str
    capacity: int
    """How many endpoints may be awake on it."""
    room: ComputeSize = ComputeSize()
    """What their minimums may come to together; 0: it is not counted."""


class ComputeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a compute manager needs; the caller adds directories and listens."""

    endpoint: Endpoint
    branch_name: str
    pageserver_address: str
    pageserver_http_address: str
    lease_holder: str
    """In whose name it leases the moment that it shows."""
    safekeepers: tuple[str, ...]
    """Proposer addresses of all the timeline's safekeepers."""
    wal_sources: tuple[str, ...]
    """Where readers find the timeline's WAL at the same safekeepers."""
    branch_start_lsn: Lsn
    wal_segment_size: int
    system_id: int
    tokens: EndpointTokens
    """The first ones; the manager renews them."""
    quieting_id: str | None
    extension_workers: bool
