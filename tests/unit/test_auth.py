"""Tokens: what is signed is read back; every forged, foreign, expired or malformed one is refused."""

import base64
import json
import random
from itertools import chain, combinations, product

import jwt
import pytest

from excimer.base.ids import TenantId, TimelineId, new_tenant_id, new_timeline_id
from excimer.wire.auth import (
    AuthError,
    Claims,
    Resource,
    Right,
    RightMissingError,
    TokenExpiredError,
    TokenVerifier,
    authorize,
    encode_token,
    generate_key_pair,
)

KEYS = generate_key_pair()
TENANT = new_tenant_id(random.Random(1))
OTHER = new_tenant_id(random.Random(2))
TIMELINE = new_timeline_id(random.Random(3))
OTHER_TIMELINE = new_timeline_id(random.Random(4))
MANAGER = Claims(holder="cli", rights=frozenset({Right.MANAGE}))
VERIFIER = TokenVerifier(KEYS.public_pem)


def test_round_trip() -> None:
    claims = Claims(
        holder="endpoint:main",
        rights=frozenset({Right.READ_PAGES, Right.WRITE_WAL}),
        tenant_id=TENANT,
        timeline_id=TIMELINE,
        exp=2_000,
    )
    assert VERIFIER.verify(encode_token(KEYS.private_pem, claims), 1_999.0) == claims


def test_ids_are_normalised() -> None:
    shouted = Claims(
        holder="cli", tenant_id=TenantId(TENANT.upper()), timeline_id=TimelineId(TIMELINE.upper())
    )
    claims = VERIFIER.verify(encode_token(KEYS.private_pem, shouted), 0)
    assert (claims.tenant_id, claims.timeline_id) == (TENANT, TIMELINE)


def test_expired_token_is_refused() -> None:
    token = encode_token(KEYS.private_pem, Claims(holder="cli", exp=2_000))
    claims = VERIFIER.verify(token, 1_999.9)
    with pytest.raises(TokenExpiredError, match="expired"):
        VERIFIER.verify(token, 2_000.0)
    claims.check_current(1_999.9)
    with pytest.raises(TokenExpiredError):
        claims.check_current(2_000.0)


def test_token_of_another_installation_is_refused() -> None:
    token = encode_token(generate_key_pair().private_pem, MANAGER)
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
        unsigned({"alg": "none", "typ": "JWT"}, {"holder": "cli", "rights": ["manage"]}),
        jwt.encode(
            {"holder": "cli", "rights": ["manage"]},
            "a secret that is long enough for HS256",
            algorithm="HS256",
        ),
    ],
)
def test_malformed_and_unsigned_tokens_are_refused(text: str) -> None:
    with pytest.raises(AuthError):
        VERIFIER.verify(text, 0)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rights": ["manage"]},
        {"holder": "", "rights": ["manage"]},
        {"holder": "x" * 101},
        {"holder": "cli", "rights": ["everything"]},
        {"holder": "cli", "rights": "manage"},
        {"holder": "cli", "tenant_id": "abc"},
        {"holder": "cli", "tenant_id": TENANT, "timeline_id": "abc"},
        {"holder": "cli", "timeline_id": TIMELINE},
        {"holder": "cli", "rights": ["write_wal"]},
        {"holder": "cli", "rights": ["write_wal"], "tenant_id": TENANT},
        {"holder": "cli", "exp": "soon"},
        {"holder": "cli", "rights": ["manage"], "only_on": "mondays"},
        {"scope": "admin"},
    ],
)
def test_signed_but_senseless_claims_are_refused(raw: dict[str, object]) -> None:
    # `exp` of a wrong type must not pass as "never expires", nor a restriction unseen.
    with pytest.raises(AuthError):
        VERIFIER.verify(jwt.encode(raw, KEYS.private_pem, algorithm="EdDSA"), 0)


def test_changed_signature_is_refused() -> None:
    token = encode_token(KEYS.private_pem, MANAGER)
    head, body, signature = token.split(".")
    flipped = ("A" if signature[5] != "A" else "B").join((signature[:5], signature[6:]))
    with pytest.raises(AuthError):
        VERIFIER.verify(f"{head}.{body}.{flipped}", 0)


RESOURCES = (
    Resource(),
    Resource(TENANT),
    Resource(TENANT, TIMELINE),
    Resource(TENANT, OTHER_TIMELINE),
    Resource(OTHER),
    Resource(OTHER, TIMELINE),
)


def all_sets(rights: list[Right]) -> list[frozenset[Right]]:
    return [
        frozenset(some) for some in chain(*(combinations(rights, size) for size in range(len(rights) + 1)))
    ]


def test_a_token_opens_its_rights_on_what_it_names_and_nothing_else() -> None:
    opened = 0
    for rights, (tenant, timeline) in product(all_sets(list(Right)), RESOURCES):
        if Right.WRITE_WAL in rights and timeline is None:
            with pytest.raises(ValueError, match="one timeline"):
                Claims(holder="test", rights=rights, tenant_id=tenant, timeline_id=timeline)
            continue
        claims = Claims(holder="test", rights=rights, tenant_id=tenant, timeline_id=timeline)
        for right, resource in product(Right, RESOURCES):
            may = (
                right in rights
                and tenant in (None, resource.tenant_id)
                and timeline in (None, resource.timeline_id)
            )
            try:
                authorize(claims, right, resource)
            except RightMissingError:
                assert not may, (claims, right, resource)
            else:
                assert may, (claims, right, resource)
                opened += 1
    reading_or_managing, writing = 4 * (6 + 3 + 2) + 8 * 3, 8 * 3
    assert opened == 3 * reading_or_managing + writing


@pytest.mark.parametrize("pem", [b"", b"nonsense", KEYS.private_pem])
def test_wrong_public_key_is_refused(pem: bytes) -> None:
    with pytest.raises(AuthError):
        TokenVerifier(pem)


@pytest.mark.parametrize("pem", [b"", KEYS.public_pem])
def test_wrong_private_key_is_refused(pem: bytes) -> None:
    with pytest.raises(AuthError):
        encode_token(pem, MANAGER)
