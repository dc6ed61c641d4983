"""The controller's decisions: names, what may be made of what, what may be deleted. No I/O, no clock.

Everything takes the rows it needs and answers a row to write, or raises an error whose sentence
the user sees.
"""

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from excimer.base.address import Address, parse_address
from excimer.base.branch_names import branch_name_fault
from excimer.base.errors import ConflictError, RetryableError
from excimer.base.ids import NodeId, TenantId, TimelineId
from excimer.base.lsn import INVALID_LSN, Lsn, format_lsn
from excimer.controller.model import (
    HIDDEN_STATES,
    LOOPBACK,
    BadRequestError,
    ComputeSpec,
    Endpoint,
    EndpointMode,
    InUseError,
    NameTakenError,
    Pageserver,
    Placement,
    Safekeeper,
    State,
    Tenant,
    Timeline,
    UnknownNameError,
)
from excimer.wire.endpoint_tokens import EndpointTokens

PG_VERSIONS: Final = range(14, 19)
SUGGESTION_CUTOFF: Final = 0.6
ID_PREFIX_LENGTH_MIN: Final = 4

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_ID_LIKE = re.compile(r"[0-9a-f]{32}\Z")


class NoNodesError(RetryableError):
    """No pageserver, or too few safekeepers, are known."""


class IncompleteError(RetryableError):
    """What is referred to is still being created."""


class BranchChangedError(RetryableError):
    """A name has come to mean another branch while an operation was under way."""


class BranchArchivedError(ConflictError):
    """An archived branch is only kept."""


ARCHIVE_STATES: Final[tuple[State, ...]] = ("archiving", "archived", "unarchiving")

SHOWN_SIZE_MAX = 80
"""How much of a wrong name is repeated."""


def check_branch_name(name: str) -> None:
    """Raises `BadRequestError` that says why `name` cannot be a branch's."""
    fault = branch_name_fault(name)
    if fault is not None:
        raise BadRequestError(f"{name[:SHOWN_SIZE_MAX]!r} cannot be a branch name: it {fault}")


def check_name(name: str, what: str) -> None:
    """Raises `BadRequestError` unless `name` can be the name of a `what`."""
    said = f"{name[:SHOWN_SIZE_MAX]!r} cannot be {'an' if what[0] in 'aeiou' else 'a'} {what} name"
    if _NAME.match(name) is None:
        raise BadRequestError(f"{said}: use 1-63 of letters, digits, '.', '_', '-', a letter or digit first")
    if _ID_LIKE.match(name):
        raise BadRequestError(f"{said}: it looks like an id")


def check_pg_version(pg_version: int) -> None:
    if pg_version not in PG_VERSIONS:
        raise BadRequestError(
            f"PostgreSQL {pg_version} is not supported: use {PG_VERSIONS[0]} to {PG_VERSIONS[-1]}"
        )


def _unknown(name: str, known: Iterable[str]) -> str:
    return repr(name[:SHOWN_SIZE_MAX]) + suggestion(name, known)


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence that helps with a wrong name: the nearest one, or what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=SUGGESTION_CUTOFF)
    if near:
        return f"; did you mean {near[0]!r}?"
    if not names:
        return "; there are none yet"
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"; there are: {listed}"


def find_tenant(tenants: Iterable[Tenant], reference: str, default: TenantId | None) -> Tenant:
    """The tenant of a name, an id, an id's beginning, or (empty) the default one."""
    shown = [tenant for tenant in tenants if tenant.state != "deleting"]
    if not reference:
        found = [tenant for tenant in shown if tenant.tenant_id == default]
        if not found:
            raise UnknownNameError(
                "there is no default tenant: name one, or make one with `excimer tenant create --set-default`"
            )
        return found[0]
    for tenant in shown:
        if reference in (tenant.name, tenant.tenant_id):
            return tenant
    if len(reference) >= ID_PREFIX_LENGTH_MIN:
        found = [tenant for tenant in shown if tenant.tenant_id.startswith(reference.lower())]
        if len(found) == 1:
            return found[0]
    raise UnknownNameError("no tenant " + _unknown(reference, [tenant.name for tenant in shown]))


