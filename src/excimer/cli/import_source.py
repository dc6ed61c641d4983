"""What an import takes a cluster from: a data directory or a server, both as frames of an import stream.

Not here: the two of them (`import_directory`, `import_server`), sending (`import_upload`).
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

from excimer.base.errors import RefusedError, RetryableError
from excimer.base.lsn import Lsn, format_lsn
from excimer.wire.import_stream import encode_tar

FRAME_SIZE_BYTES = 1 << 20


class SourceRefusedError(RefusedError):
    """The cluster cannot be imported as it is."""


class SourceLostError(RetryableError):
    """The source went away, or no longer has what is needed."""


class ImportSource(Protocol):
    """One cluster. `frames` may be taken once."""

    pg_version: int
    total_size_bytes: int
    """Of the files, as far as it is known; 0: unknown."""
    phase: str
    """What happens now, for people."""

    def frames(self) -> Iterator[bytes]:
        """The whole import stream. Raises `SourceRefusedError`, `SourceLostError`."""

    def close(self) -> None: ...


def one_line(message: str) -> str:
    """What libpq says, which may have lines for each address that was tried, details and hints."""
    return " ".join(message.split())


def tar_frames(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of a tar file as frames of useful size."""
    pending: list[bytes] = []
    size = 0
    for part in parts:
        pending.append(part)
        size += len(part)
        if size >= FRAME_SIZE_BYTES:
            yield encode_tar(b"".join(pending))
            pending, size = [], 0
    if pending:
        yield encode_tar(b"".join(pending))


def check_target(to_lsn: Lsn | None, readable_lsn: Lsn) -> None:
    """Raises `SourceRefusedError` for a point at which the backup is not consistent yet."""
    if to_lsn is not None and to_lsn < readable_lsn:
        raise SourceRefusedError(
            f"--to {format_lsn(to_lsn)} is too early: "
            f"the backup is consistent from {format_lsn(readable_lsn)} on"
        )
