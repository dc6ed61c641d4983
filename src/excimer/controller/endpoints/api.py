"""The controller's HTTP API, version 1. Tenants and branches are named by name, id, or an id's beginning."""

from random import SystemRandom

from fastapi import APIRouter

from excimer.base.ids import TenantId, TimelineId, new_tenant_id, new_timeline_id
from excimer.base.lsn import Lsn
from excimer.controller import core
from excimer.controller.endpoints.api_models import (
    BeginImportBody,
    BranchAnswer,
    BranchesAnswer,
    CreateBranchBody,
    CreateEndpointBody,
    CreateTenantBody,
    DefaultTenantBody,
    DeletedAnswer,
    EndpointAnswer,
    EndpointsAnswer,
    ImportAnswer,
    NodesAnswer,
    ReleasedAnswer,
    SpecAnswer,
    TenantAnswer,
    TenantsAnswer,
)
from excimer.controller.endpoints.compute_limits_api import add_limits_routes
from excimer.controller.endpoints.compute_node_api import add_compute_node_routes
from excimer.controller.endpoints.history_api import add_history_routes
from excimer.controller.endpoints.lifecycle_api import add_lifecycle_routes
from excimer.controller.endpoints.reading import add_reading_routes, point_in_history
from excimer.controller.endpoints.retention import add_retention_routes
from excimer.controller.endpoints.role_api import add_role_routes
from excimer.controller.model import BadRequestError
from excimer.controller.shell import Controller

HTTP_CREATED = 201


def make_router(controller: Controller) -> APIRouter:
    router = APIRouter(prefix="/v1")
    chance = SystemRandom()
    _add_tenant_routes(router, controller, chance)
    _add_branch_routes(router, controller, chance)
    _add_import_routes(router, controller)
    _add_endpoint_routes(router, controller)
    add_lifecycle_routes(router, controller)
    add_compute_node_routes(router, controller)
    add_limits_routes(router, controller)
    add_reading_routes(router, controller)
    add_history_routes(router, controller)
    add_retention_routes(router, controller)
    add_role_routes(router, controller)

    @router.get("/nodes", tags=["nodes"])
    async def list_nodes() -> NodesAnswer:
        return NodesAnswer.of(*await controller.list_nodes())

    return router


def _add_tenant_routes(router: APIRouter, controller: Controller, chance: SystemRandom) -> None:
    @router.get("/tenants", tags=["tenants"])
    async def list_tenants() -> TenantsAnswer:
        tenants, default = await controller.list_tenants()
        return TenantsAnswer(tenants=[TenantAnswer.of(tenant, default) for tenant in tenants])

    @router.post("/tenants", tags=["tenants"], status_code=HTTP_CREATED)
    async def create_tenant(body: CreateTenantBody) -> TenantAnswer:
        """Makes a tenant with a first branch `main`. Repeatable with the same ids."""
        tenant = await controller.create_tenant(
            TenantId(body.tenant_id) if body.tenant_id else new_tenant_id(chance),
            TimelineId(body.timeline_id) if body.timeline_id else new_timeline_id(chance),
            body.name,
            body.pg_version,
            body.set_default,
        )
        _, default = await controller.list_tenants()
        return TenantAnswer.of(tenant, default)

    @router.get("/tenants/{tenant}", tags=["tenants"])
    async def get_tenant(tenant: str) -> TenantAnswer:
        _, default = await controller.list_tenants()
        return TenantAnswer.of(await controller.find_tenant(tenant), default)

    @router.delete("/tenants/{tenant}", tags=["tenants"])
    async def delete_tenant(tenant: str) -> DeletedAnswer:
        """Deletes a tenant without endpoints, with all its branches."""
        return DeletedAnswer(state="deleted" if await controller.delete_tenant(tenant) else "deleting")

    @router.get("/default_tenant", tags=["tenants"])
    async def get_default_tenant() -> TenantAnswer:
        tenant = await controller.find_tenant("")
        return TenantAnswer.of(tenant, tenant.tenant_id)

    @router.put("/default_tenant", tags=["tenants"])
    async def set_default_tenant(body: DefaultTenantBody) -> TenantAnswer:
        tenant = await controller.set_default_tenant(body.tenant)
        return TenantAnswer.of(tenant, tenant.tenant_id)


def _add_branch_routes(router: APIRouter, controller: Controller, chance: SystemRandom) -> None:
    @router.get("/tenants/{tenant}/branches", tags=["branches"])
    async def list_branches(tenant: str) -> BranchesAnswer:
        found = await controller.find_tenant(tenant)
        timelines = await controller.list_timelines(found.tenant_id)
        return BranchesAnswer(branches=[BranchAnswer.of(timeline) for timeline in timelines])

    @router.post("/tenants/{tenant}/branches", tags=["branches"], status_code=HTTP_CREATED)
    async def create_branch(tenant: str, body: CreateBranchBody) -> BranchAnswer:
        """A branch of `ancestor` at an LSN, a time, or now; without `ancestor` a fresh cluster."""
        timeline = await controller.create_timeline(
            tenant,
            TimelineId(body.timeline_id) if body.timeline_id else new_timeline_id(chance),
            body.name,
            ancestor=body.ancestor,
            at=_branch_point(body),
            pg_version=body.pg_version,
            keep_active=body.keep_active,
        )
        return BranchAnswer.of(timeline)

    @router.get("/tenants/{tenant}/branches/{branch:path}", tags=["branches"])
    async def get_branch(tenant: str, branch: str) -> BranchAnswer:
        found = await controller.find_tenant(tenant)
        return BranchAnswer.of(await controller.find_branch(found.tenant_id, branch))

    @router.delete("/tenants/{tenant}/branches/{branch:path}", tags=["branches"])
    async def delete_branch(tenant: str, branch: str) -> DeletedAnswer:
        """Deletes a branch that has neither branches of its own nor endpoints."""
        gone = await controller.delete_timeline(tenant, branch)
        return DeletedAnswer(state="deleted" if gone else "deleting")


