"""Bodies of the controller's HTTP API, as OpenAPI shows them. LSNs are PostgreSQL's text, times RFC 3339."""

from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from excimer.base.lsn import format_lsn
from excimer.controller.endpoints.access_api import TokensAnswer
from excimer.controller.model import (
    LOOPBACK,
    ComputeSpec,
    Endpoint,
    EndpointState,
    Pageserver,
    Safekeeper,
    Tenant,
    Timeline,
)
from excimer.wire.compute_limits import ComputeLimits

HexId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
LsnText = Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class Body(BaseModel):
    """Unknown fields are errors: a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid")


class CreateTenantBody(Body):
    tenant_id: HexId | None = Field(None, description="Chosen by the client, so that it may ask again.")
    timeline_id: HexId | None = Field(None, description="Of the first branch, `main`.")
    name: str = Field("", description="Empty: the id.")
    pg_version: int = 18
    set_default: bool = False


class DefaultTenantBody(Body):
    tenant: str = Field(description="Name or id.")


class CreateBranchBody(Body):
    timeline_id: HexId | None = Field(None, description="Chosen by the client, so that it may ask again.")
    name: str
    ancestor: str | None = Field(None, description="Branch name or id; none: a fresh cluster.")
    at_lsn: LsnText | None = None
    at_timestamp: datetime | None = None
    pg_version: int | None = Field(None, description="For a fresh cluster; a branch has its ancestor's.")
    keep_active: bool = Field(
        False, description="Its subscriptions stay enabled, and background workers of its extensions run."
    )


class BeginImportBody(Body):
    timeline_id: HexId = Field(description="Chosen by the client: the pageserver is told the same.")
    name: str
    pg_version: int
    keep_active: bool = Field(
        False, description="Its subscriptions stay enabled, and background workers of its extensions run."
    )


class LimitsFields(Body):
    """Of CPU, in thousandths of a core, and memory; both ends of a range 0: no limit."""

    cpu_min_milli: int = 0
    cpu_max_milli: int = 0
    memory_min_mib: int = 0
    memory_max_mib: int = 0

    @classmethod
    def of(cls, limits: ComputeLimits) -> "LimitsFields":
        return cls(**msgspec.structs.asdict(limits))

    def limits(self) -> ComputeLimits:
        return ComputeLimits(**self.model_dump())


class CreateEndpointBody(Body):
    name: str
    tenant: str = Field("", description="Name or id; empty: the default tenant.")
    branch: str = "main"
    mode: Literal["primary", "static", "replica"] = "primary"
    lsn: LsnText | None = Field(None, description="The moment a static endpoint shows.")
    at_timestamp: datetime | None = Field(None, description="The same as a time.")
    pg_version: int | None = None
    postgres_port: Port
    http_port: Port
    postgres_settings: dict[str, str] = {}
    listen_host: str = Field(LOOPBACK, description="Other than loopback needs the files of a certificate.")
    tls_certificate_path: str | None = Field(None, description="On the machine where the endpoint runs.")
    tls_key_path: str | None = None
    suspend_delay_s: int | None = Field(
        None, description="Suspended when nobody used it for so long; 0: never. Default: 300, static ones 0."
    )
    cache_size_mib: int = Field(0, description="What its cache may take on the local disk; 0: no bound.")
    limits: LimitsFields = LimitsFields()


class ImportAnswer(BaseModel):
    tenant_id: str
    timeline_id: str
    pageserver_http_address: str = Field(description="Where the import stream is to be sent.")


class TenantAnswer(BaseModel):
    tenant_id: str
    name: str
    state: str
    is_default: bool
    pageserver_id: int
    generation: int
    created_at: datetime

    @classmethod
    def of(cls, tenant: Tenant, default: str | None) -> "TenantAnswer":
        return cls(
            tenant_id=tenant.tenant_id,
            name=tenant.name,
            state=tenant.state,
            is_default=tenant.tenant_id == default,
            pageserver_id=tenant.pageserver_id,
            generation=tenant.generation,
            created_at=_time(tenant.created_at),
        )


class TenantsAnswer(BaseModel):
    tenants: list[TenantAnswer]


class BranchAnswer(BaseModel):
    timeline_id: str
    tenant_id: str
    name: str
    state: str
    pg_version: int
    ancestor_timeline_id: str | None
    ancestor_lsn: str | None
    start_lsn: str | None
    is_quiet: bool = Field(description="Background workers of its extensions do not run.")
    created_at: datetime

    @classmethod
    def of(cls, timeline: Timeline) -> "BranchAnswer":
        return cls(
            timeline_id=timeline.timeline_id,
            tenant_id=timeline.tenant_id,
            name=timeline.name,
            state=timeline.state,
            pg_version=timeline.pg_version,
            ancestor_timeline_id=timeline.ancestor_timeline_id,
            ancestor_lsn=_lsn(timeline.ancestor_lsn),
            start_lsn=_lsn(timeline.start_lsn),
            is_quiet=not timeline.extension_workers,
            created_at=_time(timeline.created_at),
        )


class BranchesAnswer(BaseModel):
    branches: list[BranchAnswer]


class EndpointAnswer(BaseModel):
    name: str
    tenant_id: str
    timeline_id: str
    branch: str
    mode: str
    lsn: str | None
    pg_version: int
    postgres_port: int
    http_port: int
    postgres_settings: dict[str, str]
    listen_host: str
    tls_certificate_path: str | None
    tls_key_path: str | None
    created_at: datetime
    suspend_delay_s: int
    state: EndpointState
    last_active_at: datetime | None
    suspends: int
    suspend_reason: str
    generation: int
    node_id: int | None
    cache_size_mib: int
    limits: LimitsFields

    @classmethod
    def of(cls, endpoint: Endpoint, branch: str) -> "EndpointAnswer":
        return cls(
            name=endpoint.name,
            tenant_id=endpoint.tenant_id,
            timeline_id=endpoint.timeline_id,
            branch=branch,
            mode=endpoint.mode,
            lsn=_lsn(endpoint.lsn),
            pg_version=endpoint.pg_version,
            postgres_port=endpoint.postgres_port,
            http_port=endpoint.http_port,
            postgres_settings=endpoint.postgres_settings,
            listen_host=endpoint.listen_host,
            tls_certificate_path=endpoint.tls_certificate_path,
            tls_key_path=endpoint.tls_key_path,
            created_at=_time(endpoint.created_at),
            suspend_delay_s=endpoint.suspend_delay_s,
            state=endpoint.state,
            last_active_at=time_or_none(endpoint.last_active_at),
            suspends=endpoint.suspends,
            suspend_reason=endpoint.suspend_reason,
            generation=endpoint.generation,
            node_id=endpoint.node_id,
            cache_size_mib=endpoint.cache_size_mib,
            limits=LimitsFields.of(endpoint.limits),
        )


class EndpointsAnswer(BaseModel):
    endpoints: list[EndpointAnswer]


class SpecAnswer(BaseModel):
    endpoint: EndpointAnswer
    pageserver_address: str
    pageserver_http_address: str
    lease_holder: str
    safekeepers: list[str]
    wal_sources: list[str] = Field(description="Where readers find WAL at the same safekeepers.")
    branch_start_lsn: str
    wal_segment_size: int
    system_id: str
    tokens: TokensAnswer
    quieting_id: str | None
    extension_workers: bool

    @classmethod
    def of(cls, spec: ComputeSpec) -> "SpecAnswer":
        return cls(
            endpoint=EndpointAnswer.of(spec.endpoint, spec.branch_name),
            pageserver_address=spec.pageserver_address,
            pageserver_http_address=spec.pageserver_http_address,
            lease_holder=spec.lease_holder,
            safekeepers=list(spec.safekeepers),
            wal_sources=list(spec.wal_sources),
            branch_start_lsn=format_lsn(spec.branch_start_lsn),
            wal_segment_size=spec.wal_segment_size,
            system_id=str(spec.system_id),
            tokens=TokensAnswer.of(spec.tokens),
            quieting_id=spec.quieting_id,
            extension_workers=spec.extension_workers,
        )


class ReleasedAnswer(BaseModel):
    released: int = Field(description="moments that it kept readable, and no longer does")


class DeletedAnswer(BaseModel):
    state: Literal["deleted", "deleting"]


class NodesAnswer(BaseModel):
    pageservers: list[dict[str, str | int]]
    safekeepers: list[dict[str, str | int]]

    @classmethod
    def of(cls, pageservers: list[Pageserver], safekeepers: list[Safekeeper]) -> "NodesAnswer":
        return cls(
            pageservers=[{"id": node.id, "http_address": node.http_address} for node in pageservers],
            safekeepers=[{"id": node.id, "http_address": node.http_address} for node in safekeepers],
        )


def _lsn(lsn: int | None) -> str | None:
    return None if lsn is None else format_lsn(lsn)


def time_or_none(unix: float | None) -> datetime | None:
    return None if unix is None else _time(unix)


def _time(unix: float) -> datetime:
    return datetime.fromtimestamp(unix, UTC)
