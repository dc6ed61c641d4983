"""Tokens for tests: any rights on anything."""

import time

from excimer.base.ids import TenantId, TimelineId
from excimer.wire.auth import Claims, KeyPair, Right, encode_token


def make_token(
    keys: KeyPair,
    *rights: Right,
    tenant_id: TenantId | None = None,
    timeline_id: TimelineId | None = None,
    holder: str = "test",
    exp: int | None = None,
    life_s: int | None = None,
) -> str:
    """On all tenants and timelines unless some are named; until `exp`, or for `life_s` from now on."""
    if life_s is not None:
        exp = int(time.time()) + life_s
    claims = Claims(
        holder=holder, rights=frozenset(rights), tenant_id=tenant_id, timeline_id=timeline_id, exp=exp
    )
    return encode_token(keys.private_pem, claims)


def bearer(token: str) -> dict[str, str]:
    """The header of a request."""
    return {"Authorization": f"Bearer {token}"}
