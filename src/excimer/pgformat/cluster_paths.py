"""Which paths a cluster's files may have: whoever takes files that somebody else has named asks here first.

A path of a basebackup comes from a pageserver, one of an import from a user's cluster. Neither may lead out
of the directory it is for, and a basebackup names no file that the compute itself writes (postgresql.conf,
pg_hba.conf, pg_control…).

Not here: what the files mean (`cluster_files`).
"""

import re

from excimer.base.errors import RefusedError

PATH_SIZE_BYTES_MAX = 1024
NAME_SIZE_BYTES_MAX = 255

_OID = r"[1-9][0-9]{0,9}"
_CARRIED = re.compile(
    "|".join(
        (
            rf"(?:global|base/{_OID})/pg_filenode\.map",
            rf"base/{_OID}/PG_VERSION",
            r"pg_twophase/(?:[0-9A-F]{8}|[0-9A-F]{16})",
            r"pg_logical/replorigin_checkpoint",
            r"pg_logical/snapshots/[0-9A-F]{1,8}-[0-9A-F]{1,8}\.snap",
            r"pg_logical/mappings/map-[0-9a-fA-F_-]{1,80}",
            r"pg_replslot/[a-z0-9_]{1,63}/state",
            r"pg_stat/(?:pgstat\.stat|pg_stat_statements\.stat|global\.stat|db_[0-9]{1,10}\.stat)",
        )
    )
)
"""Small files that a basebackup carries whole. Not among them: what the compute writes by itself."""


_PLAIN = re.compile(r"\w{1,100}(?:/\w{1,100}){0,7}(?:\.[0-9]{1,9})?", re.ASCII)
"""What nearly all paths are like, none of which has anything to refuse: a cluster has tens of thousands."""


class UnsafePathError(RefusedError):
    """A path that may not be used as it is."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"the path {path[:200]!r} {reason}")
        self.path = path


def check_relative_path(path: str) -> str:
    """The same path: relative, of plain components, not too long. Raises `UnsafePathError`.

    Joined to a directory it names something in it, unless a link there leads elsewhere.
    """
    if _PLAIN.fullmatch(path) is not None:
        return path
    if "\0" in path:
        raise UnsafePathError(path, "contains a zero byte")
    if path.startswith("/"):
        raise UnsafePathError(path, "is absolute")
    components = path.split("/")
    if ".." in components:
        raise UnsafePathError(path, "leads to a parent directory")
    if "" in components or "." in components:
        raise UnsafePathError(path, "has an empty component")
    try:
        sizes = [len(component.encode()) for component in components]
    except UnicodeEncodeError:
        raise UnsafePathError(path, "is not UTF-8") from None
    if sum(sizes) + len(sizes) > PATH_SIZE_BYTES_MAX or max(sizes) > NAME_SIZE_BYTES_MAX:
        raise UnsafePathError(path, "is too long")
    return path


def check_carried_path(path: str) -> str:
    """The same path, of a file that a basebackup may carry whole. Raises `UnsafePathError`."""
    check_relative_path(path)
    if _CARRIED.fullmatch(path) is None:
        raise UnsafePathError(path, "is not one of the files that a basebackup carries")
    return path
