"""What the controller orders of a compute node, and what a node tells it: JSON bodies of HTTP calls.

::

    controller --PUT  /v1/endpoints/NAME        StartOrder--> node   answers when it accepts connections
               --PUT  /v1/endpoints/NAME/limits LimitsOrder-> node   in force when it answers
               --POST /v1/endpoints/NAME/stop   StopOrder---> node   answers when nothing of it runs
               --DELETE /v1/endpoints/NAME ----------------> node   removes what stops have kept
    node       --PUT  /v1/compute_nodes/ID      NodeReport--> controller   at its start, and again and again

Each order carries the *generation* of the controller's decision about that endpoint. It grows with each
decision that the endpoint be awake, so a late order is told from the newest one, and may be repeated. A start
of a later generation than the one that runs takes its place.

Not here: who may send them (docs/architecture/rights.md).
"""

from typing import Annotated, Literal

import msgspec

from excimer.wire.compute_limits import NO_LIMITS, ComputeLimits, ComputeSize
from excimer.wire.endpoint_tokens import EndpointTokens

Generation = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]


class StartOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a manager needs but for what belongs to its machine, which the node adds."""

    endpoint: str
    generation: Generation
    tenant_id: str
    timeline_id: str
    branch: str
    """Its name, for messages."""
    mode: Literal["primary", "static", "replica"]
    lsn: str | None
    pg_version: int
    listen_host: str
    postgres_port: int
    http_port: int
    tls_certificate_path: str | None
    tls_key_path: str | None
    postgres_settings: dict[str, str]
    suspend_delay_s: int
    cache_size_mib: int = 0
    limits: ComputeLimits = NO_LIMITS
    pageserver_address: str
    pageserver_http_address: str
    lease_holder: str
    safekeepers: tuple[str, ...]
    wal_sources: tuple[str, ...]
    branch_start_lsn: str
    quieting_id: str
    extension_workers: bool
    tokens: EndpointTokens
    limit_s: Seconds
    """How long the answer may be waited for; the start goes on all the same."""
    is_immediate: bool = False
    """Whom it replaces is killed instead of stopped."""


class StopOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    generation: Generation
    is_immediate: bool
    """Kill at once; no commit is lost."""


class LimitsOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    limits: ComputeLimits


class LimitsInForce(msgspec.Struct, frozen=True, kw_only=True):
    is_running: bool
    size: ComputeSize
    unkept: str
    """Which of them this machine cannot keep to, and why."""


class Started(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    is_new: bool
    """It did not run before this order."""


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    was_running: bool


class RunningEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    pid: int
    generation: int
    timeline_id: str
    mode: str
    size: ComputeSize = ComputeSize()
    """What it may use now."""


class RunningEndpoints(msgspec.Struct, frozen=True, kw_only=True):
    endpoints: list[RunningEndpoint]


class NodeReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node that serves orders."""

    http_address: str
    capacity: Annotated[int, msgspec.Meta(ge=1)]
    """How many endpoints may be awake on it."""
    room: ComputeSize = ComputeSize()
    """What the minimums of those that are awake may come to together; 0: it is not counted."""
