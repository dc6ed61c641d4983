"""The metadata database as an interface: what `shell` needs of it, whichever database does it.

Every method is one transaction, durable when it returns, and may block. Lists are in order of
creation. Unique names and ports are kept by the database itself: `NameTakenError`.
"""

from collections.abc import Sequence
from typing import Protocol

from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.controller.model import (
    ComputeNode,
    Endpoint,
    Pageserver,
    Placement,
    RolePassword,
    Safekeeper,
    Tenant,
    Timeline,
)
from excimer.wire.compute_limits import ComputeLimits


class MetadataStore(Protocol):
    def close(self) -> None: ...

    def put_nodes(self, pageservers: Sequence[Pageserver], safekeepers: Sequence[Safekeeper]) -> None:
        """Makes these the known nodes. Raises `InUseError` if one that is gone holds something."""

    def list_pageservers(self) -> list[Pageserver]: ...
    def list_safekeepers(self) -> list[Safekeeper]: ...

    def list_compute_nodes(self) -> list[ComputeNode]: ...
    def put_compute_node(self, node: ComputeNode) -> None:
        """Adds it, or replaces the row of its id."""

    def list_tenants(self) -> list[Tenant]: ...
    def find_tenant(self, tenant_id: TenantId) -> Tenant | None: ...
    def put_tenant(self, tenant: Tenant) -> None:
        """Adds it, or replaces the row of its id."""

    def remove_tenant(self, tenant_id: TenantId) -> None: ...
    def read_default_tenant(self) -> TenantId | None: ...
    def set_default_tenant(self, tenant_id: TenantId | None) -> None: ...

    def list_timelines(self, tenant_id: TenantId | None = None) -> list[Timeline]: ...
    def find_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> Timeline | None: ...
    def put_timeline(self, timeline: Timeline) -> None:
        """Adds it, or replaces the row of its id."""

    def put_timelines(self, timelines: Sequence[Timeline]) -> None:
        """All of them, or none."""

    def replace_timeline(self, old: Timeline, new: Timeline, endpoints: Sequence[str]) -> None:
        """Both rows, which may exchange names, and the endpoints of these names on the new one: all or
        nothing.
        """

    def remove_timeline(self, tenant_id: TenantId, timeline_id: TimelineId) -> None:
        """With its placements. Raises `InUseError` while a branch or endpoint needs it."""

    def list_placements(self, timeline_id: TimelineId | None = None) -> list[Placement]: ...
    def put_placements(self, placements: Sequence[Placement]) -> None:
        """All of them, or none: who reads a part of a timeline's members takes a few for its quorum."""

    def remove_placement(self, timeline_id: TimelineId, safekeeper_id: NodeId) -> None: ...

    def list_endpoints(self) -> list[Endpoint]: ...
    def add_endpoint(self, endpoint: Endpoint) -> None: ...
    def put_postgres_settings(self, name: str, settings: dict[str, str]) -> None:
        """Replaces the whole list of an endpoint; nothing happens if there is no such endpoint."""

    def put_listen(self, endpoint: Endpoint) -> None:
        """Replaces address, port and certificate of an endpoint, and nothing else."""

    def put_mode(self, endpoint: Endpoint) -> None:
        """Replaces the mode of an endpoint, and nothing else."""

    def put_cache_size(self, name: str, size_mib: int) -> None:
        """Nothing happens if there is no such endpoint."""

    def put_limits(self, name: str, limits: ComputeLimits) -> None:
        """Nothing happens if there is no such endpoint."""

    def put_suspension(self, endpoint: Endpoint) -> None:
        """Replaces when an endpoint is suspended, its state, where and in which generation, and what is
        counted of it; nothing else.
        """

    def remove_endpoint(self, name: str) -> None: ...

    def list_role_passwords(self, tenant_id: TenantId) -> list[RolePassword]: ...
    def put_role_passwords(self, passwords: Sequence[RolePassword]) -> None:
        """Each is added, or replaces that of its timeline, role and verifier. They go with the tenant."""
