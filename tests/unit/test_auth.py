"""Tokens: what is signed is read back; every forged, foreign, expired or malformed one is refused."""

import base64
import json
import random

import jwt
import pytest

from excimer.base.ids import TenantId, new_tenant_id
from excimer.wire.auth import (
    AuthError,
    Claims,
    Scope,
    TokenVerifier,
    encode_token,
    generate_key_pair,
    require_scope,
    require_tenant,
)

KEYS = generate_key_pair()
TENANT = new_tenant_id(random.Random(1))
OTHER = new_tenant_id(random.Random(2))
VERIFIER = TokenVerifier(KEYS.public_pem)


def test_round_trip() -> None:
    claims = Claims(scope=Scope.TENANT, tenant_id=TENANT, exp=2_000)
    assert VERIFIER.verify(encode_token(KEYS.private_pem, claims), 1_999.0) == claims


def test_tenant_id_is_normalised() -> None:
    token = encode_token(KEYS.private_pem, Claims(scope=Scope.TENANT, tenant_id=TenantId(TENANT.upper())))
    assert VERIFIER.verify(token, 0).tenant_id == TENANT


def test_expired_token_is_refused() -> None:
    token = encode_token(KEYS.private_pem, Claims(scope=Scope.ADMIN, exp=2_000))
    with pytest.raises(AuthError, match="expired"):
        VERIFIER.verify(token, 2_000.0)


def test_token_of_another_installation_is_refused() -> None:
    token = encode_token(generate_key_pair().private_pem, Claims(scope=Scope.ADMIN))
    with pytest.raises(AuthError, match="not one of this installation"):
        VERIFIER.verify(token, 0)


def unsigned(header: dict[str, object], claims: dict[str, object]) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    return (b".".join(parts) + b".").decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a.b.c",
        "x" * 10_000,
        "é" * 20,
        unsigned({"alg": "none", "typ": "JWT"}, {"scope": "admin"}),
        jwt.encode({"scope": "admin"}, "a secret that is long enough for HS256", algorithm="HS256"),
    ],
)
def test_malformed_and_unsigned_tokens_are_refused(text: str) -> None:
    with pytest.raises(AuthError):
        VERIFIER.verify(text, 0)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"scope": "root"},
        {"scope": "tenant"},
        {"scope": "tenant", "tenant_id": "abc"},
        {"scope": "admin", "tenant_id": TENANT},
        {"scope": "admin", "exp": "soon"},
    ],
)
def test_signed_but_senseless_claims_are_refused(raw: dict[str, object]) -> None:
    # `exp` of a wrong type must not pass as "never expires".
    with pytest.raises(AuthError):
        VERIFIER.verify(jwt.encode(raw, KEYS.private_pem, algorithm="EdDSA"), 0)


def test_changed_signature_is_refused() -> None:
    token = encode_token(KEYS.private_pem, Claims(scope=Scope.ADMIN))
    head, body, signature = token.split(".")
    flipped = ("A" if signature[5] != "A" else "B").join((signature[:5], signature[6:]))
    with pytest.raises(AuthError):
        VERIFIER.verify(f"{head}.{body}.{flipped}", 0)


def test_tenant_scope_grants_one_tenant_only() -> None:
    claims = Claims(scope=Scope.TENANT, tenant_id=TENANT)
    require_tenant(claims, TENANT)
    with pytest.raises(AuthError, match="does not grant access to tenant"):
        require_tenant(claims, OTHER)
    with pytest.raises(AuthError):
        require_tenant(Claims(scope=Scope.SAFEKEEPER_DATA), TENANT)
    require_tenant(Claims(scope=Scope.SAFEKEEPER_DATA), TENANT, Scope.SAFEKEEPER_DATA)
    require_tenant(Claims(scope=Scope.ADMIN), TENANT)


def test_scope_is_required() -> None:
    require_scope(Claims(scope=Scope.ADMIN), Scope.PAGESERVER_API)
    require_scope(Claims(scope=Scope.PAGESERVER_API), Scope.PAGESERVER_API)
    with pytest.raises(AuthError, match="needs pageserver_api"):
        require_scope(Claims(scope=Scope.TENANT, tenant_id=TENANT), Scope.PAGESERVER_API)


@pytest.mark.parametrize("pem", [b"", b"nonsense", KEYS.private_pem])
def test_wrong_public_key_is_refused(pem: bytes) -> None:
    with pytest.raises(AuthError):
        TokenVerifier(pem)


@pytest.mark.parametrize("pem", [b"", KEYS.public_pem])
def test_wrong_private_key_is_refused(pem: bytes) -> None:
    with pytest.raises(AuthError):
        encode_token(pem, Claims(scope=Scope.ADMIN))
