"""Who is given tokens: computes that run, and pageservers that read WAL. Each proves only who it is.

A compute's manager shows its renewal token, a pageserver the token of its installation; neither has a right.
A user's command, which may do everything, is given WAL of one branch at a time.
What they get follows from the rows as they are now: an endpoint that was deleted, or was moved to another
timeline, gets nothing more, and a pageserver gets WAL of the tenants that are placed on it.

Not here: what the tokens open (`tokens`), routes (`endpoints.access_api`).
"""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from excimer.base.ids import TenantId, TimelineId
from excimer.controller import core
from excimer.controller.model import Endpoint, UnknownNameError
from excimer.controller.store import MetadataStore
from excimer.controller.tokens import TokenMaker
from excimer.wire.auth import Claims, Resource, RightMissingError, is_holder
from excimer.wire.endpoint_tokens import EndpointTokens
from excimer.wire.wal_access import WalAccess, WalMember

P = ParamSpec("P")
R = TypeVar("R")


class Access:
    def __init__(self, store: MetadataStore, tokens: TokenMaker) -> None:
        self._store = store
        self._tokens = tokens

    def tokens_of(self, endpoint: Endpoint) -> EndpointTokens:
        """For whoever starts the endpoint's compute."""
        return self._tokens.for_endpoint(
            core.holder_of(endpoint.name),
            Resource(endpoint.tenant_id, endpoint.timeline_id),
            may_write=endpoint.mode == "primary",
            follows=endpoint.mode == "replica",
        )

    async def renew(self, name: str, claims: Claims) -> EndpointTokens:
        """For the endpoint itself. Raises `RightMissingError` for a token that is not its own,
        `UnknownNameError` when it is gone or serves another timeline now.
        """
        if not is_holder(claims, core.holder_of(name)):
            raise RightMissingError(f"this token of {claims.holder} is not endpoint {name}'s own")
        endpoint = core.find_endpoint(await self._db(self._store.list_endpoints), name)
        if (claims.tenant_id, claims.timeline_id) != (endpoint.tenant_id, endpoint.timeline_id):
            raise UnknownNameError(f"endpoint {name!r} serves another branch now: start it again")
        return self.tokens_of(endpoint)

    async def wal_access(self, tenant_id: TenantId, timeline_id: TimelineId, claims: Claims) -> WalAccess:
        """For the pageserver that has the tenant. Raises `RightMissingError` for any other bearer,
        `UnknownNameError` for a timeline that is not there, `IncompleteError` before it has safekeepers.
        """
        tenant = await self._db(self._store.find_tenant, tenant_id)
        if tenant is None or tenant.state == "deleting":
            raise UnknownNameError(f"no tenant {tenant_id}")
        if not is_holder(claims, f"pageserver:{tenant.pageserver_id}"):
            raise RightMissingError(
                f"this token of {claims.holder} is not of the pageserver that has tenant {tenant_id}"
            )
        token = self._tokens.for_ingest(tenant.pageserver_id, Resource(tenant_id, timeline_id))
        return await self._wal_access(tenant_id, timeline_id, token)

    async def wal_for_user(self, tenant_id: TenantId, timeline_id: TimelineId) -> WalAccess:
        """For the command line, which receives WAL. Raises as `wal_access` does."""
        token = self._tokens.for_receiving(Resource(tenant_id, timeline_id))
        return await self._wal_access(tenant_id, timeline_id, token)

    async def _wal_access(self, tenant_id: TenantId, timeline_id: TimelineId, token: str) -> WalAccess:
        timeline = await self._db(self._store.find_timeline, tenant_id, timeline_id)
        if timeline is None or timeline.state == "deleting":
            raise UnknownNameError(f"no timeline {timeline_id}")
        placed = {each.safekeeper_id for each in await self._db(self._store.list_placements, timeline_id)}
        if not placed:
            raise core.IncompleteError(f"timeline {timeline_id} has no safekeepers yet")
        return WalAccess(
            members=tuple(
                WalMember(safekeeper_id=row.id, address=row.replication_address)
                for row in await self._db(self._store.list_safekeepers)
                if row.id in placed
            ),
            token=token,
            valid_for_s=self._tokens.wal_token_life_s,
        )

    async def _db(self, call: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        return await asyncio.to_thread(call, *arguments, **options)
