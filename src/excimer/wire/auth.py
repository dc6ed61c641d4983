"""Tokens: short JSON statements signed with Ed25519 (JWT, EdDSA) that say what a caller may do.

One key pair belongs to an installation. Whoever holds the private key (the CLI at `init`, the
controller, the pageserver when it reads from safekeepers) makes tokens; every service checks them
with the public key alone.

====================  ==================================================================
scope                 grants
====================  ==================================================================
``tenant``            pages, WAL and basebackups of the one tenant in ``tenant_id``
``pageserver_api``    the pageserver's HTTP management API
``safekeeper_data``   WAL of every tenant, to read and to copy between safekeepers
``admin``             everything
====================  ==================================================================

Not here: passwords of database users, and who a person is (the controller's business).
"""

from enum import StrEnum
from typing import Any

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from excimer.base.errors import RefusedError
from excimer.base.ids import TenantId, parse_tenant_id

ALGORITHM = "EdDSA"
TOKEN_SIZE_BYTES_MAX = 8192


class AuthError(RefusedError):
    """A token is missing, wrong, expired, or does not grant what was asked for."""


class Scope(StrEnum):
    TENANT = "tenant"
    PAGESERVER_API = "pageserver_api"
    SAFEKEEPER_DATA = "safekeeper_data"
    ADMIN = "admin"


class Claims(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a token says. `tenant_id` is given if and only if the scope is ``tenant``."""

    scope: Scope
    tenant_id: TenantId | None = None
    exp: int | None = None
    """Unix time in seconds from which the token is no longer valid; None: never expires."""

    def __post_init__(self) -> None:
        if (self.scope is Scope.TENANT) != (self.tenant_id is not None):
            raise ValueError("tenant_id belongs to the scope tenant, and only to it")


class KeyPair(msgspec.Struct, frozen=True):
    """An Ed25519 key pair as PEM text; the private one must be kept readable by its owner only."""

    private_pem: bytes
    public_pem: bytes


def generate_key_pair() -> KeyPair:
    """A new key pair from the system's randomness."""
    key = Ed25519PrivateKey.generate()
    return KeyPair(
        private_pem=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        public_pem=key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )


def encode_token(private_pem: bytes, claims: Claims) -> str:
    """The signed text. Raises `AuthError` if `private_pem` is not an Ed25519 private key."""
    try:
        key = serialization.load_pem_private_key(private_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise AuthError(f"the private key is not a PEM key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise AuthError("the private key is not an Ed25519 key")
    return jwt.encode(msgspec.to_builtins(claims), key, algorithm=ALGORITHM)


class TokenVerifier:
    """Checks tokens against one public key. Holds no state; may be shared between threads."""

    def __init__(self, public_pem: bytes) -> None:
        """Raises `AuthError` if `public_pem` is not an Ed25519 public key."""
        try:
            key = serialization.load_pem_public_key(public_pem)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise AuthError(f"the public key is not a PEM key: {error}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise AuthError("the public key is not an Ed25519 key")
        self._key = key

    def verify(self, text: str, now: float) -> Claims:
        """The claims of a token that is signed by our key and valid at `now` (Unix time).

        Raises `AuthError`; its text never contains the token.
        """
        if len(text) > TOKEN_SIZE_BYTES_MAX:
            raise AuthError("the token is too long")
        claims = self._decode(text)
        if claims.exp is not None and now >= claims.exp:
            raise AuthError("the token has expired: ask for a new one")
        return claims

    def _decode(self, text: str) -> Claims:
        options: Any = {"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False}
        try:
            raw = jwt.decode(text, self._key, algorithms=[ALGORITHM], options=options)
        except jwt.InvalidTokenError as error:
            raise AuthError("the token is not one of this installation") from error
        try:
            claims = msgspec.convert(raw, Claims)
            if claims.tenant_id is not None:
                claims = msgspec.structs.replace(claims, tenant_id=parse_tenant_id(claims.tenant_id))
        except (msgspec.ValidationError, RefusedError) as error:
            raise AuthError(f"the token's claims are not understood: {error}") from error
        return claims


def require_tenant(claims: Claims, tenant_id: TenantId, *wider: Scope) -> None:
    """Raises `AuthError` unless the claims grant access to this tenant's data.

    Scope ``tenant`` of that tenant does, ``admin`` does, and so does each scope named in `wider`.
    """
    if claims.scope is Scope.ADMIN or claims.scope in wider:
        return
    if claims.scope is not Scope.TENANT or claims.tenant_id != tenant_id:
        raise AuthError(f"the token does not grant access to tenant {tenant_id}")


def require_scope(claims: Claims, *scopes: Scope) -> None:
    """Raises `AuthError` unless the scope is one of `scopes` or ``admin``."""
    if claims.scope is not Scope.ADMIN and claims.scope not in scopes:
        raise AuthError(
            f"the token's scope {claims.scope.value} does not grant this; it needs {scopes[0].value}"
        )
