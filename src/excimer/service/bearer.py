"""The bearer token of an HTTP request: whose it is, before anything else of the request is looked at."""

from excimer.base.errors import RefusedError
from excimer.wire.auth import AuthError, Claims, TokenVerifier


class UnauthorizedError(RefusedError):
    """No valid bearer token came with the request."""


def verify_bearer(authorization: str, verifier: TokenVerifier, now: float) -> Claims:
    """The claims of an Authorization header. Raises `UnauthorizedError`."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise UnauthorizedError("this needs a token: send the header 'Authorization: Bearer …'")
    try:
        return verifier.verify(token.strip(), now)
    except AuthError as error:
        raise UnauthorizedError(str(error)) from error
