"""Tokens: short JSON statements signed with Ed25519 (JWT, EdDSA) that say who holds them and what they open.

::

    claims = holder, rights, tenant | all, timeline | all, expiry
                        |
    authorize(claims, right, resource)     the only decision (A1); every door asks it

A right is for a resource: all, a tenant, or one timeline. None implies another, and a branch's token reads
what the branch has of its ancestors, because that is for the pageserver to find. A token without rights only
proves who its holder is. Who holds which token, and which door asks for what: docs/architecture/rights.md.

One key pair belongs to an installation. The controller (and the CLI at `init`) signs; every service checks
with the public key alone.

Not here: passwords of database users, and who a person is (the controller's business).
"""

from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from excimer.base.errors import RefusedError
from excimer.base.ids import TenantId, TimelineId, parse_tenant_id, parse_timeline_id

ALGORITHM = "EdDSA"
TOKEN_SIZE_BYTES_MAX = 4096
HOLDER_LENGTH_MAX = 100


class AuthError(RefusedError):
    """A token is missing, wrong, expired, or does not open what was asked for."""


class TokenExpiredError(AuthError):
    """The token was good and no longer is: whoever has a newer one may try again with that."""

    def __init__(self) -> None:
        super().__init__("the token has expired: ask for a new one")


class RightMissingError(AuthError):
    """The token is good, and does not open this door."""


class Right(StrEnum):
    READ_PAGES = "read_pages"
    """Pages and basebackups, and leases in the holder's own name."""
    READ_WAL = "read_wal"
    """Committed WAL."""
    WRITE_WAL = "write_wal"
    """To be elected and to append; only ever of one timeline."""
    MANAGE = "manage"
    """The HTTP management APIs: to create, look into, change and delete."""


class Resource(NamedTuple):
    """What a door opens: one timeline, a whole tenant (no timeline), or everything (neither)."""

    tenant_id: TenantId | None = None
    timeline_id: TimelineId | None = None


EVERYTHING = Resource()


class Claims(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a token says. A claim that is not known here could be a restriction: it makes a token void."""

    holder: Annotated[str, msgspec.Meta(min_length=1, max_length=HOLDER_LENGTH_MAX)]
    """``controller``, ``cli``, ``pageserver:1``, ``endpoint:NAME``, ``safekeeper:2``."""
    rights: frozenset[Right] = frozenset()
    tenant_id: TenantId | None = None
    """None: all tenants."""
    timeline_id: TimelineId | None = None
    """None: all timelines of the tenant. Given only together with the tenant."""
    exp: int | None = None
    """Unix time in seconds from which the token is no longer valid; None: never expires."""

    def __post_init__(self) -> None:
        if self.timeline_id is not None and self.tenant_id is None:
            raise ValueError("a timeline is named together with its tenant")
        if Right.WRITE_WAL in self.rights and self.timeline_id is None:
            raise ValueError("write_wal is a right on one timeline")

    def check_current(self, now: float) -> None:
        """For a connection that outlives its first check. Raises `TokenExpiredError` at `now` (Unix time)."""
        if self.exp is not None and now >= self.exp:
            raise TokenExpiredError


def authorize(claims: Claims, right: Right, resource: Resource) -> None:
    """Raises `RightMissingError` unless the claims have the right on the whole resource."""
    if right not in claims.rights:
        raise RightMissingError(f"the token of {claims.holder} does not have the right {right.value}")
    if claims.tenant_id is not None and claims.tenant_id != resource.tenant_id:
        raise RightMissingError(
            f"the token of {claims.holder} is for another tenant than {_or_all(resource.tenant_id)}"
        )
    if claims.timeline_id is not None and claims.timeline_id != resource.timeline_id:
        raise RightMissingError(
            f"the token of {claims.holder} is for another timeline than {_or_all(resource.timeline_id)}"
        )


def is_holder(claims: Claims, holder: str) -> bool:
    """Whether a token proves that its bearer is `holder`: only one without rights does.

    One with rights is for its doors. It may be where others can read it, and must not become another.
    """
    return claims.holder == holder and not claims.rights


def _or_all(row_id: str | None) -> str:
    return "all of them" if row_id is None else row_id


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
        claims.check_current(now)
        return claims

    def _decode(self, text: str) -> Claims:
        options: Any = {"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False}
        try:
            raw = jwt.decode(text, self._key, algorithms=[ALGORITHM], options=options)
        except jwt.InvalidTokenError as error:
            raise AuthError("the token is not one of this installation") from error
        try:
            claims = msgspec.convert(raw, Claims)
            tenant_id, timeline_id = claims.tenant_id, claims.timeline_id
            claims = msgspec.structs.replace(
                claims,
                tenant_id=None if tenant_id is None else parse_tenant_id(tenant_id),
                timeline_id=None if timeline_id is None else parse_timeline_id(timeline_id),
            )
        except (msgspec.ValidationError, RefusedError) as error:
            raise AuthError(f"the token's claims are not understood: {error}") from error
        return claims