def find_branch(timelines: Iterable[Timeline], reference: str) -> Timeline:
    """The branch of a name, a timeline id, or an id's beginning; `timelines` are one tenant's."""
    shown = [timeline for timeline in timelines if timeline.state not in HIDDEN_STATES]
    for timeline in shown:
        if reference in (timeline.name, timeline.timeline_id):
            return timeline
    if len(reference) >= ID_PREFIX_LENGTH_MIN:
        found = [timeline for timeline in shown if timeline.timeline_id.startswith(reference.lower())]
        if len(found) == 1:
            return found[0]
    raise UnknownNameError("no branch " + _unknown(reference, [branch.name for branch in shown]))


def find_endpoint(endpoints: Iterable[Endpoint], name: str) -> Endpoint:
    known = {endpoint.name: endpoint for endpoint in endpoints}
    if name not in known:
        raise UnknownNameError("no endpoint " + _unknown(name, known))
    return known[name]


def plan_tenant(
    tenants: Sequence[Tenant], pageservers: Sequence[Pageserver], tenant_id: TenantId, name: str, now: float
) -> Tenant:
    """A new tenant, on the pageserver that has the fewest."""
    if name != tenant_id:
        check_name(name, "tenant")
    if any(tenant.name == name and tenant.state != "deleting" for tenant in tenants):
        raise NameTakenError(f"there is already a tenant {name!r}")
    if not pageservers:
        raise NoNodesError("no pageserver is known to the controller")
    load = {pageserver.id: 0 for pageserver in pageservers}
    for tenant in tenants:
        if tenant.pageserver_id in load:
            load[tenant.pageserver_id] += 1
    chosen = min(pageservers, key=lambda pageserver: (load[pageserver.id], pageserver.id))
    return Tenant(
        tenant_id=tenant_id,
        name=name,
        state="creating",
        pageserver_id=chosen.id,
        generation=1,
        created_at=now,
    )


def plan_timeline(
    timelines: Sequence[Timeline],
    tenant: Tenant,
    timeline_id: TimelineId,
    name: str,
    pg_version: int,
    ancestor: Timeline | None,
    now: float,
) -> Timeline:
    """A new timeline among the tenant's: with an ancestor a branch of it, without one a fresh cluster."""
    check_branch_name(name)
    check_pg_version(pg_version)
    if any(timeline.name == name and timeline.state != "deleting" for timeline in timelines):
        raise NameTakenError(f"there is already a branch {name!r} in tenant {tenant.name!r}")
    if ancestor is not None:
        check_in_service(ancestor)
    return Timeline(
        tenant_id=tenant.tenant_id,
        timeline_id=timeline_id,
        name=name,
        state="creating",
        pg_version=pg_version,
        ancestor_timeline_id=ancestor.timeline_id if ancestor else None,
        ancestor_lsn=None,
        start_lsn=None,
        system_id=ancestor.system_id if ancestor else 0,
        wal_segment_size=ancestor.wal_segment_size if ancestor else 0,
        created_at=now,
    )


def plan_branch(
    timelines: Sequence[Timeline],
    tenant: Tenant,
    timeline_id: TimelineId,
    name: str,
    ancestor: str | None,
    pg_version: int | None,
    now: float,
) -> tuple[Timeline, Timeline | None]:
    """The row for a timeline that is asked for, which may be there already, and its parent if it has one."""
    existing = next((row for row in timelines if row.timeline_id == timeline_id), None)
    if existing is not None and existing.state == "active":
        return existing, None
    refuse_deleted(existing, "branch", timeline_id)
    parent = find_branch(timelines, ancestor) if ancestor is not None else None
    if pg_version is None and parent is None:
        raise BadRequestError("a timeline without an ancestor needs a PostgreSQL version")
    version = parent.pg_version if parent is not None else pg_version
    row = existing or plan_timeline(timelines, tenant, timeline_id, name, version or 0, parent, now)
    return row, parent


def refuse_deleted(row: Tenant | Timeline | None, what: str, row_id: str) -> None:
    if row is not None and row.state == "deleting":
        raise BadRequestError(f"{what} {row_id} is being deleted: use a new id")


def check_same_branch(seen: Timeline | None, now: Timeline | None) -> None:
    """Raises `BranchChangedError` if a name means another branch now than before the tenant was locked."""
    if seen is not None and (now is None or now.timeline_id != seen.timeline_id):
        raise BranchChangedError(f"branch {seen.name!r} has just become another: try again")


def made_quiet(timeline: Timeline, quieting_id: str) -> Timeline:
    """The row of a timeline that does not act on the outside by itself.

    Its catalogs are a copy of another cluster's, which goes on: both of them at work on one subscription
    would lose rows, and scheduled jobs would be done twice.
    """
    return msgspec.structs.replace(timeline, quieting_id=quieting_id, extension_workers=False)


