"""Where an export goes: what a directory and a tar have in common."""

from typing import Protocol

from excimer.base.errors import RefusedError
from excimer.base.keys import BLOCK_SIZE_BYTES

ZERO_PAGE = bytes(BLOCK_SIZE_BYTES)


class OutputRefusedError(RefusedError):
    """The export cannot go where it shall: something is there already, or it cannot be made."""


class ExportSink(Protocol):
    """Takes a cluster piece by piece; one thread at a time. Calls block, and raise OSError. Paths are
    relative, and one that would lead out of the place is an `UnsafePathError`.

    At the end comes either `finish`, after which all is durable and in its place, or `abandon`, which may be
    called at any time and leaves nothing behind of what this sink has written, and only of that.
    """

    def begin(self) -> None:
        """Makes the place. Raises `OutputRefusedError`."""

    def add_directory(self, path: str) -> None: ...
    def add_file(self, path: str, content: bytes) -> None: ...
    def open_file(self, path: str, size_bytes: int) -> None:
        """A file to be written in pieces, front to back; one at a time."""

    def write(self, data: bytes) -> None:
        """The next piece of the open file."""

    def skip(self, size_bytes: int) -> None:
        """The same, of zeros."""

    def close_file(self) -> None:
        """The open file is complete: what is missing at its end are zeros."""

    def finish(self) -> None: ...
    def abandon(self) -> None: ...
