"""Routes about who gets in: passwords of roles, and where an endpoint listens."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from excimer.base.lsn import parse_lsn
from excimer.controller.endpoints.api_models import Body, EndpointAnswer, LsnText, Port
from excimer.controller.role_passwords import BOOTSTRAP_SUPERUSER
from excimer.controller.shell import Controller


class RolePasswordBody(Body):
    branch: str = Field(description="Name or id.")
    role: str
    is_bootstrap: bool = False
    verifier: str = Field(description="As it is in pg_authid; empty: the role has no password.")
    password: str | None = Field(None, description="To be kept; none: only its owner knows it.")
    lsn: LsnText | None = Field(None, description="From where on it is in force; none: about to be set.")


class SeenVerifierBody(Body):
    branch: str = Field(description="Name or id.")
    role: str
    is_bootstrap: bool = False
    verifier: str
    lsn: LsnText


class PasswordAnswer(BaseModel):
    role: str
    password: str | None = Field(description="None: it is not known here.")


class ListenBody(Body):
    """What is left out stays as it is."""

    listen_host: str | None = None
    postgres_port: Port | None = None
    tls_certificate_path: str | None = None
    tls_key_path: str | None = None
    without_tls: bool = Field(False, description="Forget the endpoint's own certificate.")


def add_role_routes(router: APIRouter, controller: Controller) -> None:
    base = "/tenants/{tenant}/role_passwords"

    @router.get(base, tags=["roles"])
    async def password_in_force(
        tenant: str,
        branch: str = "main",
        role: Annotated[str | None, Query(description="None: the bootstrap superuser.")] = None,
        at_lsn: LsnText | None = None,
    ) -> PasswordAnswer:
        """The password that a role has at an LSN of a branch, as far as it is known here."""
        found = await controller.find_tenant(tenant)
        timeline = await controller.find_branch(found.tenant_id, branch)
        lsn = None if at_lsn is None else parse_lsn(at_lsn)
        row = await controller.passwords.in_force(found.tenant_id, timeline.timeline_id, role, lsn)
        if row is None:
            return PasswordAnswer(role=role or BOOTSTRAP_SUPERUSER, password=None)
        return PasswordAnswer(role=row.role, password=row.password)

    @router.post(base, tags=["roles"])
    async def remember(tenant: str, body: RolePasswordBody) -> PasswordAnswer:
        """Records a password before it is set in a branch, and then from which LSN on it is in force."""
        found = await controller.find_tenant(tenant)
        timeline = await controller.find_branch(found.tenant_id, body.branch)
        await controller.passwords.remember(
            timeline,
            role=body.role,
            is_bootstrap=body.is_bootstrap,
            verifier=body.verifier,
            password=body.password,
            lsn=None if body.lsn is None else parse_lsn(body.lsn),
        )
        return PasswordAnswer(role=body.role, password=body.password)

    @router.post(base + "/look_up", tags=["roles"])
    async def look_up(tenant: str, body: SeenVerifierBody) -> PasswordAnswer:
        """The password of a verifier that is in force in a branch."""
        found = await controller.find_tenant(tenant)
        timeline = await controller.find_branch(found.tenant_id, body.branch)
        password = await controller.passwords.look_up(
            timeline,
            role=body.role,
            is_bootstrap=body.is_bootstrap,
            verifier=body.verifier,
            lsn=parse_lsn(body.lsn),
        )
        return PasswordAnswer(role=body.role, password=password)

    @router.patch("/endpoints/{name}/listen", tags=["endpoints"])
    async def set_listen(name: str, body: ListenBody) -> EndpointAnswer:
        """Where an endpoint listens from its next start on."""
        await controller.set_listen(
            name,
            host=body.listen_host,
            port=body.postgres_port,
            certificate=(body.tls_certificate_path, body.tls_key_path),
            without_tls=body.without_tls,
        )
        return EndpointAnswer.of(*await controller.find_endpoint(name))