def made_active(timeline: Timeline) -> Timeline:
    """The row of a timeline that acts on the outside as its catalogs say."""
    return msgspec.structs.replace(timeline, quieting_id=None, extension_workers=True)


def check_in_service(timeline: Timeline) -> None:
    """Raises unless endpoints, readers and branches can use the branch now."""
    if timeline.state in ARCHIVE_STATES:
        raise BranchArchivedError(
            f"branch {timeline.name!r} is archived: unarchive it first "
            f"(excimer timeline unarchive {shlex.quote(timeline.name)})"
        )
    if timeline.state not in ("active", "detaching"):
        raise IncompleteError(f"branch {timeline.name!r} is still being created: try again")


def check_timeline_deletable(
    timeline: Timeline, timelines: Iterable[Timeline], endpoints: Iterable[Endpoint]
) -> None:
    """Raises `InUseError` that names what needs the timeline."""
    children = [
        other.name
        for other in timelines
        if other.ancestor_timeline_id == timeline.timeline_id and other.state != "deleting"
    ]
    if children:
        raise InUseError(f"branch {timeline.name!r} has branches of its own: delete {_names(children)} first")
    users = [endpoint.name for endpoint in endpoints if endpoint.timeline_id == timeline.timeline_id]
    if users:
        raise InUseError(f"branch {timeline.name!r} has endpoints: delete {_names(users)} first")


def check_tenant_deletable(tenant: Tenant, endpoints: Iterable[Endpoint]) -> None:
    """Raises `InUseError` that names the endpoints of the tenant."""
    users = [endpoint.name for endpoint in endpoints if endpoint.tenant_id == tenant.tenant_id]
    if users:
        raise InUseError(f"tenant {tenant.name!r} has endpoints: delete {_names(users)} first")


def deletion_order(timelines: Sequence[Timeline]) -> list[Timeline]:
    """A tenant's timelines with every branch before its ancestor."""
    depth: dict[TimelineId, int] = {}
    by_id = {timeline.timeline_id: timeline for timeline in timelines}

    def depth_of(timeline: Timeline) -> int:
        if timeline.timeline_id not in depth:
            ancestor = by_id.get(timeline.ancestor_timeline_id) if timeline.ancestor_timeline_id else None
            depth[timeline.timeline_id] = 0 if ancestor is None else depth_of(ancestor) + 1
        return depth[timeline.timeline_id]

    return sorted(timelines, key=depth_of, reverse=True)


def quorum(safekeeper_count: int) -> int:
    return safekeeper_count // 2 + 1


def plan_placements(timeline: Timeline, safekeepers: Sequence[Safekeeper]) -> list[Placement]:
    """A timeline lives on every safekeeper of the installation."""
    if not safekeepers:
        raise NoNodesError("no safekeeper is known to the controller")
    return [
        Placement(
            tenant_id=timeline.tenant_id,
            timeline_id=timeline.timeline_id,
            safekeeper_id=safekeeper.id,
            ready=False,
        )
        for safekeeper in safekeepers
    ]


class Listen(NamedTuple):
    """Where an endpoint's PostgreSQL listens, and its certificate."""

    host: str = LOOPBACK
    certificate_path: str | None = None
    key_path: str | None = None


LOOPBACK_ONLY: Final = Listen()


def check_listen(listen: Listen, *, has_default: bool) -> None:
    """`has_default`: endpoints without a certificate of their own show the installation's.

    Raises `BadRequestError`. Whether PostgreSQL can do TLS there is known where it runs.
    """
    address = parse_address(str(Address(listen.host, 1)))
    if address.host != listen.host:
        raise BadRequestError(f"{listen.host!r} is not an address to listen on")
    if (listen.certificate_path is None) != (listen.key_path is None):
        raise BadRequestError("a certificate and its key belong together: give both, or none")
    if listen.certificate_path is None and not has_default and not address.is_loopback:
        raise BadRequestError(
            f"an endpoint listens on {listen.host} only with TLS: give it a certificate and its key"
        )


