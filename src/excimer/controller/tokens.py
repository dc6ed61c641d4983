"""The tokens that the controller signs: for its own calls, and for computes, pageservers and readers.

The controller is the only service that holds the private key. What each kind of token opens, and for how
long, stands here and nowhere else; docs/architecture/rights.md shows it as a table.

Not here: to whom they are given (`access`), checking them (`excimer.wire.auth`).
"""

from dataclasses import dataclass
from typing import Final

from excimer.base.clock import Clock
from excimer.base.ids import NodeId
from excimer.wire.auth import Claims, Resource, Right, encode_token
from excimer.wire.endpoint_tokens import EndpointTokens

CALL_TOKEN_LIFE_S: Final = 300
"""Longer than any call takes."""
READING_TOKEN_LIFE_S: Final = 86_400
RENEWAL_TOKEN_LIFE_S: Final = 7 * 86_400
"""A manager that has not reached the controller for so long must be started again."""
ENDPOINT_TOKEN_LIFE_S: Final = 600
WAL_TOKEN_LIFE_S: Final = 3600


@dataclass(frozen=True, slots=True)
class TokenMaker:
    private_pem: bytes
    clock: Clock
    endpoint_token_life_s: int = ENDPOINT_TOKEN_LIFE_S
    wal_token_life_s: int = WAL_TOKEN_LIFE_S

    def managing(self, resource: Resource) -> str:
        """For one call of a management API."""
        return self._sign("controller", {Right.MANAGE}, resource, CALL_TOKEN_LIFE_S)

    def for_reading(self, resource: Resource) -> str:
        """For the command line, which copies a branch."""
        return self._sign("cli", {Right.READ_PAGES}, resource, READING_TOKEN_LIFE_S)

    def for_endpoint(
        self, holder: str, resource: Resource, *, may_write: bool, follows: bool = False
    ) -> EndpointTokens:
        """`may_write`: a primary, which reads the WAL that replication slots need; `follows`: a replica."""
        life_s = self.endpoint_token_life_s
        return EndpointTokens(
            read_pages=self._sign(holder, {Right.READ_PAGES}, resource, life_s),
            write_wal=self._sign(holder, {Right.WRITE_WAL}, resource, life_s) if may_write else None,
            read_wal=self._sign(holder, {Right.READ_WAL}, resource, life_s) if follows or may_write else None,
            renewal=self._sign(holder, set(), resource, RENEWAL_TOKEN_LIFE_S),
            valid_for_s=life_s,
        )

    def for_ingest(self, pageserver_id: NodeId, resource: Resource) -> str:
        """For a pageserver, to read a timeline's WAL; it lives `wal_token_life_s`."""
        return self._sign(f"pageserver:{pageserver_id}", {Right.READ_WAL}, resource, self.wal_token_life_s)

    def for_receiving(self, resource: Resource) -> str:
        """For the command line, which receives a branch's WAL; it lives `wal_token_life_s`."""
        return self._sign("cli", {Right.READ_WAL}, resource, self.wal_token_life_s)

    def _sign(self, holder: str, rights: set[Right], resource: Resource, life_s: int) -> str:
        claims = Claims(
            holder=holder,
            rights=frozenset(rights),
            tenant_id=resource.tenant_id,
            timeline_id=resource.timeline_id,
            exp=int(self.clock.now()) + life_s,
        )
        return encode_token(self.private_pem, claims)
