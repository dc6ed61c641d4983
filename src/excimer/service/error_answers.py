"""Error families as HTTP answers, the only such table: status, and a body that says what to do.

The body is ``{"error": family, "kind": class, "message": sentence}``.
"""

from typing import Final

import msgspec

from excimer.base.errors import (
    ConflictError,
    CorruptionError,
    ExcimerError,
    FencedError,
    NotFoundError,
    RefusedError,
    RetryableError,
)
from excimer.service.bearer import UnauthorizedError
from excimer.wire.auth import AuthError

HTTP_UNAUTHORIZED: Final = 401

STATUS_OF_FAMILY: Final[tuple[tuple[type[ExcimerError], int, str], ...]] = (
    (UnauthorizedError, HTTP_UNAUTHORIZED, "unauthorized"),
    (AuthError, 403, "forbidden"),
    (NotFoundError, 404, "not_found"),
    (ConflictError, 409, "conflict"),
    (RefusedError, 400, "refused"),
    (RetryableError, 503, "retryable"),
    (FencedError, 412, "fenced"),
    (CorruptionError, 500, "corruption"),
    (ExcimerError, 500, "error"),
)
"""First match counts. 503 carries Retry-After."""


def status_of(error: ExcimerError) -> tuple[int, str]:
    """HTTP status and family name of an error."""
    return next((status, family) for kind, status, family in STATUS_OF_FAMILY if isinstance(error, kind))


def error_body(family: str, kind: str, message: str) -> bytes:
    return msgspec.json.encode({"error": family, "kind": kind, "message": message})