def plan_listen(
    endpoint: Endpoint,
    *,
    host: str | None,
    port: int | None,
    certificate: tuple[str | None, str | None],
    without_tls: bool,
    has_default_certificate: bool = False,
) -> Endpoint:
    """The endpoint with another address, port or certificate; None leaves a thing as it is."""
    old = endpoint.tls_certificate_path, endpoint.tls_key_path
    files = (None, None) if without_tls else certificate if certificate != (None, None) else old
    if without_tls and certificate != (None, None):
        raise BadRequestError("an endpoint has a certificate or none, not both")
    listen = Listen(host or endpoint.listen_host, *files)
    check_listen(listen, has_default=has_default_certificate)
    if port == endpoint.http_port:
        raise BadRequestError("an endpoint needs two different ports between 1 and 65535")
    return msgspec.structs.replace(
        endpoint,
        listen_host=listen.host,
        postgres_port=port or endpoint.postgres_port,
        tls_certificate_path=listen.certificate_path,
        tls_key_path=listen.key_path,
    )


def plan_endpoint(
    endpoints: Iterable[Endpoint],
    timeline: Timeline,
    *,
    name: str,
    mode: EndpointMode,
    lsn: Lsn | None,
    pg_version: int | None,
    ports: tuple[int, int],
    postgres_settings: dict[str, str],
    listen: Listen = LOOPBACK_ONLY,
    has_default_certificate: bool = False,
    now: float,
) -> Endpoint:
    """A new endpoint on a branch. `ports` are PostgreSQL's and the manager's."""
    check_name(name, "endpoint")
    if any(endpoint.name == name for endpoint in endpoints):
        raise NameTakenError(f"there is already an endpoint {name!r}")
    if pg_version is not None and pg_version != timeline.pg_version:
        raise BadRequestError(
            f"branch {timeline.name!r} is of PostgreSQL {timeline.pg_version}: "
            f"an endpoint on it cannot be of {pg_version}"
        )
    if (mode == "static") != (lsn is not None):
        raise BadRequestError("an LSN belongs to a static endpoint, and only to one")
    if lsn is not None and timeline.ancestor_timeline_id is None and lsn < (timeline.start_lsn or 0):
        raise BadRequestError(
            f"LSN {format_lsn(lsn)} is before branch {timeline.name!r} begins "
            f"at {format_lsn(timeline.start_lsn or 0)}"
        )
    if any(not 0 < port < 65536 for port in ports) or ports[0] == ports[1]:
        raise BadRequestError("an endpoint needs two different ports between 1 and 65535")
    check_listen(listen, has_default=has_default_certificate)
    return Endpoint(
        name=name,
        tenant_id=timeline.tenant_id,
        timeline_id=timeline.timeline_id,
        mode=mode,
        lsn=lsn,
        pg_version=timeline.pg_version,
        postgres_port=ports[0],
        http_port=ports[1],
        postgres_settings=postgres_settings,
        listen_host=listen.host,
        tls_certificate_path=listen.certificate_path,
        tls_key_path=listen.key_path,
        created_at=now,
    )


def plan_promotion(endpoint: Endpoint) -> Endpoint:
    """A replica as the primary that it is from its next start on. Raises `BadRequestError`."""
    if endpoint.mode == "static":
        raise BadRequestError(
            f"endpoint {endpoint.name!r} shows a past moment: make a branch there, and an endpoint on that"
        )
    return msgspec.structs.replace(endpoint, mode="primary")


def holder_of(endpoint_name: str) -> str:
    """Of an endpoint's tokens; also in whose name a static one leases its LSN, whichever process runs it."""
    return f"endpoint:{endpoint_name}"


def build_spec(
    endpoint: Endpoint,
    timeline: Timeline,
    pageserver: Pageserver,
    placements: Iterable[Placement],
    safekeepers: Iterable[Safekeeper],
    tokens: EndpointTokens,
) -> ComputeSpec:
    """What a compute manager needs. All placed safekeepers, ready or not: a late one is caught up."""
    placed: set[NodeId] = {placement.safekeeper_id for placement in placements}
    members = [row for row in safekeepers if row.id in placed]
    return ComputeSpec(
        endpoint=endpoint,
        branch_name=timeline.name,
        pageserver_address=pageserver.page_service_address,
        pageserver_http_address=pageserver.http_address,
        lease_holder=holder_of(endpoint.name),
        safekeepers=tuple(row.proposer_address for row in members),
        wal_sources=tuple(row.replication_address for row in members),
        branch_start_lsn=timeline.start_lsn or INVALID_LSN,
        wal_segment_size=timeline.wal_segment_size,
        system_id=timeline.system_id,
        tokens=tokens,
        quieting_id=timeline.quieting_id,
        extension_workers=timeline.extension_workers,
    )


def _names(names: Sequence[str]) -> str:
    return ", ".join(sorted(names))
