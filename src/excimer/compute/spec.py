"""What an endpoint's manager starts: settings that are parsed and checked, and PostgreSQL's build found."""

from pathlib import Path
from typing import Literal, NamedTuple

from excimer.base.ids import TenantId, TimelineId
from excimer.base.lsn import Lsn
from excimer.compute.cache_bound import CacheBound
from excimer.compute.outside_work import OutsideWork
from excimer.compute.places import ComputePlaces
from excimer.compute.server_certificate import CertificateFiles
from excimer.postgres import PostgresBuild

EndpointMode = Literal["primary", "static", "replica"]


class ComputeSpec(NamedTuple):
    """The same for all attempts of one manager."""

    endpoint_name: str
    tenant_id: TenantId
    timeline_id: TimelineId
    mode: EndpointMode
    static_lsn: Lsn | None
    """What a static endpoint shows; None for others."""
    build: PostgresBuild
    host: str
    port: int
    trusts_local: bool
    certificate: CertificateFiles | None
    pageserver_address: str
    pageserver_http_address: str
    lease_holder: str
    safekeepers: list[str]
    """Where a primary proposes its WAL."""
    wal_sources: list[str]
    """Where a replica reads it: the same safekeepers' ports for readers."""
    branch_start_lsn: Lsn
    """Where the branch's own WAL begins."""
    module: Path
    """The endpoint module, compiled for `build`."""
    outside_work: OutsideWork
    places: ComputePlaces
    cache: CacheBound
    prefetch_bytes_max: int
    """What is fetched unasked after a start in an empty directory."""
    lag_bytes_max: int
    """How far the pageserver may be behind before writers wait; 0: as far as it likes."""
    shared_buffers_mib: int | None = None
    """Unless the endpoint's own list has it; None: the usual."""

    @property
    def is_standby(self) -> bool:
        """It reads only: static endpoints and replicas."""
        return self.mode != "primary"