def _add_import_routes(router: APIRouter, controller: Controller) -> None:
    base = "/tenants/{tenant}/imports"

    @router.post(base, tags=["imports"], status_code=HTTP_CREATED)
    async def begin_import(tenant: str, body: BeginImportBody) -> ImportAnswer:
        """Reserves the branch's name. The caller sends the cluster to the pageserver, then calls `finish`."""
        begun = await controller.imports.begin(
            tenant, TimelineId(body.timeline_id), body.name, body.pg_version, keep_active=body.keep_active
        )
        return ImportAnswer(
            tenant_id=begun.timeline.tenant_id,
            timeline_id=begun.timeline.timeline_id,
            pageserver_http_address=begun.pageserver_http_address,
        )

    @router.post(base + "/{timeline_id}/finish", tags=["imports"])
    async def finish_import(tenant: str, timeline_id: str) -> BranchAnswer:
        """Shows the branch, once the pageserver has it whole. Repeatable."""
        return BranchAnswer.of(await controller.imports.finish(tenant, TimelineId(timeline_id)))

    @router.delete(base + "/{timeline_id}", tags=["imports"])
    async def abandon_import(tenant: str, timeline_id: str) -> DeletedAnswer:
        """Forgets an import that is not finished."""
        await controller.imports.abandon(tenant, TimelineId(timeline_id))
        return DeletedAnswer(state="deleted")


def _add_endpoint_routes(router: APIRouter, controller: Controller) -> None:
    @router.get("/endpoints", tags=["endpoints"])
    async def list_endpoints() -> EndpointsAnswer:
        listed = await controller.list_endpoints()
        return EndpointsAnswer(endpoints=[EndpointAnswer.of(endpoint, name) for endpoint, name in listed])

    @router.post("/endpoints", tags=["endpoints"], status_code=HTTP_CREATED)
    async def create_endpoint(body: CreateEndpointBody) -> EndpointAnswer:
        endpoint = await controller.create_endpoint(
            body.name,
            body.tenant,
            body.branch,
            mode=body.mode,
            at=point_in_history(body.lsn, body.at_timestamp),
            pg_version=body.pg_version,
            ports=(body.postgres_port, body.http_port),
            postgres_settings=body.postgres_settings,
            listen=core.Listen(body.listen_host, body.tls_certificate_path, body.tls_key_path),
            suspend_delay_s=body.suspend_delay_s,
            cache_size_mib=body.cache_size_mib,
            limits=body.limits.limits(),
        )
        return EndpointAnswer.of(*await controller.find_endpoint(endpoint.name))

    @router.get("/endpoints/{name}", tags=["endpoints"])
    async def get_endpoint(name: str) -> EndpointAnswer:
        return EndpointAnswer.of(*await controller.find_endpoint(name))

    @router.delete("/endpoints/{name}", tags=["endpoints"])
    async def delete_endpoint(name: str) -> DeletedAnswer:
        """Forgets an endpoint that does not run, and what its stops have kept."""
        await controller.delete_endpoint(name)
        return DeletedAnswer(state="deleted")

    @router.post("/endpoints/{name}/release", tags=["endpoints"])
    async def release_endpoint(name: str) -> ReleasedAnswer:
        """Lets the moment go that a static endpoint showed, which has been stopped."""
        return ReleasedAnswer(released=await controller.release_endpoint(name))

    @router.post("/endpoints/{name}/promote", tags=["endpoints"])
    async def promote_endpoint(name: str) -> EndpointAnswer:
        """Makes a replica its branch's primary from its next start on; whoever runs its compute stops it
        first."""
        await controller.promote_endpoint(name)
        return EndpointAnswer.of(*await controller.find_endpoint(name))

    @router.get("/endpoints/{name}/spec", tags=["endpoints"])
    async def get_spec(name: str) -> SpecAnswer:
        """All that a compute manager needs, with its first tokens."""
        return SpecAnswer.of(await controller.read_spec(name))


def _branch_point(body: CreateBranchBody) -> Lsn | str | None:
    if body.at_lsn is not None and body.at_timestamp is not None:
        raise BadRequestError("a branch starts at an LSN or at a time, not at both")
    if body.ancestor is None and (body.at_lsn or body.at_timestamp):
        raise BadRequestError("only a branch of an ancestor starts at a chosen point")
    return point_in_history(body.at_lsn, body.at_timestamp)
