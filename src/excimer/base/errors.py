"""Error families: each says what the caller does next.

Every error that crosses a module boundary derives from one of these four. `endpoints/` of each
service map them to HTTP statuses, page-service codes and SQLSTATEs in one table; nothing else may.
"""


class ExcimerError(Exception):
    """Root of all errors that Excimer raises on purpose."""


class RetryableError(ExcimerError):
    """Nothing is wrong with the request: try again later, perhaps elsewhere."""


class RefusedError(ExcimerError):
    """The caller must change the request: it will never succeed as it is."""


class NotFoundError(RefusedError):
    """What the request names does not exist."""


class ConflictError(RefusedError):
    """The request contradicts what exists: a name is taken, something is still in use."""


class FencedError(ExcimerError):
    """A newer owner (term, generation) exists: stop at once and write nothing more."""


class CorruptionError(ExcimerError):
    """Stored bytes are not what was written: stop serving them and call a human."""
